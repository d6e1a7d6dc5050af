"""Slices of many volumes at once: against single slices, exact adjoints, and the torch path against the loops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cryosuite.kernels import class_slices as cs
from cryosuite.kernels import class_slices_cpu, fourier, rotations, slices

D, K, B = 16, 5, 7


@pytest.fixture(params=[8, 5], ids=["whole", "cut"])
def case(request: pytest.FixtureRequest):
    """Volumes, their transforms, and random values and weights on a disc."""
    generator = torch.Generator().manual_seed(0)
    volumes = torch.randn(K, D, D, D, generator=generator)
    rotation = rotations.random_rotations(B, generator=generator, dtype=torch.float32)
    disc = fourier.half_disc(D, request.param)
    values = torch.randn(B, len(disc), dtype=torch.complex64, generator=generator)
    weights = torch.rand(B, len(disc), generator=generator)
    return volumes, cs.class_transforms(volumes, request.param), values, weights, rotation, disc


def shares(seed: int = 1) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Random sparse shares (B, K) and their rows; one image has none."""
    p = torch.rand(B, K, generator=torch.Generator().manual_seed(seed))
    p = torch.where(p > 0.5, p, 0)
    p[2] = 0
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), (p > 0).sum(1).cumsum(0)])
    return p, (p[p > 0], torch.nonzero(p)[:, 1].int(), starts)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def explicit(volumes, rotation, disc) -> torch.Tensor:
    """(B, K, P) slices one by one."""
    transforms = slices.volume_transform(volumes)
    return torch.stack([slices.extract_slices(t, rotation, disc) for t in transforms], 1)


def test_sums_are_those_of_explicit_slices(case):
    volumes, transforms, values, weights, rotation, disc = case
    h, g = cs.class_sums(transforms, values, weights, rotation, disc)
    S = explicit(volumes, rotation, disc)
    assert close(h, 2 * (S.conj() * values[:, None]).real.sum(-1).double())
    assert close(g, 2 * (weights[:, None] * S.abs().square()).sum(-1).double())


def test_gram_is_that_of_explicit_slices(case):
    volumes, transforms, values, weights, rotation, disc = case
    G, h = cs.class_gram(transforms, values, weights, rotation, disc)
    S = explicit(volumes, rotation, disc)
    assert close(G, 2 * torch.einsum("bjp,bkp->bjk", (S * weights[:, None]).conj(), S).real.double())
    sums = cs.class_sums(transforms, values, weights, rotation, disc)
    assert close(h, sums[0]) and close(G.diagonal(dim1=1, dim2=2), sums[1])


def test_insertion_is_that_of_single_slices(case):
    _, transforms, values, weights, rotation, disc = case
    p, rows = shares()
    acc = cs.insert_classes(cs.new_class_accumulator(K, disc.r_max), values, weights, rows, rotation, disc)
    whole = cs.insert_classes(cs.new_class_accumulator(K, D // 2), values, weights, rows, rotation, disc)
    cut = D - 2 * disc.r_max
    shape = acc.data.shape
    inner = whole.data[:, cut : cut + shape[1], cut : cut + shape[2], : shape[3]]
    assert close(acc.data, inner, 1e-4)
    for k in range(K):
        one = slices.new_accumulator(D)
        slices.insert_slices(one, values * p[:, k : k + 1], weights * p[:, k : k + 1], rotation, disc)
        assert close(whole.data[k], one.data)


def test_insertion_is_the_adjoint_of_the_sums(case):
    """sum_ik p_ik h_ik = 2 Re <T, A^T(p v)>: what is gathered is what would be scattered."""
    _, transforms, values, weights, rotation, disc = case
    p, rows = shares()
    h, _ = cs.class_sums(transforms, values, weights, rotation, disc)
    acc = cs.insert_classes(cs.new_class_accumulator(K, disc.r_max), values, weights, rows, rotation, disc)
    grid = transforms.data.permute(4, 0, 1, 2, 3).double()
    assert float((p * h).sum()) == pytest.approx(2 * float((grid * acc.data[..., :2].double()).sum()), rel=1e-4)


def test_torch_path_equals_the_loops(case, monkeypatch):
    _, transforms, values, weights, rotation, disc = case
    _, rows = shares()
    arguments = (values, weights, rotation, disc)

    def everything():
        acc = cs.new_class_accumulator(K, disc.r_max)
        return (
            *cs.class_sums(transforms, *arguments),
            *cs.class_gram(transforms, *arguments),
            cs.insert_classes(acc, values, weights, rows, rotation, disc).data,
        )

    loops = everything()
    monkeypatch.setattr(class_slices_cpu, "available", lambda: False)
    monkeypatch.setattr(cs, "CHUNK", 1000)  # several chunks
    for a, b in zip(everything(), loops, strict=True):
        assert close(a, b)


def test_threads_do_not_change_a_bit(case):
    _, transforms, values, weights, rotation, disc = case
    _, rows = shares()
    with ThreadPoolExecutor(3) as pool:
        for one, three in zip(
            cs.class_sums(transforms, values, weights, rotation, disc),
            cs.class_sums(transforms, values, weights, rotation, disc, pool, 3),
            strict=True,
        ):
            assert torch.equal(one, three)
        a, b = (cs.new_class_accumulator(K, disc.r_max) for _ in range(2))
        cs.insert_classes(a, values, weights, rows, rotation, disc)
        cs.insert_classes(b, values, weights, rows, rotation, disc, pool, 3)
    assert torch.equal(a.data, b.data)


def test_power_and_cosine(case):
    """An image that is a slice has cosine 1 with it, and its power is the slice's."""
    volumes, transforms, _, weights, rotation, disc = case
    S = explicit(volumes[:1], rotation, disc)[:, 0]
    values = S * weights  # C y / sigma^2 with y = C S and w = C^2 / sigma^2
    h, g = cs.class_sums(transforms, values, weights, rotation, disc)
    n = cs.disc_power(values, weights)
    assert torch.allclose(n, g[:, 0], rtol=1e-4)
    assert torch.allclose(h[:, 0] / (n * g[:, 0]).sqrt(), torch.ones(B, dtype=torch.float64), atol=1e-5)
    weights[0] = 0
    assert float(cs.disc_power(values * 0, weights)[0]) == 0


def test_points_beyond_the_grid_and_nan_rotations_read_nothing(case):
    _, transforms, values, weights, rotation, disc = case
    far = rotation.clone()
    far[0] *= 100
    far[1] = float("nan")
    h, g = cs.class_sums(transforms, values, weights, far, disc)
    assert float(h[:2].abs().max()) == float(g[:2].abs().max()) == 0
    _, rows = shares()
    acc = cs.insert_classes(cs.new_class_accumulator(K, disc.r_max), values, weights, rows, far, disc)
    assert bool(torch.isfinite(acc.data).all())


def test_what_does_not_fit_is_refused(case):
    volumes, transforms, values, weights, rotation, disc = case
    with pytest.raises(ValueError, match="do not fit"):
        cs.class_sums(transforms, values[:, 1:], weights, rotation, disc)
    with pytest.raises(ValueError, match="radius"):
        cs.class_sums(cs.class_transforms(volumes, 3), values, weights, rotation, disc)
    with pytest.raises(ValueError, match="classes"):
        bad = (torch.ones(B), torch.full((B,), K, dtype=torch.int32), torch.arange(B + 1))
        cs.insert_classes(cs.new_class_accumulator(K, disc.r_max), values, weights, bad, rotation, disc)
