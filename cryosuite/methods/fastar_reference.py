"""What poses are predicted against: a map or an atomic model in the particles' box, and its template views."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cryosuite.errors import InputError, notice
from cryosuite.formats.mrc import read_map
from cryosuite.kernels import fourier
from cryosuite.kernels.density import MOLMAP_SIGMA, density_map
from cryosuite.kernels.slices import extract_slices, volume_transform
from cryosuite.methods.fastar_images import Window
from cryosuite.reconstruct.masks import percentile
from cryosuite.simulate.sources import read_structure
from cryosuite.simulate.view_sets import template_input, template_rotations

LEVEL = 0.1  # of the 99.9th percentile: voxels above it are particle


@dataclass
class Reference:
    """A molecule known in advance, in the box of the particles.

    Attributes:
        volume: (D, D, D) float32, low-passed. low_pass: Angstrom, 0 when it was not. source: its file.
        gyration: radius of gyration as a fraction of the box.
    """

    volume: Tensor
    low_pass: float
    source: str
    gyration: float


def load_reference(
    box: int, pixel_size: float, map_path: Path | None = None, model_path: Path | None = None, low_pass: float = 20.0
) -> Reference:
    """A map (of any box and pixel size) or an atomic model as a volume in the box of the particles.

    Args:
        low_pass: Angstrom, as ChimeraX molmap counts resolution (a Gaussian of .225 times it); 0: as it is.

    Raises:
        InputError: unreadable files, a map without a pixel size that is not in the particles' box, an empty map.
    """
    if (map_path is None) == (model_path is None):
        raise InputError("give either a map (--map) or an atomic model (--model) as reference, not both")
    path = Path(map_path or model_path)
    if map_path is not None:
        volume = _from_map(path, box, pixel_size, low_pass)
    else:
        volume = _from_model(path, box, pixel_size, low_pass)
    if not bool(torch.isfinite(volume).all()) or float(volume.std()) <= 0:
        raise InputError(f"{path}: this reference is empty (all voxels the same, or not numbers)")
    size = gyration(volume)
    if size > 0.3:
        notice(f"{path}: the reference fills the particles' box of {box * pixel_size:.0f} A; is it the same particle?")
    return Reference(volume, low_pass, str(path), size)


def _from_map(path: Path, box: int, pixel_size: float, low_pass: float) -> Tensor:
    found = read_map(path)
    data = torch.from_numpy(np.ascontiguousarray(found.data))
    if len(set(data.shape)) != 1:
        raise InputError(f"{path}: a cubic map is needed, not {' x '.join(map(str, data.shape))}")
    if data.shape[-1] % 2:
        data = F.pad(data, (1, 0) * 3)  # the origin moves with the content to the new voxel D // 2
    own = found.pixel_size
    if not own:
        if data.shape[-1] != box:
            raise InputError(f"{path}: the header has no pixel size, so the map cannot be scaled to the particles")
        own = pixel_size
    if low_pass > 0:
        data = low_passed(data, low_pass / own)
    return resampled(data, own, box, pixel_size)


def _from_model(path: Path, box: int, pixel_size: float, low_pass: float) -> Tensor:
    atoms = read_structure(path)
    xyz = torch.from_numpy(atoms.centred().astype(np.float32))
    reach = float(xyz.norm(dim=1).max())
    if reach > 0.55 * box * pixel_size:
        notice(f"{path}: the model is {2 * reach:.0f} A long, the particles' box only {box * pixel_size:.0f} A")
    weight = torch.from_numpy(atoms.weight.astype(np.float32))
    sigma = MOLMAP_SIGMA * max(low_pass, 2 * pixel_size)
    return density_map(xyz, weight, box, pixel_size, sigma)


def low_passed(volume: Tensor, resolution: float) -> Tensor:
    """A map (D, D, D) times the Gaussian that makes atoms of a resolution (voxels, as molmap counts it)."""
    D = volume.shape[-1]
    full, half = torch.fft.fftfreq(D).square(), torch.fft.rfftfreq(D).square()
    s2 = full[:, None, None] + full[None, :, None] + half
    gauss = torch.exp(-2 * (torch.pi * MOLMAP_SIGMA * resolution) ** 2 * s2)
    return torch.fft.irfftn(torch.fft.rfftn(volume) * gauss, s=volume.shape)


def resampled(volume: Tensor, own: float, box: int, pixel_size: float) -> Tensor:
    """A map of voxels of ``own`` Angstrom on the grid of a box of another pixel size, the origins (D // 2) on top.

    What the wanted voxels cannot hold is cut off the spectrum, the rest is done by linear interpolation on a grid twice
    as fine as the finer of the two; a map on the same grid comes back as it is.
    """
    if abs(own / pixel_size - 1) < 1e-3:
        return _centred(volume, box)
    D = volume.shape[-1]
    fine = max(own, pixel_size / 2)  # no voxel finer than half of those wanted
    doubled = 2 * min(2 * round(D * own / fine / 2), D)
    kept = min(2 * round(D * own / pixel_size / 2), D)
    if kept < D:
        volume = fourier.fourier_crop_volume(volume, kept)
    volume, own = _padded_spectrum(volume, doubled), own * D / doubled
    axis = (torch.arange(box) - box // 2) * (pixel_size / own)  # voxels from the origin of the map
    place = 2 * (axis + doubled // 2) / (doubled - 1) - 1
    grid = torch.stack(torch.meshgrid(place, place, place, indexing="ij")[::-1], -1)  # x, y, z
    return F.grid_sample(volume[None, None], grid[None], align_corners=True)[0, 0]


def _padded_spectrum(volume: Tensor, size: int) -> Tensor:
    """The map on a finer grid, by zeros around its spectrum; grey values are kept."""
    D = volume.shape[-1]
    out = torch.zeros(size, size, size // 2 + 1, dtype=torch.complex64)
    half = D // 2
    spectrum = torch.fft.rfftn(volume)
    low, high = slice(0, half), slice(size - half + 1, size)
    old_low, old_high = slice(0, half), slice(half + 1, D)
    for to_z, from_z in ((low, old_low), (high, old_high)):
        for to_y, from_y in ((low, old_low), (high, old_high)):
            out[to_z, to_y, :half] = spectrum[from_z, from_y, :half]
    return torch.fft.irfftn(out, s=(size,) * 3) * (size / D) ** 3


def _centred(volume: Tensor, box: int) -> Tensor:
    """The middle of a map, or the map in the middle of a larger box; origins stay on top."""
    D = volume.shape[-1]
    if box <= D:
        start = D // 2 - box // 2
        return volume[(slice(start, start + box),) * 3].contiguous()
    before = box // 2 - D // 2
    return F.pad(volume, (before, box - D - before) * 3)


def gyration(volume: Tensor) -> float:
    """Radius of gyration of what stands out of a map, as a fraction of its box."""
    D = volume.shape[-1]
    mass = (volume - LEVEL * percentile(volume, 99.9)).clamp(min=0)
    if float(mass.sum()) <= 0:
        return 0.25
    axis = torch.arange(D, dtype=volume.dtype)
    total = mass.sum()
    square = 0.0
    for others in ((1, 2), (0, 2), (0, 1)):
        profile = mass.sum(others)
        centre = (profile * axis).sum() / total
        square += float((profile * (axis - centre).square()).sum() / total)
    return square**0.5 / D


class Views:
    """Noise-free views of a map as a network takes them, from any direction.

    Args:
        volume: (D, D, D). window: of the particles, and the network's size. channels: 1 or 2.
    """

    def __init__(self, volume: Tensor, window: Window, channels: int = 2, device: torch.device | str = "cpu") -> None:
        start = window.box // 2 - window.width // 2
        inner = volume[(slice(start, start + window.width),) * 3]
        size = min(window.size, window.width)
        inner = fourier.fourier_crop_volume(inner.contiguous(), size)
        if size < window.size:
            inner = _padded_spectrum(inner, window.size)
        self.transform, self.channels = volume_transform(inner.to(device)), channels
        self.disc = fourier.half_disc(window.size, device=device)

    def __call__(self, rotation: Tensor) -> Tensor:  # (n, 3, 3) -> (n, C, s, s)
        """The views."""
        slices = extract_slices(self.transform, rotation, self.disc)
        return template_input(fourier.from_half_disc(slices, self.disc))[:, : self.channels]


def template_views(volume: Tensor, window: Window, count: int, channels: int = 2) -> tuple[Tensor, Tensor]:
    """Views of a map from ``count`` fixed directions (M, C, s, s), and their rotations (M, 3, 3)."""
    rotation = template_rotations(count)
    return Views(volume, window, channels)(rotation), rotation
