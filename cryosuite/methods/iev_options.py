"""Options of the particle encoder's training (MoCo v3 on particle images) and the presets tiny, default and paper."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from cryosuite.errors import InputError

SIZES = ("vit_tiny", "vit_small", "vit_base")
AUGMENTATIONS = ("rotate", "flip", "shift", "crop", "blur", "noise", "contrast", "defocus", "sign")
DEFAULT_AUG = ("rotate", "flip", "shift", "crop", "blur", "noise", "contrast", "defocus")
POSITIVES = ("augment", "same-view", "same-structure", "mixed")
CHOICES = {
    "size": SIZES,
    "norm2": ("bn", "ln"),
    "prep": ("ief", "robust", "standard"),
    "positives": POSITIVES,
    "patch_start": ("random", "smooth"),
}


@dataclass(frozen=True)
class IevOptions:
    """How the encoder is built and trained.

    aug: names in AUGMENTATIONS, drawn anew for each of the two views of an image. positives: what the two views of a
    simulated particle share: one image (augment), molecule and pose under another CTF and noise (same-view), the
    molecule only (same-structure), or one or the other for half of the pairs each (mixed). keep: share of the patches
    that the encoder is shown in training, all of them in the last tenth (Li et al. 2023 call it FLIP; not seen to
    help in short trainings). guide: weight of a second loss on simulated particles: a linear map of the features must
    tell the rings of the clean picture (simulate.pool.ring_shapes); meant for short trainings (tried, not ablated).
    """

    size: str = "vit_small"
    norm2: str = "bn"  # bn is what the released files have; ln for small batches
    prep: str = "standard"
    tau: float = 0.2
    momentum: float = 0.99
    m_cos: bool = True  # momentum rises to 1 along a cosine
    hidden: int = 4096  # of projector and predictor
    out: int = 256
    patch_start: str = "random"  # smooth: cosine patterns of falling gain (nets.moco.smooth_patches)
    train_patch: bool = False  # the patch projection stays random, as MoCo v3 found to be stable
    aug: tuple[str, ...] = DEFAULT_AUG
    positives: str = "same-view"
    circle: bool = True
    keep: float = 1.0
    guide: float = 0.0
    low_memory: bool = False
    chunk: int = 0  # images through the encoder at once (norm2 ln only); 0: all

    def __post_init__(self) -> None:
        object.__setattr__(self, "aug", tuple(self.aug))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: expected one of {', '.join(allowed)}"
                )
        unknown = [name for name in self.aug if name not in AUGMENTATIONS]
        if unknown:
            raise InputError(
                f"--aug: unknown {', '.join(unknown)}; there are {', '.join(AUGMENTATIONS)}, and none for no change"
            )
        if not self.tau > 0:
            raise InputError(f"--tau {self.tau}: expected above 0, for example 0.2")
        if not 0 <= self.momentum < 1:
            raise InputError(f"--momentum {self.momentum}: expected 0 or more and below 1, for example 0.99")
        if not 0 < self.keep <= 1:
            raise InputError(f"--keep {self.keep}: expected above 0 and at most 1, the share of patches shown")
        if self.guide < 0:
            raise InputError(f"--guide {self.guide}: expected 0 or more")
        if self.hidden < 1:
            raise InputError(f"--hidden {self.hidden}: expected 1 or more")
        if self.out < 1 or self.chunk < 0:
            raise InputError(f"out {self.out}, chunk {self.chunk}: expected 1 or more, and 0 or more")
        if self.chunk and self.norm2 == "bn":
            raise InputError("--chunk needs --norm2 ln: a batch norm must see the whole batch at once")

    @staticmethod
    def from_dict(values: dict[str, Any]) -> IevOptions:
        """From the mapping of a config.yaml; names that are not options are left out."""
        known = {field.name for field in fields(IevOptions)}
        return IevOptions(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class Preset:
    """Options of the method, and what goes with them in training; ``lr`` is for a batch of 256 and scales with it."""

    options: IevOptions
    training: dict[str, Any]
    lr_256: float
    images: int  # seen in all


PRESETS = {
    "tiny": Preset(
        IevOptions(
            size="vit_tiny",
            norm2="ln",
            hidden=1024,
            out=128,
            chunk=32,
            patch_start="smooth",
            guide=1.0,
        ),
        {"batch_size": 32, "weight_decay": 0.1, "warmup": 0.05},
        8e-3,
        100_000,
    ),
    "default": Preset(IevOptions(), {"batch_size": 512, "weight_decay": 0.1, "warmup": 0.05}, 1.5e-4, 10_000_000),
    "paper": Preset(
        IevOptions(tau=0.5, m_cos=False, prep="ief", aug=("flip", "crop", "blur"), positives="augment"),
        {"batch_size": 2048, "weight_decay": 0.1, "warmup": 0.05},
        1.5e-4,
        100_000_000,
    ),
}


def preset(name: str, gpu: bool, **changes: Any) -> tuple[str, Preset]:
    """The preset of a name ("auto": default with a GPU, tiny without) with some options changed.

    Values of ``changes`` that are None leave the preset's. A batch-norm size asked of the tiny preset drops its chunks.
    Raises InputError for an unknown name or impossible options.
    """
    name = ("default" if gpu else "tiny") if name == "auto" else name
    if name not in PRESETS:
        raise InputError(f"--preset {name}: expected one of auto, {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes.get("norm2") == "bn":
        changes.setdefault("chunk", 0)
    return name, replace(chosen, options=replace(chosen.options, **changes))
