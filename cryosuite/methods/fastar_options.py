"""Options of pose prediction's training: what is simulated, how it is judged, and the presets micro to small64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from cryosuite.errors import InputError
from cryosuite.simulate.view_sets import ViewOptions

NAMES = ("micro", "nano64", "tiny64", "small64")
MODES = ("target", "ab-initio")
HANDS = ("min", "anchor", "none")
HELD_OUT = 900_001  # seed of the molecules that are never trained on
STRUCTURES_SHARE = 0.5  # of the molecules, where structures and phantoms are both trained on


@dataclass(frozen=True)
class FastarOptions:
    """How the network is built and trained.

    preset: the network's shape. mode: "target" (poses against a known molecule) or "ab-initio" (relative to one of the
    images). structures: "phantom", a folder or list of atomic models, or "both:" and that; hold_out: how many of them
    (or which, by name) are kept to test on. views, templates, snr, curriculum, ctf ...: see ``ViewOptions``. hand_loss:
    which hand of a set the loss is taken with (ab-initio). match_deg: how sharply an image is to be told from
    projections at other rotations (target). map_weight: of the planar map that is predicted against the templates
    (target; 0: that half of the network is left untrained, which matching does without); with it grid_order, cell_deg,
    cell_weight: the cells of SO(3) it scores, the blur of the truth over them, the weight of that loss.
    steady: steps with plain squared errors before confidence counts. map: train on this one molecule.
    """

    preset: str = "nano64"
    mode: str = "target"
    structures: str = "phantom"
    hold_out: str = "6"
    map: str | None = None
    full_map: bool = False
    finetune: str | None = None
    start: str | None = None
    views: tuple[int, int] = (64, 64)
    templates: int = 48
    hard: int = 1
    beads: int = 96
    curriculum: int = 20_000_000
    snr: tuple[float, float] = (10.0, 0.1)
    ctf: float = 0.8
    coloured: float = 0.5
    shift: float = 0.08
    cones: float = 0.25
    neighbours: float = 0.2
    junk: float = 0.0
    symmetric: float = 0.1
    hand_loss: str = "min"
    grid_order: int = 2
    cell_deg: float = 12.0
    match_deg: float = 8.0
    map_weight: float = 0.0
    cell_weight: float = 0.5
    steady: int = 300

    def __post_init__(self) -> None:
        for name in ("views", "snr"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._need("preset", self.preset in NAMES, f"one of {', '.join(NAMES)}")
        self._need("mode", self.mode in MODES, f"one of {', '.join(MODES)}")
        self._need("hand_loss", self.hand_loss in HANDS, f"one of {', '.join(HANDS)}")
        low, high = self.views
        least = 3 if self.mode == "ab-initio" else 1  # two views of an unknown molecule share one line only
        self._need("views", least <= low <= high <= 256, f"such as 8 or 3:32, from {least} to 256, the smaller first")
        self._need("snr", self.snr[0] >= self.snr[1] > 0, "such as 10:0.1, the higher first, above 0")
        self._need("templates", 4 <= self.templates <= 96, "4 to 96")
        self._need("hard", 0 <= self.hard <= 8, "0 to 8")
        self._need("beads", self.beads >= 24 and self.beads % 12 == 0, "a multiple of 12, at least 24")
        for name in ("ctf", "coloured", "cones", "neighbours", "junk", "symmetric"):
            self._need(name, 0 <= getattr(self, name) <= 1, "a share between 0 and 1")
        self._need("shift", 0 <= self.shift <= 0.25, "a fraction of the box, 0 to 0.25")
        self._need("curriculum", self.curriculum >= 1, "1 or more images")
        self._need("grid_order", 1 <= self.grid_order <= 3, "1 to 3")
        for name in ("cell_deg", "match_deg"):
            self._need(name, getattr(self, name) > 0, "above 0 degrees")
        for name in ("cell_weight", "map_weight"):
            self._need(name, getattr(self, name) >= 0, "0 or more")
        if self.mode == "ab-initio" and (self.map or self.finetune):
            raise InputError("--map and --finetune go with --mode target: in ab-initio mode no molecule is known")

    def _need(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}")

    def without_effect(self, names: set[str]) -> dict[str, str]:
        """Those of the options ``names`` that change nothing beside the others, and why."""
        if self.mode == "ab-initio":
            idle = dict.fromkeys(("hard", "map_weight", "templates"), "with --mode ab-initio")
        else:
            idle = dict.fromkeys(("junk", "hand_loss"), "with --mode target")
            if not self.map_weight:
                idle["templates"] = "without --map-weight"
        if not self.map:
            idle["full_map"] = "without --map"
        else:
            idle |= dict.fromkeys(("structures", "hold_out"), "with --map: that one molecule is learnt")
        if self.structures == "phantom":
            idle.setdefault("hold_out", "without --structures: phantoms to test on are made anyway")
        if self.finetune:
            steady = ("curriculum",) if self.views[0] == self.views[1] else ()  # it also is that of the views
            idle |= dict.fromkeys(("snr", "ctf", "shift", *steady), "with --finetune: images are as they are")
        return {name: idle[name] for name in names if name in idle}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> FastarOptions:
        """From the mapping of a config.yaml; names that are not options are left out."""
        known = {field.name for field in fields(FastarOptions)}
        return FastarOptions(**{name: value for name, value in values.items() if name in known})

    def view_options(self, size: int, images: int, structures: bool) -> ViewOptions:
        """What a batch of ``images`` (of one process) holds."""
        target = self.mode == "target"
        return ViewOptions(
            size=size, images=images, views=self.views, templates=self.templates if target and self.map_weight else 0,
            hard=self.hard if target else -1, beads=self.beads,
            curriculum=self.curriculum, snr=self.snr, ctf=self.ctf,
            coloured=self.coloured, shift=self.shift, cones=self.cones, neighbours=self.neighbours,
            junk=0.0 if target else self.junk, symmetric=self.symmetric if target else 0.0,
            structures=self._share() if structures else 0.0,
        )  # fmt: skip

    def _share(self) -> float:
        return STRUCTURES_SHARE if self.structures.startswith("both:") else 1.0


@dataclass(frozen=True)
class Preset:
    """Options of the method, and what goes with them in training."""

    options: FastarOptions
    training: dict[str, Any]
    images: int  # seen in all


_TRAINING = {"weight_decay": 0.05, "betas": (0.9, 0.95), "ema": 0.999, "grad_clip": 1.0}
PRESETS = {
    "micro": Preset(
        FastarOptions("micro", curriculum=200_000, snr=(10.0, 0.15)),
        _TRAINING | {"batch_size": 64, "lr": 1e-3},
        900_000,
    ),
    "nano64": Preset(FastarOptions("nano64"), _TRAINING | {"batch_size": 1024, "lr": 5e-4}, 40_000_000),
    "tiny64": Preset(FastarOptions("tiny64"), _TRAINING | {"batch_size": 1024, "lr": 3e-4}, 40_000_000),
    "small64": Preset(FastarOptions("small64"), _TRAINING | {"batch_size": 1024, "lr": 3e-4}, 40_000_000),
}
AB_INITIO = {"views": (3, 32), "junk": 0.1, "symmetric": 0.0}  # what differs where the user says nothing


def preset(name: str, **changes: Any) -> Preset:
    """The preset of a name with some options changed; values of ``changes`` that are None leave the preset's.

    Raises InputError for an unknown name or impossible options.
    """
    if name not in PRESETS:
        raise InputError(f"--preset {name}: expected one of {', '.join(PRESETS)}")
    chosen = PRESETS[name]
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes.get("mode") == "ab-initio":
        changes = AB_INITIO | changes
    return replace(chosen, options=replace(chosen.options, **changes))
