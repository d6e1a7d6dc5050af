"""The options of a training that are the same for every method."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cryosuite.errors import InputError

PRECISIONS = ("auto", "32", "bf16")
ACCELERATORS = ("auto", "cpu", "gpu")

# May be changed between a run and its continuation: they decide where and how long it runs, not what it computes.
FREE_ON_RESUME = frozenset(
    ("epochs", "accelerator", "devices", "num_nodes", "micro_batches", "compile")
    + ("checkpoint_every_minutes", "save_every", "log_every", "max_minutes", "requeue")
)


@dataclass(frozen=True)
class TrainOptions:
    """How to train. ``batch_size`` is global: it is shared out over all devices.

    ``warmup`` is a fraction of all steps, ``lr_final`` a fraction of ``lr``; ``ema = 0`` and ``grad_clip = 0`` switch
    those off. ``micro_batches`` splits every batch into so many pieces whose gradients are summed: less memory, the
    same training. ``requeue`` puts a SLURM job back into the queue after SIGUSR1 (see signals.py).

    Raises InputError where a value makes no sense.
    """

    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-4
    warmup: float = 0.05
    lr_final: float = 0.01
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    ema: float = 0.999
    precision: str = "auto"
    seed: int = 0
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    micro_batches: int = 1
    compile: bool = False
    checkpoint_every_minutes: float = 10.0
    save_every: int = 1
    log_every: int = 50
    max_minutes: float | None = None
    requeue: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        for name in ("epochs", "batch_size", "devices", "num_nodes", "micro_batches", "save_every", "log_every"):
            self._need(name, getattr(self, name) >= 1, "a whole number of at least 1")
        self._need("lr", self.lr > 0, "above 0, for example 1e-4")
        for name in ("warmup", "lr_final"):
            self._need(name, 0 <= getattr(self, name) <= 1, "a fraction between 0 and 1")
        self._need("weight_decay", self.weight_decay >= 0, "0 or more")
        self._need("grad_clip", self.grad_clip >= 0, "0 (no clipping) or more")
        self._need("ema", 0 <= self.ema < 1, "0 (off) or a decay below 1, for example 0.999")
        self._need("seed", 0 <= self.seed < 1 << 63, "a whole number of at least 0")
        self._need("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        self._need("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        self._need("accelerator", self.accelerator in ACCELERATORS, f"one of {', '.join(ACCELERATORS)}")
        self._need("checkpoint_every_minutes", self.checkpoint_every_minutes >= 0, "0 (every step) or more minutes")
        self._need("max_minutes", self.max_minutes is None or self.max_minutes > 0, "more than 0 minutes")

    def _need(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}")


def plain(value: Any) -> Any:
    """``value`` as numbers, strings, lists and dicts only: fit for YAML, JSON and a weights_only checkpoint."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return str(value)
