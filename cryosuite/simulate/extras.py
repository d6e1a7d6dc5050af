"""What real images have besides one particle and noise: neighbours, ice gradients, wrong poses and defocus values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cryosuite.simulate.images import Renderer
from cryosuite.simulate.imaging import Particles, SimulateOptions, draw_rotations


class Extras:
    """Draws the disturbances of a whole set at once, each from its own seed, and renders them batch by batch."""

    def __init__(
        self,
        renderer: Renderer,
        particles: Particles,
        options: SimulateOptions,
        rng_of: Callable[[int, str], np.random.Generator],
    ) -> None:
        self.renderer, self.particles, self.options = renderer, particles, options
        n = len(particles)
        rng = rng_of(options.seed, "neighbours")
        self.owner = np.repeat(np.arange(n), rng.poisson(options.neighbours, n)) if options.neighbours else np.empty(0)
        self.owner = self.owner.astype(np.int64)
        if len(self.owner):
            self._draw_neighbours(rng)
        rng = rng_of(options.seed, "ice")
        self.slope = rng.standard_normal((n, 2)).astype(np.float32)

    def _draw_neighbours(self, rng: np.random.Generator) -> None:
        """Other particles of the same set, far enough away not to overlap in 3-D, near enough to reach the box."""
        m = len(self.owner)
        field = self.renderer.optics.field_of_view
        reach = np.array([float(xyz.norm(dim=1).quantile(0.98)) for xyz, _ in self.renderer.atoms])
        self.state = self.particles.label[rng.permutation(len(self.particles))[np.arange(m) % len(self.particles)]]
        near = (reach[self.state] + reach[self.particles.label[self.owner]]) / field
        distance = rng.uniform(near, np.maximum(near + 0.1, 0.75))
        angle = rng.uniform(0, 2 * np.pi, m)
        self.rotation = draw_rotations(m, rng)
        self.offset = (distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)).astype(np.float32)

    def neighbours(self, rows: np.ndarray) -> Tensor | float:
        """Clean images (b, D, D) of the neighbours of particles ``rows``, with those particles' CTF; 0.0 without."""
        mine = np.flatnonzero((self.owner >= rows[0]) & (self.owner <= rows[-1])) if len(self.owner) else []
        if not len(mine):
            return 0.0
        device, owner = self.renderer.device, self.owner[mine]
        shift = self.particles.shift[owner] - self.offset[mine]
        spectra = self.renderer.spectra(
            torch.from_numpy(self.state[mine]).to(device),
            torch.from_numpy(self.rotation[mine]).to(device),
            torch.from_numpy(shift).to(device),
            wrap=False,
        )
        spectra *= self.renderer.contrast(self.particles.contrast(owner, device))
        images = self.renderer.to_images(spectra)
        total = images.new_zeros(len(rows), *images.shape[1:])
        return total.index_add_(0, torch.from_numpy(owner - rows[0]).to(device), images)

    def ice(self, rows: np.ndarray) -> Tensor | float:
        """Linear ramps (b, D, D) whose sd over pixels is ``ice_gradient`` noise sd on average; 0.0 without."""
        if not self.options.ice_gradient:
            return 0.0
        size = self.options.box_size
        axis = torch.linspace(-1, 1, size, device=self.renderer.device) * (3**0.5 / 2**0.5 * self.options.ice_gradient)
        slope = torch.from_numpy(self.slope[rows]).to(axis.device)
        return slope[:, 0, None, None] * axis + slope[:, 1, None, None] * axis[:, None]


def wrong_poses(
    particles: Particles, options: SimulateOptions, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotations, shifts and CTF table as an imperfect refinement would give them (equal to the truth by default).

    The rotation error is a random rotation vector whose angle has the root mean square ``pose_error_deg``.
    """
    from cryosuite.kernels.rotations import expmap

    n = len(particles)
    vector = rng.standard_normal((n, 3)) * np.deg2rad(options.pose_error_deg) / np.sqrt(3)
    shift = rng.standard_normal((n, 2)) * options.shift_error / (options.box_size * options.pixel_size)
    defocus = rng.standard_normal((n, 1)) * options.defocus_error
    rotation, table = particles.rotation, particles.ctf.copy()
    if options.pose_error_deg:
        turn = expmap(torch.from_numpy(vector)).numpy()
        rotation = (turn @ rotation.astype(np.float64)).astype(np.float32)
    table[:, 2:4] += defocus
    return rotation, (particles.shift + shift).astype(np.float32), table.astype(np.float32)
