"""Tables with a row per particle, learnt row by row: a step moves the rows of its batch and no others.

One Adam for the whole table would go on moving every row by its last momentum in all the steps in which its particle is
not seen, and would cost as much as the set is large. Here moments and the number of steps belong to the row, as if
each had an Adam of its own that only counts the steps in which its particle is seen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cryosuite.training.launch import world

EPS = 1e-8


class Table(nn.Module):
    """Values (N, c) of N particles, by name; buffers of the module, since no gradient of all of them is ever made.

    The training loop finds tables among the modules of a model: between the backward pass and ``step`` it calls
    ``gather``. ``lr_scale`` multiplies its learning rate.
    """

    def __init__(self, values: dict[str, Tensor], lr_scale: float = 1.0) -> None:
        super().__init__()
        self.names, self.lr_scale = list(values), lr_scale
        for name, value in values.items():
            self.register_buffer(name, value.clone())
        self.widths = [value.shape[1] for value in values.values()]
        first = next(iter(values.values()))
        # of the checkpoint (``moments``), not of the weights
        self.register_buffer("steps", torch.zeros(len(first), dtype=torch.int64, device=first.device), persistent=False)
        self.register_buffer("mean", first.new_zeros(len(first), sum(self.widths)), persistent=False)
        self.register_buffer("square", torch.zeros_like(self.mean), persistent=False)
        self.taken: list[tuple[Tensor, list[Tensor]]] = []
        self.gathered: tuple[Tensor, Tensor, Tensor] | None = None

    def take(self, index: Tensor) -> list[Tensor]:
        """Rows (b, c) of particles (b,), to be learnt in this step."""
        rows = [getattr(self, name)[index].requires_grad_() for name in self.names]
        self.taken.append((index, rows))
        return rows

    @torch.no_grad()
    def set(self, index: Tensor, values: dict[str, Tensor]) -> None:
        """Write rows (b, c) of particles (b,); what was learnt of how the rows before them moved is forgotten."""
        for name, value in values.items():
            rows = getattr(self, name)
            rows[index] = value.to(rows)
        for moment in (self.steps, self.mean, self.square):
            moment[index] = 0

    def drop(self) -> None:
        """Forget the rows that were taken: the step begins (anew)."""
        self.taken.clear()
        self.gathered = None

    @torch.no_grad()
    def gather(self, most: int) -> Tensor | None:
        """A tensor whose ``grad`` holds the gradient of each row of the step once, of all processes; None where no row
        is learnt.

        Like the gradients of all parameters it is the mean over processes, of which none has more than ``most`` rows;
        ``step`` uses it as it then is (clipped).
        """
        if not self.taken:
            return None
        index = torch.cat([index for index, _ in self.taken])
        found = torch.cat([torch.cat([row.grad for row in rows], 1) for _, rows in self.taken])
        processes = world()[1]
        if processes > 1:
            missing = most - len(index)
            index = torch.cat([index, index[:1].expand(missing)])
            found = torch.cat([found, found.new_zeros(missing, found.shape[1])])
            index, found = _of_all(index, processes), _of_all(found, processes) / processes
        order = index.argsort(stable=True)
        index = index[order]
        # number of each row among the different ones; nothing is asked of the GPU
        number = torch.cat([index.new_zeros(1), (index[1:] != index[:-1]).cumsum(0)])
        moving = torch.empty_like(found)
        moving.grad = torch.zeros_like(found).index_add_(0, number, found[order])
        self.gathered = index, number, moving
        return moving

    @torch.no_grad()
    def step(self, lr: float, betas: tuple[float, float]) -> None:
        """Adam (Kingma and Ba 2015) of the rows that were gathered. Rows that occur twice get the same value twice."""
        if self.gathered is None:
            return
        index, number, moving = self.gathered
        gradient = moving.grad[number]
        steps = self.steps[index] + 1
        mean = self.mean[index].lerp(gradient, 1 - betas[0])
        square = self.square[index].lerp(gradient.square(), 1 - betas[1])
        bias, spread = (1 - beta ** steps[:, None].to(mean) for beta in betas)
        change = lr * (mean / bias) / ((square / spread).sqrt() + EPS)
        self.steps[index], self.mean[index], self.square[index] = steps, mean, square
        for name, part in zip(self.names, change.split(self.widths, 1), strict=True):
            rows = getattr(self, name)
            rows[index] = rows[index] - part
        self.drop()

    def moments(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {"steps": self.steps, "mean": self.mean, "square": self.square}

    def load_moments(self, state: dict[str, Tensor]) -> None:
        """Those of a checkpoint."""
        for name, moment in self.moments().items():
            moment.copy_(state[name])


def _of_all(values: Tensor, processes: int) -> Tensor:
    """Tensors of one shape of all processes, below each other in the order of the processes."""
    parts = [torch.empty_like(values) for _ in range(processes)]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)
