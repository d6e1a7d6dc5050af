"""Options of CryoHype and the three sets of them: small (CPU), default (GPU), paper (as published)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from cryosuite.errors import InputError

CHOICES = {
    "field": ("complex", "hartley"),
    "pos_embed": ("learned", "sincos", "none"),
    "loss": ("whitened", "mse"),
    "hyper": ("groups", "lowrank"),
    "inr": ("mlp", "triplane"),
    "conditioning": ("hyper", "concat"),
    "volume_from": ("knn", "cluster", "image"),
    "latent": ("pca64", "tokens"),
    "encoder_input": ("hartley", "real"),
    "reading": ("auto", "whole", "halves"),
    "encoder_scale": ("noise", "total", "wiener"),
}
TYPED_AS = {"march_from": "march", "inr_width": "inr-dim", "n_frequencies": "features"}  # where it differs
POSITIVE = ("dim", "depth", "heads", "groups", "inr_width", "inr_layers", "n_frequencies", "knn", "bank")


@dataclass(frozen=True)
class HypeOptions:
    """How CryoHype is built and trained; the defaults are those for a GPU (see ``preset``).

    Lengths in Fourier pixels unless said otherwise; 0 switches an optional thing off.
    """

    dim: int = 768  # width of the transformer
    depth: int = 6  # its blocks
    heads: int = 12
    patch: int = 0  # side of an image patch in pixels; 0: as ``patches`` says
    patches: int = 8  # patches per side of the encoder's image, as nearly as its size allows
    pos_embed: str = "learned"
    groups: int = 32  # weight tokens per hidden layer
    hyper: str = "groups"
    conditioning: str = "hyper"
    inr: str = "mlp"
    inr_width: int = 1024
    inr_layers: int = 4  # hidden layers
    n_frequencies: int = 192
    feat_sigma: float = 0.5  # spread of the random frequencies, in box sizes
    field: str = "complex"
    loss: str = "whitened"
    march_from: float = 0.25  # first r_max, in units of D/2
    march_over: float = 0.4  # fraction of the training until r_max = D/2
    sample_coefficients: bool = False
    sample_fraction: float = 0.4  # of the coefficients, when sampling
    sample_radius: float = 0.25  # everything below this radius (in units of D/2) is always used
    encoder_input: str = "real"
    encoder_scale: str = "noise"
    encoder_rmax: int = 0
    encoder_lowpass: float = 0.0
    encoder_align: bool = True  # undo the known in-plane angle, mirror views of the lower hemisphere
    reading: str = "auto"  # whole, or as two halves of the coefficients, each judged by the other; auto: by the noise
    other_views: float = 0.5  # of images read whole: share whose volume is read in part from their likeness elsewhere
    pose_context: bool = False  # tell the encoder the viewing direction
    window: bool = True
    low_memory: bool = False
    latent: str = "pca64"
    volume_from: str = "knn"
    knn: int = 50
    bank: int = 512

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{flag(name)} {getattr(self, name)}: expected one of {', '.join(allowed)}")
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise InputError(f"{flag(name)} {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.other_views < 1:
            raise InputError(f"--other-views {self.other_views}: expected 0 or more and below 1")
        for name in ("march_from", "sample_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{flag(name)} {getattr(self, name)}: expected above 0 and at most 1")
        for name in ("patch", "encoder_rmax", "encoder_lowpass"):
            if getattr(self, name) < 0:
                raise InputError(f"{flag(name)} {getattr(self, name)}: expected 0 or more")
        if not 0 <= self.march_over <= 1:
            raise InputError(f"--march-over {self.march_over}: expected 0 or more and at most 1")
        if not self.feat_sigma > 0:
            raise InputError(f"--feat-sigma {self.feat_sigma}: expected above 0")
        if self.dim % self.heads:
            raise InputError(f"--heads {self.heads}: must divide the transformer's width (--dim {self.dim})")
        if self.conditioning == "hyper" and self.hyper == "groups" and self.inr_width % self.groups:
            raise InputError(f"--groups {self.groups}: must divide the network's width (--inr-width {self.inr_width})")

    def without_effect(self, names: Iterable[str]) -> dict[str, str]:
        """Those of the options that change nothing beside the others, and why: {"knn": "with --latent tokens"}."""
        idle = [
            (self.conditioning == "concat", "--conditioning concat", ("hyper",)),
            (self.inr == "triplane", "--inr triplane", ("n_frequencies", "feat_sigma")),
            (self.latent == "tokens", "--latent tokens", ("volume_from", "knn")),
            (self.march_from == 1, "--march 1", ("march_over",)),
            (self.reading == "halves", "--reading halves", ("other_views",)),
        ]
        found = {name: f"with {why}" for holds, why, which in idle if holds for name in which}
        return {name: found[name] for name in names if name in found}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> HypeOptions:
        """From the mapping of a config.yaml; names that are not options are left out."""
        known = {field.name for field in fields(HypeOptions)}
        before = {"reading": "whole", "other_views": 0.0}  # what configs written without the option meant
        return HypeOptions(**before | {name: value for name, value in values.items() if name in known})


def flag(name: str) -> str:
    """How an option is typed."""
    return f"--{TYPED_AS.get(name, name).replace('_', '-')}"


@dataclass(frozen=True)
class Preset:
    """Options of the method and what goes with them in training; ``None``: training's own default."""

    options: HypeOptions
    training: dict[str, Any]


PRESETS = {
    "small": Preset(
        HypeOptions(
            dim=128,
            depth=3,
            heads=4,
            patches=4,
            groups=4,
            inr_width=128,
            inr_layers=3,
            n_frequencies=64,
            march_from=0.35,
        ),
        {"lr": 1e-3, "epochs": 40, "batch_size": 64},
    ),
    "default": Preset(HypeOptions(), {"lr": 1e-4, "epochs": 50, "batch_size": 64}),
    "paper": Preset(
        HypeOptions(
            pos_embed="none",
            field="hartley",
            loss="mse",
            march_from=1.0,
            march_over=0.0,
            volume_from="image",
            encoder_input="hartley",
            encoder_align=False,
            reading="whole",
            other_views=0.0,
        ),  # fmt: skip
        {
            "lr": 1e-4,
            "epochs": 50,
            "batch_size": 64,
            "warmup": 0.1,
            "lr_final": 0.0,
            "grad_clip": 0.0,
            "ema": 0.0,
            "precision": "32",
        },  # fmt: skip
    ),
}

# At D = 64 the small network is too narrow for the maps (per-image AUC .34 of .46 possible; .415 with these).
WIDE_ABOVE = 48
WIDE = {"inr_width": 256, "groups": 8, "n_frequencies": 192}


def preset(name: str, gpu: bool, box_size: int | None = None, **changes: Any) -> tuple[str, Preset]:
    """The preset of a name ("auto": small without a GPU, default with one) with some options changed.

    Above 48 pixels the small preset has the volume network of ``WIDE``. Values of ``changes`` that are None leave the
    preset's. Returns the name chosen and the preset. Raises InputError for an unknown name or impossible options.
    """
    if name == "auto":
        name = "default" if gpu else "small"
    if name not in PRESETS:
        raise InputError(f"--preset {name}: expected auto, {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    given = {key: value for key, value in changes.items() if value is not None}
    if name == "small" and (box_size or 0) > WIDE_ABOVE:
        given = WIDE | given
    return name, Preset(replace(chosen.options, **given), dict(chosen.training))
