"""Masks: exact distances, soft edges, around the particle and nothing else."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from cryosuite.reconstruct import masks


def test_distances_are_euclidean():
    inside = torch.rand(20, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.995
    exact = distance_transform_edt(~inside.numpy())
    ours = masks.distance_to(inside, 5).numpy()
    near = exact <= 5
    assert np.allclose(ours[near], exact[near])
    assert (ours[~near] > 5).all()


def test_soft_mask_grows_by_what_is_asked():
    point = torch.zeros(21, 21, 21, dtype=torch.bool)
    point[10, 10, 10] = True
    mask = masks.soft_mask(point, 3, 4)
    line = mask[10, 10, 10:]
    assert (line[:4] == 1).all()
    assert 0.49 < float(line[5]) < 0.51  # half way down the edge
    assert float(line[7]) < 1e-6
    assert masks.soft_mask(torch.zeros_like(point)).sum() == 0


def test_sphere_and_blur():
    sphere = masks.soft_sphere(32)
    assert sphere[16, 16, 16] == 1
    assert sphere[0, 0, 0] == 0
    volume = torch.zeros(32, 32, 32)
    volume[16, 16, 16] = 1
    blurred = masks.gaussian_blur(volume, 2.0)
    assert abs(float(blurred.sum()) - 1) < 1e-5
    assert abs(float(blurred[16, 16, 18] / blurred[16, 16, 16]) - np.exp(-0.5)) < 1e-3


def test_automatic_mask_holds_the_particle_in_noise():
    axis = torch.arange(32) - 16
    radius = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2).sqrt()
    particle = (radius < 6).float()
    noisy = particle + 0.3 * torch.randn(32, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = masks.half_map_mask(noisy, torch.linspace(1, 0, 16))
    assert float(mask[radius < 6].min()) > 0.99
    assert float(mask[radius > 14].max()) < 0.5
    nothing = masks.half_map_mask(torch.zeros(32, 32, 32), torch.zeros(16))
    assert torch.equal(nothing, masks.soft_sphere(32))
    union = masks.union_mask(torch.stack([particle, particle.roll(4, 2)]))
    assert float(union[(radius < 5)].min()) == 1.0
    assert float(union[16, 16, 16 + 9]) == 1.0
