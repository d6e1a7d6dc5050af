"""Clean images from atoms: rotate, splat, Gaussian, CTF, crop. No voxel map and no interpolation is involved."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cryosuite.kernels.ctf import CtfParams, ctf
from cryosuite.kernels.density import MOLMAP_SIGMA, crop_half, gaussian_transfer, half_frequencies, projection_spectrum
from cryosuite.kernels.fourier import real_inverse
from cryosuite.simulate.states import State

POINTS = 1 << 24  # atoms turned at once, over all images: 128 MB; a map may have millions


@dataclass(frozen=True)
class Optics:
    """What the camera sees: boxes, pixel, resolution.

    Attributes:
        box_size: D of the images written.
        pixel_size: A, at D.
        render_box: box in which images are made and noise is added, same field of view (2 D by default).
        resolution: A, of the Gaussian atoms as ChimeraX molmap counts it (sigma = .225 x resolution).
        bfactor: A^2, an envelope exp(-B s^2/4) on the images that the CTF table does not tell.
    """

    box_size: int
    pixel_size: float
    render_box: int
    resolution: float
    bfactor: float = 0.0

    @property
    def sigma(self) -> float:
        """Standard deviation of an atom, A."""
        return MOLMAP_SIGMA * self.resolution

    @property
    def field_of_view(self) -> float:
        """Edge of the images, A."""
        return self.box_size * self.pixel_size

    @property
    def render_pixel(self) -> float:
        """Pixel size at the render box, A."""
        return self.field_of_view / self.render_box


class Renderer:
    """Makes clean images of states on one device.

    Args:
        states: the states; their atoms are kept on the device.
        optics: boxes and pixel.
        device: torch device.
    """

    def __init__(self, states: list[State], optics: Optics, device: torch.device | str = "cpu") -> None:
        self.optics, self.device = optics, torch.device(device)
        self.atoms = [
            (torch.from_numpy(s.xyz).to(self.device), torch.from_numpy(s.weight).to(self.device)) for s in states
        ]
        box = optics.render_box
        like = torch.zeros(1, device=self.device)
        self.transfer = gaussian_transfer(box, 2, optics.sigma / optics.render_pixel, like)
        ky, kx = half_frequencies(box, 2, self.device)
        grid = torch.broadcast_tensors(kx, ky)
        self.frequency = torch.stack([g.reshape(-1) for g in grid], 1) / box  # (P, 2) cycles/px at the render box
        if optics.bfactor:
            s2 = (self.frequency / optics.render_pixel).pow(2).sum(1).view(self.transfer.shape)
            self.transfer = self.transfer * torch.exp(-optics.bfactor / 4 * s2)
        # every coefficient off the first and last column stands for itself and its Friedel mate
        self.multiplicity = torch.full((box // 2 + 1,), 2.0, device=self.device)
        self.multiplicity[0] = self.multiplicity[-1] = 1.0

    def spectra(self, state: Tensor, rotation: Tensor, shift: Tensor, wrap: bool = True) -> Tensor:
        """Transforms of clean projections, without CTF.

        Args:
            state: (b,) int64.
            rotation: (b, 3, 3), volume frame -> image frame.
            shift: (b, 2), fraction of the box that centres the particle: the content lies at minus that.
            wrap: atoms outside the box come in from the other side, as a shift by phases makes them; else they are
                left out.

        Returns:
            (b, B, B//2 + 1) complex, rfft2 of images of the render box B with their origin at pixel B//2; the sum over
            the pixels of an image is the sum of the atomic numbers.
        """
        box = self.optics.render_box
        out = torch.empty(len(state), box, box // 2 + 1, dtype=torch.complex64, device=self.device)
        offset = -shift.to(torch.float32) * self.optics.field_of_view
        for k in torch.unique(state).tolist():
            xyz, weight = self.atoms[k]
            for rows in torch.nonzero(state == k).flatten().split(max(1, POINTS // len(xyz))):
                points = xyz @ rotation[rows, :2].transpose(1, 2) + offset[rows, None]  # (rows, n, 2) A
                seen = weight if wrap else weight * (points.abs() < self.optics.field_of_view / 2).all(-1)
                out[rows] = projection_spectrum(
                    points, seen, box, self.optics.render_pixel, self.optics.sigma, self.transfer
                )
        return out

    def contrast(self, params: CtfParams) -> Tensor:
        """The CTF (b, B, B//2 + 1) on the render box's half plane, positive at low frequency."""
        pixel = torch.full_like(params.pixel_size, self.optics.render_pixel)
        values = ctf(self.frequency, replace(params, pixel_size=pixel))
        return values.view(-1, *self.transfer.shape)

    def power(self, spectra: Tensor) -> Tensor:
        """Sums over pixels of each image and of its square: (b, 2) float64 (Parseval)."""
        total = spectra[:, 0, 0].real.double()
        square = (spectra.abs().pow(2).double() * self.multiplicity).sum((1, 2)) / self.optics.render_box**2
        return torch.stack([total, square], 1)

    def to_images(self, spectra: Tensor) -> Tensor:
        """Fourier crop to D: (b, D, D) real; the sum over pixels is kept."""
        size = self.optics.box_size
        return real_inverse(crop_half(spectra, self.optics.render_box, size, 2), (size, size))

    def batch_size(self) -> int:
        """Images per batch that keep memory at some ten MB on a CPU, some hundred on a GPU."""
        budget = 1 << (18 if self.device.type == "cpu" else 25)
        return int(np.clip(budget // self.optics.render_box**2, 4, 4096))
