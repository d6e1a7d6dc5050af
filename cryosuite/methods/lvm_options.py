"""Options of the map networks' trainings: what is simulated, how the network is built, what is minimised."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from torch import nn

from cryosuite.data.map_weights import TASKS
from cryosuite.errors import InputError
from cryosuite.kernels.map_norm import NORMS
from cryosuite.kernels.map_spectrum import SPECTRA
from cryosuite.nets.jepa import MASK_AT, PredictorSpec
from cryosuite.nets.map_vit import VIT_SPECS, MapVit, MapVitSpec
from cryosuite.nets.scunet import SPECS, TOKEN, Scunet, ScunetSpec

NETS = ("scunet", "vit")
SIZES = tuple(SPECS)
OBJECTIVES = ("jepa", "mae")
MASK_MODES = ("multiblock", "random")
HIST_MASKS = ("union", "whole")
SCHEDULES = ("cosine", "flat")
SMALLEST_CROP = 24  # three tokens per edge: on 2^3 oneDNN's bfloat16 gradient of a convolution reads foreign memory


@dataclass(frozen=True)
class LvmOptions:
    """What both trainings have in common.

    net, spec: which network and the fields of its spec (see ``net_spec``). structures: "phantom", atomic models (a
    folder, a file), or "both:" and that; hold_out: how many of them (or which, by name) are kept to test on. maps,
    pairs: of the user. crop: voxels per edge of what the network sees; volume: of what is simulated at once, from which
    crops_per_volume crops are cut; mix: so many volumes are shuffled together. norm: of the grey values. resolution: A,
    between what the maps' is drawn; noise_only, clean: chances of a volume of noise with an empty target, and of one as
    good as its target; None leaves the task's own. schedule: of the learning rate; "flat" falls in the
    last fifth only, so that a training can be made longer on the way.
    """

    net: str = "scunet"
    spec: dict[str, Any] = field(default_factory=lambda: asdict(SPECS["small"]))
    structures: str = "phantom"
    hold_out: str = "6"
    maps: tuple[str, ...] = ()
    pairs: str | None = None
    crop: int = 32
    volume: int = 96
    crops_per_volume: int = 16
    mix: int = 4
    norm: str = "robust"
    resolution: tuple[float, float] | None = None
    noise_only: float | None = None
    clean: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "maps", tuple(self.maps))
        if self.resolution is not None:
            object.__setattr__(self, "resolution", tuple(float(value) for value in self.resolution))
            low, high = self.resolution
            self._need("resolution", 0 < low <= high, "such as 2.5:8, the finer first, in A")
        self._need("net", self.net in NETS, f"one of {', '.join(NETS)}")
        fits = self.crop >= SMALLEST_CROP and self.crop % TOKEN == 0
        self._need("crop", fits, f"a multiple of {TOKEN} from {SMALLEST_CROP}, such as 32 or 48")
        self._need("volume", self.volume >= self.crop, f"at least --crop {self.crop}")
        self._need("crops_per_volume", self.crops_per_volume >= 1, "1 or more")
        self._need("mix", 1 <= self.mix <= 256, "1 to 256 volumes")
        self._need("norm", self.norm in NORMS, f"one of {', '.join(NORMS)}")
        for name in ("noise_only", "clean"):
            given = getattr(self, name)
            self._need(name, given is None or 0 <= given <= 0.5, "a chance from 0 to 0.5")
        self._need("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._need("warmup", 0 <= self.warmup < 1, "a fraction of the training, from 0, below 1")

    def _need(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From the mapping of a config.yaml; names that are not options are left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def network(self) -> nn.Module:
        """The whole network with random weights."""
        return Scunet(ScunetSpec(**self.spec)) if self.net == "scunet" else MapVit(MapVitSpec(**self.spec))


@dataclass(frozen=True)
class PretrainOptions(LvmOptions):
    """How an encoder is pre-trained: objective "jepa" or "mae"; where and how tokens are hidden; weight decay from:to.

    mask_ratio counts for mask_mode "random" only.
    """

    objective: str = "jepa"
    mask_at: str = "input"
    mask_mode: str = "multiblock"
    mask_ratio: float = 0.6
    decay: tuple[float, float] = (0.04, 0.4)
    warmup: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "decay", tuple(float(value) for value in self.decay))
        self._need("objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        self._need("mask_at", self.mask_at in MASK_AT, f"one of {', '.join(MASK_AT)}")
        self._need("mask_mode", self.mask_mode in MASK_MODES, f"one of {', '.join(MASK_MODES)}")
        self._need("mask_ratio", 0 < self.mask_ratio < 1, "a share of the tokens between 0 and 1")
        if self.objective == "mae" and self.mask_at == "embedding":
            raise InputError("--mask-at embedding goes with --objective jepa: voxels that can be read need no guessing")

    @property
    def predictor(self) -> PredictorSpec:
        """A predictor as large as the encoder deserves: one block up to d = 16."""
        features = self.spec["dim"] if self.net == "vit" else 8 * self.spec["d"]
        if features <= 64:
            return PredictorSpec(96, 1, 6)
        return PredictorSpec(192, 1 if features <= 128 else 4, 6)


@dataclass(frozen=True)
class TrainLvmOptions(LvmOptions):
    """How a whole network is trained for a task.

    start: file its weights came from, or "scratch"; pretrained: whether that held an encoder only. alpha: share of the
    mean square error, the rest is the histogram divergence over hist_mask, from hist_sample voxels per crop (0: all).
    cc, ssim, fsc: weights of further losses. encoder_lr: over the decoder's learning rate; frozen: part of the training
    in which a pre-trained encoder stays as it is. patience: epochs without a better CC_mask until the end; 0: never.
    spectrum: "matched" or "as-is" amplitudes of the input (kernels.map_spectrum); None: matched, but for wedges.
    """

    task: str = "sharpen"
    start: str = "scratch"
    pretrained: bool = False
    alpha: float = 0.9
    hist_mask: str = "union"
    hist_sample: int = 8192
    cc: float = 0.0
    ssim: float = 0.0
    fsc: float = 0.0
    encoder_lr: float = 1.0
    frozen: float = 0.0
    patience: int = 0
    spectrum: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need("task", self.task in TASKS, f"one of {', '.join(TASKS)}")
        if self.task == "wedge" and self.noise_only is not None:
            raise InputError("--noise-only: no scene of a tomogram (--task wedge) is noise alone; leave it out")
        if self.spectrum is None:
            object.__setattr__(self, "spectrum", "as-is" if self.task == "wedge" else "matched")
        self._need("spectrum", self.spectrum in SPECTRA, f"one of {', '.join(SPECTRA)}")
        if self.task == "wedge" and self.spectrum != "as-is":
            raise InputError("--spectrum matched: amplitudes of a tomogram (--task wedge) are left as they are")
        if self.task == "superres" and self.clean is not None:
            raise InputError("--clean: no map is as good as the target of --task superres; leave it out")
        self._need("alpha", 0 <= self.alpha <= 1, "a share between 0 and 1")
        self._need("hist_mask", self.hist_mask in HIST_MASKS, f"one of {', '.join(HIST_MASKS)}")
        self._need("hist_sample", self.hist_sample >= 0, "0 (all voxels) or more")
        for name in ("cc", "ssim", "fsc"):
            self._need(name, getattr(self, name) >= 0, "0 (off) or more")
        self._need("encoder_lr", self.encoder_lr > 0, "above 0")
        self._need("frozen", 0 <= self.frozen < 1, "a fraction of the training, from 0, below 1")
        self._need("patience", self.patience >= 0, "0 (never stop early) or more epochs")


def net_spec(net: str, size: str, drop_path: float | None = None) -> dict[str, Any]:
    """Fields of the spec of a size by name.

    ``drop_path`` None: 0 for the two small networks, which an endless stream does not overfit, else .1.
    Raises InputError for an unknown name, and a drop path of a vit, which has none.
    """
    if net not in NETS:
        raise InputError(f"--net {net}: expected one of {', '.join(NETS)}")
    if size not in SIZES:
        raise InputError(f"--size {size}: expected one of {', '.join(SIZES)}")
    if net == "vit":
        if drop_path is not None:
            raise InputError(f"--drop-path {drop_path}: only --net scunet leaves out blocks; leave it out")
        return asdict(VIT_SPECS[size])
    if drop_path is None:
        drop_path = 0.0 if SPECS[size].d <= 16 else 0.1
    try:
        return asdict(replace(SPECS[size], drop_path=drop_path))
    except ValueError as error:
        raise InputError(f"--drop-path {drop_path}: {error}") from None


def size_name(net: str, spec: dict[str, Any]) -> str:
    """ "small scunet (d = 16)" for the card; the numbers where the spec is none of ours."""
    if net == "vit":
        names = [name for name, known in VIT_SPECS.items() if asdict(known) == spec]
        return f"{names[0] if names else 'own'} map ViT (dim = {spec['dim']}, depth = {spec['depth']})"
    names = [name for name, known in SPECS.items() if (known.d, known.n) == (spec["d"], spec["n"])]
    return f"{names[0] if names else 'own'} SCUNet (d = {spec['d']}, n = {spec['n']})"


# numbers that the paper does not print (.6, .5) are ours; the rest is what it says
PAPER_PRETRAIN = {"mask_mode": "random", "mask_ratio": 0.6, "norm": "paper"}
PAPER_TRAIN = {"alpha": 0.5, "hist_mask": "whole", "norm": "paper", "spectrum": "as-is"}
