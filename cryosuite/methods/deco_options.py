"""Options of CryoDECO and the three sets of them: small (CPU), default (GPU), paper (as published)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from cryosuite.errors import InputError

CHOICES = {
    "field": ("complex", "hartley"),
    "loss": ("whitened", "mse"),
    "bn": ("frozen", "train"),
    "poses": ("known", "none"),
    "start": ("voxel", "network"),
    "search": ("exact", "cached"),
    "encoder_input": ("auto", "raw", "flipped", "upright"),
    "cluster": ("gmm-umap16", "gmm-direct", "kmeans"),
    "hand": ("auto", "keep", "flip"),
}
POSITIVE = ("zdim", "width", "layers", "n_frequencies", "starts", "cached_volumes")
TYPED_AS = {
    "width": "dim", "n_frequencies": "features", "search_epochs": "hps-epochs", "research_every": "re-search",
}  # fmt: skip
ZDIMS = (4, 8, 16, 32, 64, 128)  # what --zdim auto chooses between
RANDOM = "random"


@dataclass(frozen=True)
class DecoOptions:
    """How CryoDECO is built and trained; the defaults are those for a GPU (see ``preset``).

    encoder: "iev-tiny", "iev-small", "random", or a weights file. encoder_size: of a random one ("micro", "vit_tiny",
    "vit_small"). encoder_input: raw images (what encoders are pre-trained on), CTF-flipped ones, or those turned
    upright by their known angle; auto: raw for pre-trained encoders, else upright, or flipped where no poses are known
    before the training.
    finetune: "all", "last-N" blocks, "head", or "none" (the latent is the encoder's own feature).
    lr_encoder, lr_poses: relative to the learning rate of the decoder; an encoder that begins from nothing learns as
    fast as the decoder unless told otherwise. A pose moves only when its image is seen, once per epoch, so that its
    rate is much the larger one. classes: volumes of the voxel start.
    march_from, march_over: first radius in units of D/2, fraction of the training until all is used.
    warmup_images, search_epochs: stages of the network start. research_every: epochs between two new searches for
    the images with the worst fit, 0: never. hold_poses: fraction of the training in which poses that were given or
    found beforehand stay as they are: a network that has learnt nothing yet would only lead them astray. search: in the
    network's own volume of every particle, or "cached", in those of ``cached_volumes`` centres of the latents.
    """

    encoder: str = "iev-small"
    encoder_size: str = "vit_tiny"
    encoder_input: str = "auto"
    finetune: str = "all"
    bn: str = "frozen"
    zdim: int = 128
    zdim_auto: bool = False  # choose it between ZDIMS before training
    width: int = 256
    layers: int = 3
    n_frequencies: int = 192
    feat_sigma: float = 1.0  # spread of the random frequencies, in units of D/2 (0.5 as published)
    layer_norm: bool = True
    field: str = "complex"
    loss: str = "whitened"
    window: bool = True
    march_from: float = 0.35
    march_over: float = 0.4
    lr_encoder: float = 0.1
    lr_poses: float = 50.0
    poses: str = "known"
    refine_poses: bool = False
    start: str = "voxel"
    classes: int = 1
    starts: int = 4
    warmup_images: int = 10000
    search_epochs: int = 2
    hold_poses: float = 0.5
    research_every: int = 0
    research_share: float = 0.05
    shift_extent: float = 0.1
    search: str = "exact"
    cached_volumes: int = 64
    cluster: str = "gmm-umap16"
    k: int = 0  # 0: chosen by BIC
    settle: bool = True  # let the images choose their classes anew, by half maps they are not part of
    hand: str = "auto"
    low_memory: bool = False

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{flag(name)} {getattr(self, name)}: expected one of {', '.join(allowed)}")
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise InputError(f"{flag(name)} {getattr(self, name)}: expected 1 or more")
        if self.finetune not in ("all", "head", "none") and not re.fullmatch(r"last-[1-9]\d*", self.finetune):
            raise InputError(f"--finetune {self.finetune}: expected all, last-3 (or another number), head or none")
        if self.classes < 1 or self.k < 0:
            raise InputError(f"--classes {self.classes}, --k {self.k}: expected 1 or more (k: 0 or auto to choose)")
        if not 0 < self.march_from <= 1:
            raise InputError(f"--march {self.march_from}: expected above 0 and at most 1")
        if not 0 <= self.march_over <= 1:
            raise InputError(f"--march-over {self.march_over}: expected 0 or more and at most 1")
        for name in ("lr_encoder", "lr_poses"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{flag(name)} {getattr(self, name)}: expected 0 or more")
        if not self.feat_sigma > 0:
            raise InputError(f"--feat-sigma {self.feat_sigma}: expected above 0")
        if not 0 < self.shift_extent <= 0.5:
            raise InputError(f"--shift-extent {self.shift_extent}: a fraction of the box, above 0 and at most 0.5")
        if not 0 <= self.hold_poses <= 1:
            raise InputError(f"--hold-poses {self.hold_poses}: a fraction between 0 and 1")
        if not 0 < self.research_share <= 1:
            raise InputError(f"--research-share {self.research_share}: expected above 0 and at most 1")
        if self.search == "cached" and not self.searches:
            raise InputError(
                "--search cached: no pose is searched for with the network here; it needs --start network (and "
                "--ab-initio) or --re-search"
            )
        for name in ("warmup_images", "search_epochs", "research_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{flag(name)} {getattr(self, name)}: expected 0 or more")

    @property
    def table(self) -> bool:
        """Whether poses are learnt: a table of rotations and shifts is part of the model."""
        return self.poses == "none" or self.refine_poses

    @property
    def searches(self) -> bool:
        """Whether poses are ever searched for in the network's volumes."""
        return self.table and (self.poses == "none" and self.start == "network" or self.research_every > 0)

    @property
    def seen(self) -> str:
        """What the encoder sees: raw, flipped or upright."""
        if self.encoder_input != "auto":
            return self.encoder_input
        if self.encoder != RANDOM:
            return "raw"
        return "flipped" if self.poses == "none" and self.start == "network" else "upright"

    @property
    def trained_blocks(self) -> int | None:
        """Number of last encoder blocks that are trained; None: all of the encoder; 0: none."""
        if self.finetune == "all":
            return None
        return int(self.finetune.partition("-")[2]) if self.finetune.startswith("last") else 0

    def without_effect(self, names: Iterable[str]) -> dict[str, str]:
        """Those of the options that change nothing beside the others, and why: {"bn": "with --encoder random"}."""
        known, network = self.poses == "known", self.start == "network"
        idle = [
            (known, "known poses", ("start", "starts", "classes", "hand")),
            (known and not self.refine_poses, "--fixed-poses", ("lr_poses", "hold_poses", "research_every")),
            (known and not self.searches, "poses that are not searched for", ("shift_extent",)),
            (not known, "poses that are found, which are always refined", ("refine_poses",)),
            (not known and network, "--start network", ("starts", "classes", "hand", "hold_poses")),
            (self.encoder != RANDOM, f"--encoder {self.encoder}", ("encoder_size",)),
            (self.encoder == RANDOM, "--encoder random", ("bn",)),
            (self.trained_blocks == 0, f"--finetune {self.finetune}", ("lr_encoder", "bn")),
            (self.finetune == "none", "--finetune none", ("zdim",)),
            (self.march_from == 1, "--march 1", ("march_over",)),
        ]  # fmt: skip
        found = {name: f"with {why}" for holds, why, which in reversed(idle) if holds for name in which}
        return {name: found[name] for name in names if name in found}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DecoOptions:
        """From the mapping of a config.yaml; names that are not options are left out."""
        known = {field.name for field in fields(DecoOptions)}
        return DecoOptions(**{name: value for name, value in values.items() if name in known})

    def changed(self, **changes: Any) -> DecoOptions:
        """These options with some replaced."""
        return replace(self, **changes)


def flag(name: str) -> str:
    """How an option is typed."""
    return f"--{TYPED_AS.get(name, name).replace('_', '-')}"


@dataclass(frozen=True)
class Preset:
    """Options of the method and what goes with them in training; missing: training's own default."""

    options: DecoOptions
    training: dict[str, Any]


PRESETS = {
    "small": Preset(
        DecoOptions(
            # in equal CPU time (40 s, 16 molecules) 10-NN .58 from nothing, upright; .20 with iev-tiny fine-tuned, raw
            encoder=RANDOM,
            encoder_size="micro",
            width=128,
            n_frequencies=64,
            layer_norm=False,  # on 16 molecules 10-NN .89 after 8 epochs; with norms .85, and a fifth slower
            lr_encoder=1.0,
            # two molecules at SNR 0.1, poses off by 2.6 degrees and 0.59 px (median): after 16 epochs 1.9 and 0.19, 2.0
            # and 0.32; with 30 1.8 and 0.14, 2.2 and 0.18; with 100 all are lost (8.6 and 1.0)
            lr_poses=10.0,
        ),
        {"lr": 1e-3, "epochs": 40, "batch_size": 64},
    ),
    "default": Preset(DecoOptions(), {"lr": 1e-4, "epochs": 50, "batch_size": 192}),
    "paper": Preset(
        DecoOptions(
            field="hartley",
            feat_sigma=0.5,
            loss="mse",
            bn="train",
            march_from=1.0,
            march_over=0.0,
            lr_encoder=0.6,
            # the published Adam of the whole table (1e-4) moves a row on between its visits: 20 times as far in all
            lr_poses=20.0,
            start="network",
            encoder_input="raw",
            settle=False,
        ),
        {"lr": 1e-4, "epochs": 100, "batch_size": 192, "warmup": 0.01, "lr_final": 0.16, "weight_decay": 0.01,
         "grad_clip": 0.0, "ema": 0.0},
    ),
}  # fmt: skip


PRE_TRAINED = {"lr_encoder": 0.3}  # where the preset's own encoder is not
FROM_NOTHING = {"lr_encoder": 1.0}  # on 16 molecules ARI .64 after 8 epochs; with 0.3 not much more after 20


def preset(name: str, gpu: bool, **changes: Any) -> tuple[str, Preset]:
    """The preset of a name ("auto": small without a GPU, default with one) with some options changed.

    Values of ``changes`` that are None leave the preset's. Returns the name chosen and the preset. Raises InputError
    for an unknown name or impossible options.
    """
    if name == "auto":
        name = "default" if gpu else "small"
    if name not in PRESETS:
        raise InputError(f"--preset {name}: expected auto, {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    given = {key: value for key, value in changes.items() if value is not None}
    if given.get("encoder", chosen.options.encoder) == RANDOM:
        given = FROM_NOTHING | given
    elif chosen.options.encoder == RANDOM:
        given = PRE_TRAINED | given
    return name, Preset(chosen.options.changed(**given), dict(chosen.training))
