"""The basis field: Hermitian, linear in the codes, its Gram matrix by either way, plane features of known planes."""

from __future__ import annotations

import pytest
import torch

from cryosuite.kernels import assignment
from cryosuite.nets.inr import half_space
from cryosuite.nets.triplane import BasisField, CoordinateFeatures, TriplaneFeatures


@pytest.fixture
def points():
    g = torch.Generator().manual_seed(0)
    q = torch.rand(3, 50, 3, dtype=torch.float64, generator=g) - 0.5
    x = torch.randn(3, 50, dtype=torch.complex128, generator=g)
    return q, x, torch.rand(3, 50, dtype=torch.float64, generator=g)


def field(rank: int = 4, width: int = 24, channels: int = 3, n: int = 8) -> BasisField:
    torch.manual_seed(1)
    return BasisField(CoordinateFeatures(16, channels, 0, 2, n), rank, width, 2).double()


@pytest.mark.parametrize("channels, n", [(3, 8), (0, 8), (3, 0)])
def test_volumes_are_real(points, channels, n):
    basis = field(channels=channels, n=n)
    assert torch.allclose(basis(-points[0]), basis(points[0]).conj(), atol=1e-12)


@pytest.mark.parametrize("rank, width", [(3, 40), (20, 16)])  # the basis itself is cheaper, the hidden layer is
def test_gram_of_the_hidden_layer_is_that_of_the_basis(points, rank, width, monkeypatch):
    q, x, weight = points
    net = field(rank, width)
    sign = half_space(q)
    hidden = net.hidden(q * sign[..., None])
    expected = assignment.gram(net(q), weight, x)
    for chunk in (1 << 20, 500):
        monkeypatch.setattr("cryosuite.nets.triplane.CHUNK_VALUES", chunk)
        for one, other in zip(net.gram(hidden, sign, weight, x), expected, strict=True):
            assert torch.allclose(one, other, atol=1e-10)
    codes = torch.randn(3, 2, rank, dtype=torch.float64)
    slices = torch.view_as_complex(net.slices(hidden, sign, codes))
    assert torch.allclose(slices, torch.einsum("bpm,bjm->bpj", net(q), codes.to(x.dtype)), atol=1e-12)


def test_gauge_leaves_slices_alone(points):
    net, codes = field(), torch.randn(5, 4, dtype=torch.float64)
    before = net(points[0]) @ codes.T.to(torch.complex128)
    codes[:, 1:] *= 7
    net.rescale(1 / 7)
    assert torch.allclose(net(points[0]) @ codes.T.to(torch.complex128), before, atol=1e-12)


def test_planes_are_read_where_they_should_be():
    """A plane that holds the coordinate x + 2 y gives back the coordinates, at both levels; the border beyond."""
    features = TriplaneFeatures(16, channels=1, levels=2)
    assert features.size == 6 and features.planes.shape[-1] == 17 and features.coarse[0].shape[-1] == 4
    with torch.no_grad():
        for planes in (features.planes, features.coarse[0]):
            axis = torch.linspace(-0.5, 0.5, planes.shape[-1])
            planes.copy_((axis[None, :] + 2 * axis[:, None]).expand_as(planes))
    q = torch.rand(1, 20, 3) - 0.5
    x, y, z = q.unbind(-1)
    expected = torch.stack([x + 2 * y, y + 2 * z, x + 2 * z] * 2, dim=-1)
    assert torch.allclose(features(q), expected, atol=1e-5)
    beyond = features(torch.tensor([[[0.9, 0.0, 0.0]]]))[0, 0]
    assert torch.allclose(beyond[:3], torch.tensor([0.5, 0.0, 0.5]), atol=1e-6)


def test_nothing_to_see_is_refused():
    with pytest.raises(ValueError, match="planes or Fourier features"):
        CoordinateFeatures(16, 0, 0, 1, 0)
