"""Per-step numbers without waiting for the device, and the watch that stops a training that has gone wrong."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from torch import Tensor

from cryosuite.errors import InputError
from cryosuite.training.launch import world

GRAD_NORM = "grad_norm"
EXPLODED = 10.0  # times the running median
PATIENCE = 50  # steps in a row above it
HISTORY = 500  # losses in the running median
SETTLED = 20  # losses before the median means anything
NAMED = 64  # image indices listed in a message


class TrainingDiverged(InputError):  # noqa: N818 -- it is what the user reads, not a programming error
    """The loss became NaN or infinite, or exploded; says where and what is left to go on from."""


class Meter:
    """Scalars of every step, kept on the device until ``collect`` reads them all at once.

    ``collect`` sums over processes (weighted by images), hands every step to the watch and keeps the values until
    ``averages`` turns them into one line of metrics.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.fresh: list[tuple[int, list[str], Tensor, int, Tensor]] = []
        self.read: list[tuple[list[str], list[float]]] = []

    def add(
        self, step: int, losses: dict[str, Tensor], grad_norm: Tensor, share: int, images: int, index: Tensor
    ) -> None:
        """Note the scalars of one step: ``share`` of its ``images`` were this process's, with the rows ``index``."""
        names = ["loss", *sorted(name for name in losses if name != "loss")]
        values = torch.stack([losses[name].detach().float().reshape(()) for name in names] + [grad_norm.float()])
        values[:-1] *= share / images
        self.fresh.append((step, names, values, images, index))

    def collect(self) -> None:
        """Read the fresh steps (the one wait for the device); raises TrainingDiverged."""
        if not self.fresh:
            return
        sums = torch.cat([row for _, _, row, _, _ in self.fresh])
        processes = world()[1]
        if processes > 1:
            torch.distributed.all_reduce(sums)
        values = deque(sums.tolist())
        for step, names, _, images, index in self.fresh:
            scalars = [values.popleft() for _ in names]
            norm = values.popleft() / processes
            self.watch.look(step, scalars[0], norm, index)
            self.read.append(([*names, GRAD_NORM, "images"], [*scalars, norm, images]))
        self.fresh.clear()

    def averages(self) -> dict[str, float]:
        """Means over the steps since the last call, weighted by images; ``images`` is their sum."""
        totals: dict[str, list[float]] = {}
        for names, values in self.read:
            count = values[-1]
            for name, value in zip(names[:-1], values[:-1], strict=True):
                weight = 1.0 if name == GRAD_NORM else count
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += value * weight
                total[1] += weight
        images = sum(values[-1] for _, values in self.read)
        self.read.clear()
        return {name: total / max(weight, 1e-12) for name, (total, weight) in totals.items()} | {"images": images}

    def state_dict(self) -> list:
        """The values of the interval under way, for the checkpoint; call after ``collect``."""
        return [[list(names), list(values)] for names, values in self.read]

    def load_state_dict(self, state: list) -> None:
        """Take up the interval of a checkpoint."""
        self.read = [(list(names), list(values)) for names, values in state]


class Watch:
    """Looks at every loss and gradient norm; stops at the first that is not finite and at a loss that stays exploded.

    ``explain(step, rows)`` says what is known of the images (rows in the particle set) and the last checkpoint.
    """

    def __init__(self, explain: Callable[[int, np.ndarray], str]) -> None:
        self.explain = explain
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.usual: float | None = None  # their median, renewed every few steps
        self.above = 0

    @property
    def calm(self) -> bool:
        """False while the loss is suspiciously high: such weights should not replace a good checkpoint."""
        return self.above == 0

    def look(self, step: int, loss: float, grad_norm: float, index: Tensor) -> None:
        """Judge one step; raises TrainingDiverged."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient became {grad_norm}"
            self._stop(step, what, index)
        if len(self.losses) >= SETTLED and step % 10 == 0:
            self.usual = median(self.losses)
        if self.usual is not None and 0 < self.usual * EXPLODED < loss:
            self.above += 1
            if self.above >= PATIENCE:
                self._stop(step, f"the loss has been above {EXPLODED:.0f} times its median for {PATIENCE} steps", index)
        else:
            self.above = 0
            self.losses.append(loss)

    def _stop(self, step: int, what: str, index: Tensor) -> None:
        rows = index.detach().cpu().numpy()
        rank, processes = world()
        if processes > 1:
            parts: list[np.ndarray | None] = [None] * processes
            torch.distributed.all_gather_object(parts, rows)
            rows = np.concatenate(parts)
        raise TrainingDiverged(f"training diverged at step {step + 1}: {what}. {self.explain(step, rows)}")

    def state_dict(self) -> dict[str, object]:
        """For the checkpoint."""
        return {"losses": list(self.losses), "above": self.above, "usual": self.usual}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the history of a checkpoint."""
        self.losses = deque(state["losses"], maxlen=HISTORY)
        self.above, self.usual = state["above"], state["usual"]


def describe_images(particles: object, rows: np.ndarray) -> str:
    """A sentence naming the images of a batch by their place in the original stack, the broken ones if there are any.

    ``particles`` is a ParticleSet; ``rows`` are rows of it. The images are read again to look for pixels that are
    not numbers.
    """
    rows = np.unique(rows)
    names = particles.index[rows]
    try:
        images = particles.read(rows)
        broken = names[~np.isfinite(images.reshape(len(rows), -1)).all(1)]
    except Exception:  # the files may be what is wrong: the indices are still worth saying
        broken = names[:0]
    if len(broken):
        return (
            f"Pixels that are not numbers (NaN or Inf) in image {_listed(broken)} of the original stack "
            "(counted from 0): leave them out with --ind, or preprocess again."
        )
    return f"It happened in the batch with the images {_listed(names)} of the original stack (counted from 0)."


def _listed(names: np.ndarray) -> str:
    shown = ", ".join(str(int(name)) for name in names[:NAMED])
    return shown + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
