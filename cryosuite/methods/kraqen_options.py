"""Options of CryoKRAQEN and the sets of them: compositional (voxel field), conformational (tri-plane), paper."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from cryosuite.errors import InputError

CHOICES = {
    "field": ("voxel", "triplane", "fourier"),
    "assign": ("likelihood", "zcos", "kernel"),
    "kernel": ("epanechnikov", "gaussian", "none"),
    "init": ("random", "kmeans"),
    "loss": ("l2", "l1", "huber"),
    "blend": ("blended", "em"),
    "anneal": ("geometric", "paper"),
    "merge": ("auto", "overlap", "likelihood", "correlation", "none"),
    "m_step": ("local", "wiener"),
}
TYPED_AS = {"march_from": "march"}  # on the command line, where it differs
# name -> (least, most); ABOVE_0: zero itself is refused
RANGES = {
    "n_codes": (0, None), "n_states": (0, None), "anneal_over": (0, 1), "balance": (0, None), "iterations": (1, None),
    "prior": (0, None), "start_images": (1, None), "images_per_code": (1, None), "march_from": (0, 1),
    "march_over": (0, 1), "sparse": (0, 0.5), "rank": (0, None), "channels": (0, None), "plane_size": (0, None),
    "levels": (1, None), "features": (0, None), "feat_sigma": (0, None), "width": (1, None), "layers": (1, None),
    "em_last": (0, 1), "beta": (0, None), "margin": (0, None), "alignment": (0, None), "jitter": (0, None),
    "fast": (0, None), "em_finish": (0, None),
}  # fmt: skip
ABOVE_0 = ("anneal_over", "prior", "march_from", "feat_sigma", "fast")
# what an option needs to have any effect: its values of another option
ONLY_WITH: dict[str, dict[str, tuple[Any, ...]]] = {
    "kernel": {"assign": ("kernel",)},
    "channels": {"field": ("triplane",)}, "plane_size": {"field": ("triplane",)}, "levels": {"field": ("triplane",)},
    "iterations": {"field": ("voxel",)},
    **{
        name: {"field": ("triplane", "fourier")}
        for name in ("rank", "features", "feat_sigma", "width", "layers", "init", "loss", "blend", "em_last", "beta",
                     "margin", "alignment", "jitter", "straight_through", "fast", "em_finish")
    },
}  # fmt: skip


@dataclass(frozen=True)
class KraqenOptions:
    """How CryoKRAQEN is built and trained; the defaults are those of the voxel field for mixtures.

    Temperatures in units of the Bayes temperature T* estimated from the data; 0 switches an optional thing off.
    """

    field: str = "voxel"
    n_codes: int = 0  # K; 0: 1.5 x n_states, or 32
    n_states: int = 0  # what the user expects: for K, and the fewest codes that merge "overlap" leaves
    # assignment
    assign: str = "likelihood"
    kernel: str = "epanechnikov"  # only with assign="kernel"
    t_max: float = 1.0
    t_min: float = 1.0
    anneal: str = "geometric"
    anneal_over: float = 0.8
    balance: float = 0.5
    split: bool = True
    merge: str = "auto"  # what tells twins; "overlap" with m_step "local", else "likelihood"
    m_step: str = "local"  # held-out scores by half maps filtered as in polish; "wiener": maps of all images
    sparse: float = 1e-3  # responsibilities below are dropped
    refine_shifts: bool = True  # where shifts are measurably wrong
    # voxel field
    iterations: int = 16
    prior: float = 0.15  # f of the pooled Wiener filter
    cluster_box: int = 0  # box in which codes are told apart; 0: min(D, 32), the last iterations min(D, 64)
    start_images: int = 1200
    images_per_code: int = 50  # of the first subset
    march_from: float = 0.5  # first r_max, in units of D/2
    march_over: float = 0.5  # fraction of the run until r_max = D/2
    # network fields
    rank: int = 0  # M; 0: min(K, 64)
    channels: int = 32  # per plane
    plane_size: int = 0  # 0: D + 1
    levels: int = 2  # planes at R and R/4
    features: int = 64  # random Fourier features beside the planes
    feat_sigma: float = 0.18  # spread of their positions, in box sizes
    width: int = 256
    layers: int = 3
    init: str = "random"
    loss: str = "l2"
    blend: str = "blended"
    em_last: float = 0.1  # last part of the training with the EM loss
    beta: float = 0.0  # of the triplet loss
    margin: float = 0.1
    alignment: float = 0.25
    jitter: float = 0.01
    straight_through: bool = False
    fast: float = 5.0  # learning rate of planes and codes, in units of the network's
    em_finish: int = 6  # closed-form iterations after a network

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: expected one of {', '.join(allowed)}"
                )
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            strict = name in ABOVE_0
            good = (value > least if strict else value >= least) and (most is None or value <= most)
            if not good:
                expected = f"{'above' if strict else 'at least'} {least}" + (f", at most {most}" if most else "")
                raise InputError(f"--{TYPED_AS.get(name, name).replace('_', '-')} {value}: expected {expected}")
        if self.cluster_box and (self.cluster_box < 8 or self.cluster_box % 2):
            raise InputError(f"--cluster-box {self.cluster_box}: an even number of pixels, at least 8, is needed")
        if self.field == "fourier" and not self.features:
            raise InputError("--features 0: a Fourier field has nothing else to see by")
        if self.field == "triplane" and not self.channels:
            raise InputError("--channels 0: planes without channels; a field without planes is --field fourier")
        if not 0 < self.t_min <= self.t_max:
            raise InputError(f"--t-min {self.t_min}, --t-max {self.t_max}: expected 0 < t-min <= t-max")

    @property
    def codes(self) -> int:
        """K: as given, else 1.5 x the expected states, else 32."""
        return self.n_codes or (round(1.5 * self.n_states) if self.n_states else 32)

    def without_effect(self, names: Iterable[str]) -> dict[str, str]:
        """Those of the options that change nothing beside the others, and why: {"width": "with --field voxel"}."""
        out = {}
        for name in names:
            for other, values in ONLY_WITH.get(name, {}).items():
                if getattr(self, other) not in values:
                    out[name] = f"with --{other} {getattr(self, other)}"
        if self.m_step == "wiener" and self.field == "voxel" and "refine_shifts" in names:
            out["refine_shifts"] = "with --m-step wiener"
        if self.m_step == "local":
            idle = ("prior", "march_from", "march_over", "balance") if self.field == "voxel" else ("prior",)
            out |= {name: "with --m-step local" for name in idle if name in names}
        if not self.beta and self.field != "voxel":
            out |= {name: "with --beta 0" for name in ("margin", "alignment") if name in names}
        if self.t_max == self.t_min and "anneal" in names:
            out["anneal"] = f"with --t-max {self.t_max:g}"
        if self.march_from == 1 and "march_over" in names:
            out.setdefault("march_over", "with --march 1")
        if self.blend == "em" and "em_last" in names:
            out.setdefault("em_last", "with --blend em")
        floor = self.merge == "overlap" or (self.merge == "auto" and self.m_step == "local")  # what n_states is there
        if self.n_codes and not floor and "n_states" in names:
            out["n_states"] = f"with --n-codes {self.n_codes}"
        return out

    @staticmethod
    def from_dict(values: dict[str, Any]) -> KraqenOptions:
        """From the mapping of a config.yaml; names that are not options are left out. Runs that say nothing of shifts
        were begun before these could be refined."""
        known = {field.name for field in fields(KraqenOptions)}
        values = {"refine_shifts": False} | values
        return KraqenOptions(**{name: value for name, value in values.items() if name in known})

    def changed(self, **changes: Any) -> KraqenOptions:
        """These options with some replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Preset:
    """Options of the method and what goes with them in the training of a network field."""

    options: KraqenOptions
    training: dict[str, Any]


