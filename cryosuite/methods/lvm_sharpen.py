"""CryoLVM's inference: a map on any grid -> what a trained network makes of it, on the same grid.

The map is resampled to the voxel that the network knows (Fourier cropping or padding, by the same affine back), given
the amplitudes of a model's map of its resolution where the network was trained so (``kernels.map_spectrum``), scaled
to grey values 0 .. 1, cut into overlapping tiles, and blended again. Tiles without anything in them are not run and
stay 0. The wedge task keeps what was measured: F_out = W F_in + (1 - W) F_network.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.map_grid import MapGrid, back_to, resampled
from cryosuite.data.map_weights import MapWeights
from cryosuite.errors import InputError, notice
from cryosuite.kernels.local_cc import local_correlation
from cryosuite.kernels.map_norm import NORMS, auto_mask, grey_range, occupied, quantile
from cryosuite.kernels.map_spectrum import estimate_resolution, flattened, match_spectrum
from cryosuite.kernels.tiles import TURNS, Tiling, turned, turned_back
from cryosuite.kernels.wedge import data_consistency, wedge_mask
from cryosuite.methods.lvm_sharpen_tiles import Runner
from cryosuite.training.launch import fast_bf16

__all__ = ["EDGE", "EnhanceOptions", "Enhanced", "enhance"]

EDGE = 48  # voxels of a tile
THINNEST = 8  # voxels of the thinnest axis, on the network's grid
LOCAL = 12.0  # A, window of the local correlation; at least 5 voxels
WEDGE_TURNS = 4  # half turns: the rotations that leave a wedge where it is
TILT_X = TURNS.index(((0, 2, 1), (1,)))  # the quarter turn about z that makes a tilt axis x one along y
PRECISIONS = ("auto", "bf16", "32")


@dataclass(frozen=True)
class EnhanceOptions:
    """How a map is enhanced.

    Attributes:
        stride: voxels from tile to tile, at most half a tile; None: that. offset: by which all tiles are moved.
        turns: rotations of the cube to average over, 1 to 24 (of the wedge task 4, since others would turn the wedge);
            from 2 on their standard deviation is kept.
        norm: scale of the grey values; None: the one of the weights. contour: level of the mask that it needs.
        resolution: A, of the map, where the network wants its amplitudes matched; None: estimated from the map.
        flat: take the blur of the molmaps that the network was taught off its map, and end it at the resolution
            (task sharpen, amplitudes matched); else its map is given as it is, between 0 and 1.
        skip: leave out tiles of plain solvent; not of tomograms (wedge task), which are full.
        match_scale: grey values as in the input, not 0 .. 1.
        local_cc: also the local correlation of input and output.
        tilt_range, tilt_axis, consistent: of the wedge task; degrees, and whether measured coefficients are kept.
        batch: tiles at a time; None: found out. precision: "bf16", "32", or "auto" for bf16 where it is fast.
    """

    stride: int | None = None
    offset: int = 0
    turns: int = 1
    norm: str | None = None
    contour: float | None = None
    resolution: float | None = None
    flat: bool = True
    skip: bool = True
    match_scale: bool = False
    local_cc: bool = False
    tilt_range: tuple[float, float] = (-60.0, 60.0)
    tilt_axis: str = "y"
    consistent: bool = True
    batch: int | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        low, high = self.tilt_range
        problems = [
            (not 1 <= self.turns <= len(TURNS), f"--tta {self.turns}: a number of rotations from 1 to 24 is needed"),
            (self.stride is not None and not 1 <= self.stride <= EDGE // 2,
             f"--stride {self.stride}: from 1 to {EDGE // 2} voxels, half a tile"),
            (self.norm is not None and self.norm not in NORMS, f"--norm {self.norm}: one of {', '.join(NORMS)}"),
            (not -90 <= low < high <= 90, f"--tilt-range {low:g} {high:g}: two angles between -90 and 90 degrees"),
            (self.tilt_axis not in ("x", "y"), f"--tilt-axis {self.tilt_axis}: x or y"),
            (self.batch is not None and self.batch < 1, f"--batch {self.batch}: 1 or more"),
            (self.precision not in PRECISIONS, f"--precision {self.precision}: one of {', '.join(PRECISIONS)}"),
            (self.resolution is not None and not 0 < self.resolution < 1000,
             f"--resolution {self.resolution}: a number of Angstrom above 0 is needed"),
            (self.contour is not None and not np.isfinite(self.contour), f"--contour {self.contour}: a number"),
        ]  # fmt: skip
        for wrong, message in problems:
            if wrong:
                raise InputError(message)


@dataclass(frozen=True)
class Enhanced:
    """What came out.

    Attributes:
        map: on the input's grid; grey values 0 .. 1, or the input's.
        uncertainty: (z, y, x) standard deviation over the rotations, of the network's map before its blur
            is taken off; None with one rotation.
        local_cc: (z, y, x) local correlation of input and output, or None.
        tiles, run: of the whole volume, and those that were not plain solvent.
        span: grey values that the network saw as 0 and 1: the input's, or where amplitudes were matched, those of that.
        resolution: A, to which amplitudes were matched; None where they were not.
        seconds: wall time.
    """

    map: MapGrid
    uncertainty: np.ndarray | None
    local_cc: np.ndarray | None
    tiles: int
    run: int
    span: tuple[float, float]
    resolution: float | None
    seconds: float


def enhance(
    grid: MapGrid,
    weights: MapWeights,
    options: EnhanceOptions | None = None,
    device: torch.device | str = "cpu",
    mask: MapGrid | None = None,
    scratch: Path | None = None,
) -> Enhanced:
    """Enhance a map.

    Args:
        grid: any voxel size, shape, axis order and origin.
        mask: on the same grid, 0 .. 1: where grey values are measured, and what the output is multiplied by (wedge:
            outside of which nothing is filled in).
        scratch: folder for what does not fit into memory (maps of more than 600^3 voxels on the network's grid).

    Raises:
        InputError: nothing in the map, too thin a map, a mask on another grid, no memory for one tile.
    """
    options = options or EnhanceOptions()
    began = time.monotonic()
    device = torch.device(device)
    if weights.task == "wedge" and options.turns > WEDGE_TURNS:
        raise InputError(f"--tta {options.turns}: at most {WEDGE_TURNS} for the wedge: other rotations would turn it")
    work = resampled(grid, weights.voxel)
    if min(work.data.shape) < THINNEST:
        sizes = " x ".join(f"{size:.3g}" for size in grid.extent)
        raise InputError(
            f"{grid.path}: the box is {sizes} A, at {weights.voxel:g} A per voxel thinner than {THINNEST} voxels: this "
            "is no map of a volume (check the file, or the voxel size: --apix)"
        )
    volume = torch.from_numpy(work.data)
    voxel = float(np.mean(work.voxel))
    inside = None if mask is None else torch.from_numpy(resampled(mask, weights.voxel).data > 0.5)
    seen, measured, resolution = volume, inside, None
    if weights.spectrum == "matched":
        seen, measured, resolution = _matched(volume, work.voxel[::-1], inside, options)
    span = _span(grid, seen, voxel, weights, options, measured)
    # the networks know wedges of tilts about y
    tipped = weights.task == "wedge" and options.tilt_axis == "x"
    if tipped:
        seen = turned(seen, TILT_X).contiguous()
    tiling = Tiling(tuple(seen.shape), EDGE, options.stride or EDGE // 2, options.offset)
    corners = tiling.corners()
    if weights.task != "wedge":  # tomograms are full, and have no level that a tile could be left at
        corners = _corners(grid, tiling, volume, voxel, inside, options)
    bf16 = options.precision == "bf16" or options.precision == "auto" and _fast_bf16(device)
    runner = Runner(weights.net.to(device), device, bf16, options.batch, options.turns)
    del volume
    made, deviation = runner.run(seen, span, tiling, corners, scratch)
    del seen
    flat = options.flat and resolution is not None and weights.task == "sharpen"
    if flat:
        made = _flattened(made, work.voxel[::-1], resolution)
    if tipped:
        made, deviation = (None if one is None else turned_back(one, TILT_X) for one in (made, deviation))
    made = back_to(replace(work, data=made.numpy()), grid).data
    values = _finished(made, grid, weights.task, options, span, mask, clip=not flat)
    if deviation is not None:
        deviation = np.maximum(back_to(replace(work, data=deviation.numpy()), grid).data, 0.0)
        if weights.task == "wedge" or options.match_scale:
            deviation *= np.float32(span[1] - span[0])
    local = _local(grid, values) if options.local_cc else None
    seconds = time.monotonic() - began
    return Enhanced(grid.with_data(values), deviation, local, len(tiling), len(corners), span, resolution, seconds)


def _matched(
    volume: Tensor, voxel: tuple[float, float, float], inside: Tensor | None, options: EnhanceOptions
) -> tuple[Tensor, Tensor, float]:
    """The map with the amplitudes that the network knows, the mask they were measured in, the resolution used (A)."""
    if not float(volume.max()) > float(volume.min()):
        return volume, torch.ones_like(volume, dtype=torch.bool), 0.0
    if inside is None:
        inside = auto_mask(volume, float(np.mean(voxel)), options.contour)
    if not bool(inside.any()):
        inside = torch.ones_like(inside)
    resolution = options.resolution
    if resolution is None:
        resolution = estimate_resolution(volume, voxel, inside)
    matched, resolution = match_spectrum(volume, voxel, inside, resolution)
    return matched, inside, resolution


def _flattened(made: Tensor, voxel: tuple[float, float, float], resolution: float) -> Tensor:
    """The network's map without the blur that it was taught; its brightest per mille as bright as before.

    Where the molecule fills less than that of the box: the brighter half of what is above half the maximum.
    """
    out = flattened(made, voxel, resolution)
    share = float((made > made.max() / 2).float().mean())
    before, after = (quantile(one, 1 - min(0.001, share / 2)) for one in (made, out))
    return out * (before / after) if before > 0 and after > 0 else out


def _span(
    grid: MapGrid, volume: Tensor, voxel: float, weights: MapWeights, options: EnhanceOptions, inside: Tensor | None
) -> tuple[float, float]:
    """Grey values that become 0 and 1."""
    norm = options.norm or weights.norm
    if norm != weights.norm:
        notice(
            f"--norm {norm}: the network was trained on maps scaled as {weights.norm!r} and may not understand these"
        )
    try:
        return grey_range(volume, voxel, norm, options.contour, inside)
    except ValueError as error:
        raise InputError(f"{grid.path}: {error}: there is nothing to enhance") from None


def _corners(
    grid: MapGrid,
    tiling: Tiling,
    volume: Tensor,
    voxel: float,
    inside: Tensor | None,
    options: EnhanceOptions,
) -> Tensor:  # (n, 3)
    """Tiles that are run: those with something in them."""
    corners, contour = tiling.corners(), options.contour
    if inside is None:
        if not options.skip:
            return corners
        inside = occupied(volume, voxel) if contour is None else auto_mask(volume, voxel, contour)
        if contour is None and not bool(inside.any()):
            raise InputError(
                f"{grid.path}: nothing stands out of the noise, and a network would make a molecule of it. Where the "
                "molecule fills the whole box run all of it (--no-skip), or say where it is (--mask, --contour)"
            )
    chosen = corners[tiling.occupied(inside)]
    if not len(chosen):
        raise InputError(f"{grid.path}: no part of the map lies in the mask: check --mask or --contour")
    return chosen


def _fast_bf16(device: torch.device) -> bool:
    return fast_bf16() if device.type == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)


def _finished(
    values: np.ndarray,
    grid: MapGrid,
    task: str,
    options: EnhanceOptions,
    span: tuple[float, float],
    mask: MapGrid | None,
    clip: bool,
) -> np.ndarray:
    """The network's map (grey values 0 .. 1, on the input's grid) as it is written."""
    low, high = span
    if task != "wedge":
        if clip:
            np.clip(values, 0.0, 1.0, out=values)
        if mask is not None:
            values *= np.clip(mask.data, 0.0, 1.0)
    if task == "wedge" or options.match_scale:
        values *= np.float32(high - low)
        values += np.float32(low)
    if task == "wedge" and mask is not None:
        values = grid.data + np.clip(mask.data, 0.0, 1.0) * (values - grid.data)
    if task == "wedge" and options.consistent:
        kept = wedge_mask(values.shape, options.tilt_range, options.tilt_axis, grid.voxel[::-1])
        values = data_consistency(torch.from_numpy(grid.data), torch.from_numpy(values), kept).numpy()
    return values


def _local(grid: MapGrid, values: np.ndarray) -> np.ndarray:
    """Local correlation of input and output in windows of 12 A."""
    width = tuple(max(5, round(LOCAL / size)) | 1 for size in grid.voxel[::-1])
    return local_correlation(torch.from_numpy(grid.data), torch.from_numpy(values), width).numpy()
