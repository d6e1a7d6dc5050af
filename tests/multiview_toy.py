"""Small networks and images for the tests of multi-view networks."""

from __future__ import annotations

import torch
from torch import Tensor

from cryosuite.kernels.rotations import random_rotations
from cryosuite.nets.multiview import Multiview, MultiviewSpec, TemplateCache

SMALL = MultiviewSpec(16, 4, 32, 2, 2, 48, 2, 3)
TABLE = MultiviewSpec(16, 4, 32, 2, 2, 48, 2, 3, "patch", "table", "dense", False, 1, 0)  # the released layout


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(spec: MultiviewSpec = SMALL, seed: int = 0) -> Multiview:
    """A network whose every parameter matters: the small starts of last layers are made large."""
    torch.manual_seed(seed)
    net = Multiview(spec).eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net


def images(*lead: int, spec: MultiviewSpec = SMALL, seed: int = 1) -> Tensor:
    return noise(*lead, spec.in_channels, spec.size, spec.size, seed=seed)


def template_cache(net: Multiview, sets: int = 1, count: int = 5, seed: int = 2) -> TemplateCache:
    rotation = random_rotations(sets * count, torch.Generator().manual_seed(seed)).view(sets, count, 3, 3)
    return net.templates(images(sets, count, spec=net.spec, seed=seed), net.maps_of(rotation))
