"""What a stream of map pairs is made of: the task, the sizes, and the range of every property of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from cryosuite.data import map_weights

TASKS = (*map_weights.TASKS, "pretrain")
RESOLUTIONS = {"sharpen": (2.5, 8.0), "superres": (4.0, 8.0), "wedge": (27.0, 45.0), "pretrain": (2.5, 8.0)}
VOXELS = map_weights.VOXELS | {"pretrain": 1.0}

Range = tuple[float, float]


@dataclass(frozen=True)
class PairOptions:
    """Pairs of an input map and its target; ranges are drawn from evenly, chances are per simulated volume.

    Attributes:
        task: sharpen (deposited map -> molmap of the same resolution), superres (maps of 4 to 8 A -> molmap at
            ``superres_target``, so 6 A -> 3 A in the middle), wedge (missing wedge, noise -> the whole scene), pretrain
            (no target: degraded and clean maps mixed).
        crop: edge of the crops, voxels. volume: edge of the simulated cube. voxel: A, None for the task's.
        norm: rule of grey values (kernels.map_norm.NORMS). crops_per_volume: crops of one draw.
        resolution: A, where the half-map FSC is .143; also the target's, but for superres; None: ``RESOLUTIONS`` of the
            task. cut: the low-pass filter's limit over it.
        b: global B-factor, A^2. sharpened: share of it that the depositor took back again (chance
            ``chance_sharpened``).
        local_b: largest B of the smooth field over ``field_scale`` A. anisotropy: ratio of eigenvalues, smallest
            ``anisotropy_b`` A^2. noise: factor on the noise of a half-map FSC of .143 at the resolution; centre: how
            much stronger in the middle. solvent: grey value of the solvent over the molecule's mean. lipid: of
            lipid-like blobs, the same. missing: share of residues the target lacks. source_voxel: A, of the map before
            it was resampled. affine: error of the grey range, as a share of it.
        crowding: share of a scene's volume that molecules fill. membranes, filaments: how many. tilt_low, tilt_high:
            degrees; soft: edge of the wedge, degrees. scene_noise: standard deviation over the scene's, before the
            wedge; noise_b: its B-factor, A^2.
        clean: chance that the input is as good as the target. nothing: chance of noise without a molecule, whose
            target is empty. solvent_crops: share of crops taken anywhere.
        spectrum: "matched": the amplitudes of the input fall as those of a molmap of its resolution
            (kernels.map_spectrum; not of scenes), or "as-is". misjudged: resolution that this is done with, over the
            true one.
        phantoms: chance of a procedural molecule where there are both kinds. users: chance of the user's own pairs.
    """

    task: str = "sharpen"
    crop: int = 48
    norm: str = "robust"
    spectrum: str = "as-is"
    misjudged: Range = (0.85, 1.1)
    voxel: float | None = None
    volume: int = 96
    crops_per_volume: int = 16
    resolution: Range | None = None
    cut: Range = (0.85, 1.0)
    superres_target: float = 3.0
    b: Range = (30.0, 250.0)
    sharpened: Range = (0.0, 1.0)
    local_b: Range = (0.0, 150.0)
    field_scale: float = 20.0
    anisotropy: Range = (1.0, 4.0)
    anisotropy_b: Range = (0.0, 30.0)
    noise: Range = (0.2, 1.2)
    centre: Range = (1.0, 2.0)
    solvent: Range = (0.0, 0.5)
    lipid: Range = (0.1, 0.6)
    missing: Range = (0.0, 0.1)
    source_voxel: Range = (0.5, 2.1)
    affine: Range = (-0.05, 0.05)
    crowding: Range = (0.01, 0.1)
    membranes: Range = (0.0, 3.0)
    filaments: Range = (0.0, 2.0)
    tilt_low: Range = (-70.0, -45.0)
    tilt_high: Range = (45.0, 70.0)
    soft: Range = (1.0, 2.0)
    scene_noise: Range = (0.1, 1.5)
    noise_b: Range = (0.0, 2000.0)
    clean: float = 0.08
    nothing: float = 0.05
    chance_sharpened: float = 0.5
    chance_local: float = 0.7
    chance_anisotropy: float = 0.4
    chance_lipid: float = 0.15
    chance_missing: float = 0.5
    chance_tight: float = 0.15
    solvent_crops: float = 0.1
    inside: float = 0.05
    phantoms: float = 0.15
    users: float = 0.5

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"a task is one of {', '.join(TASKS)}, not {self.task!r}")
        if self.volume % 4 or self.crop > self.volume:
            raise ValueError(f"a volume of {self.volume} must be a multiple of 4 and hold a crop of {self.crop}")

    @property
    def voxel_size(self) -> float:
        """A per voxel that the network works at."""
        return VOXELS[self.task] if self.voxel is None else self.voxel

    @property
    def resolutions(self) -> Range:
        """A, between what the resolution of maps is drawn."""
        return RESOLUTIONS[self.task] if self.resolution is None else self.resolution


class MapBatch(NamedTuple):
    """Crops, all of edge e, in [0, 1]: what the network sees and what it is to answer.

    Attributes:
        input, target: (b, 1, e, e, e) float32. mask: the same, 1 where either is above .02.
        resolution: (b,) A, of the target. index: (b,) int64, the molecule (row of ``MapPairs.names``).
        wedge: (b, e, e, e//2 + 1) weights of what was measured (task wedge), or None.
    """

    input: Tensor
    target: Tensor
    mask: Tensor
    resolution: Tensor
    index: Tensor
    wedge: Tensor | None = None
