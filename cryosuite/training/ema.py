"""Exponential moving average of the weights: what is encoded and decoded with is smoother than what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """A running average of all floating-point parameters of a model.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the first steps do not cling to the random start.
    Buffers (tables among them, see table.py) are taken from the model as they are. ``decay = 0`` keeps no copy and
    every method is free.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        named = [(n, p) for n, p in model.named_parameters() if p.is_floating_point()]
        named = named if decay > 0 else []
        self.names = [name for name, _ in named]
        self.live = [parameter for _, parameter in named]
        self.average = [parameter.detach().clone() for parameter in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimiser step."""
        if not self.average:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.average, [p.detach() for p in self.live], 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside the block the model's parameters are the averages; outside exactly what they were."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def apply(self) -> None:
        """Put the averages into the model for good."""
        self._exchange()

    def state_dict(self) -> dict[str, object]:
        """For the checkpoint."""
        return {"updates": self.updates, "average": dict(zip(self.names, self.average, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take the averages of a checkpoint."""
        self.updates = int(state["updates"])
        stored: dict[str, Tensor] = state["average"]
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(stored[name])

    def _exchange(self) -> None:
        for index, parameter in enumerate(self.live):
            parameter.data, self.average[index] = self.average[index], parameter.data