_NETWORK = {"lr": 2e-3, "epochs": 20, "batch_size": 100, "warmup": 0.0, "lr_final": 0.1, "grad_clip": 0.0}

PRESETS = {
    "compositional": Preset(KraqenOptions(), _NETWORK),
    "conformational": Preset(KraqenOptions(field="triplane", n_codes=32, rank=8, merge="none"), _NETWORK),
    # the paper gives no K, M, margins or temperatures: these are ours
    "paper": Preset(
        KraqenOptions(
            field="triplane", n_codes=100, rank=50, channels=64, levels=1, features=0, width=1024, layers=3,
            assign="kernel", kernel="epanechnikov", t_max=13.0, t_min=1.3, anneal="paper", anneal_over=1.0,
            balance=0.0, split=False, beta=0.05, margin=0.1, loss="l1", em_last=0.0, jitter=0.0, em_finish=0,
            march_from=1.0, merge="none", fast=1.0, refine_shifts=False,
        ),
        {"lr": 1e-4, "epochs": 50, "batch_size": 32, "warmup": 0.0, "lr_final": 1.0, "grad_clip": 0.0, "ema": 0.0,
         "precision": "32"},
    ),
}  # fmt: skip


def preset(name: str, box_size: int = 0, gpu: bool = False, **changes: Any) -> tuple[str, Preset]:
    """The preset of a name with some options changed ("auto" is compositional); None in ``changes`` leaves a value.

    Without a GPU the networks of our own presets are small (planes of 8 channels, 2 x 64), as good as larger ones in
    equal time there. The paper's plane size is D/2.

    Raises:
        InputError: unknown name, impossible options.
    """
    name = "compositional" if name == "auto" else name
    if name not in PRESETS:
        raise InputError(f"--preset {name}: expected auto, {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    given = {key: value for key, value in changes.items() if value is not None}
    if name == "paper":
        given = {"plane_size": box_size // 2} | given
        if given.get("field") == "fourier":
            given = {"features": 64} | given  # the preset has planes only
    elif not gpu:
        given = {"channels": 8, "features": 32, "width": 64, "layers": 2} | given
    return name, Preset(chosen.options.changed(**given), dict(chosen.training))
