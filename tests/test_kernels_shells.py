"""Shells: Fourier shell correlation against RELION's and cryoDRGN's own numbers, averages, crossings, areas."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from cryosuite.kernels import shells
from cryosuite.kernels.fourier import fft3c


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def maps(shared: Path) -> dict[str, torch.Tensor]:
    folder = shared / "golden" / "relion"
    names = ("half1", "half2", "mask", "volume", "reconstruct")
    return {name: torch.tensor(mrcfile.read(folder / f"{name}.mrc")) for name in names}


def star_column(path: Path, label: str) -> np.ndarray:
    """One column of the data_fsc loop of a RELION star file, shells 1 and up."""
    labels, rows = [], []
    for line in path.read_text().split("data_fsc")[1].splitlines():
        words = line.split()
        if words and words[0].startswith("_rln"):
            labels.append(words[0][4:])
        elif len(words) == len(labels) and labels:
            rows.append([float(w) for w in words])
        elif rows:
            break
    return np.array(rows)[1:, labels.index(label)]


def fsc_counting_the_zero_plane_twice(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What RELION computes: sums over the half transform with every point counted once."""
    A, B = torch.fft.rfftn(a.double()), torch.fft.rfftn(b.double())
    D = a.shape[-1]
    k = torch.fft.fftfreq(D, 1 / D)
    radius = (k[:, None, None] ** 2 + k[None, :, None] ** 2 + torch.arange(D // 2 + 1) ** 2).sqrt().round().long()
    flat = radius.flatten().clamp(max=D)
    cross, pa, pb = (
        torch.bincount(flat, v.flatten(), minlength=D + 1)[1 : D // 2 + 1]
        for v in ((A * B.conj()).real, A.abs() ** 2, B.abs() ** 2)
    )
    return cross / (pa * pb).sqrt()


CASES = [
    ("postprocess_unmasked.star", "FourierShellCorrelationUnmaskedMaps", "half1", "half2", False),
    ("postprocess_masked.star", "FourierShellCorrelationUnmaskedMaps", "half1", "half2", False),
    ("postprocess_masked.star", "FourierShellCorrelationMaskedMaps", "half1", "half2", True),
    ("image_handler_fsc.txt", "FourierShellCorrelation", "half1", "half2", False),
    ("image_handler_fsc_recon_vs_truth.txt", "FourierShellCorrelation", "reconstruct", "volume", False),
]


@pytest.mark.parametrize(("file", "label", "first", "second", "masked"), CASES)
def test_fsc_against_relion(shared: Path, maps, file, label, first, second, masked):
    theirs = star_column(shared / "golden" / "relion" / file, label)
    mask = maps["mask"] if masked else None
    ours = shells.fsc(maps[first], maps[second], mask).numpy()
    assert len(ours) == 32
    assert np.abs(ours[: len(theirs)] - theirs).max() < 0.015
    a, b = (maps[n] * (maps["mask"] if masked else 1) for n in (first, second))
    emulated = fsc_counting_the_zero_plane_twice(a, b).numpy()
    assert np.abs(emulated[: len(theirs)] - theirs).max() < 1e-5


@pytest.mark.parametrize("name", ["unmasked", "masked"])
def test_cryobench_shells_against_cryodrgn(shared: Path, maps, name):
    theirs = np.loadtxt(shared / "golden" / "cryodrgn" / f"fsc_{name}.txt", skiprows=1)
    mask = maps["mask"] if name == "masked" else None
    ours = shells.fsc_cryobench(maps["half1"], maps["half2"], mask).numpy()
    assert len(ours) == len(theirs)
    assert np.abs(ours - theirs[:, 1]).max() < 2e-6


def test_fsc_is_the_full_sphere_sum():
    a, b = torch.randn(2, 16, 16, 16, dtype=torch.float64)
    A, B, index = fft3c(a), fft3c(b), shells.shell_index(16, 3)
    for r, value in enumerate(shells.fsc(a, b), start=1):
        shell = index == r
        expected = (A[shell] * B[shell].conj()).sum().real / (A[shell].norm() * B[shell].norm())
        assert torch.isclose(value, expected)


def test_fsc_properties():
    a, b = torch.randn(2, 24, 24, 24)
    assert torch.allclose(shells.fsc(a, 3 * a), torch.ones(12, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(shells.fsc(a, -a), -torch.ones(12, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(shells.fsc(a, b), shells.fsc(b, a))
    assert torch.equal(shells.fsc(a, torch.zeros_like(a)), torch.zeros(12, dtype=torch.float64))
    stack = shells.fsc(torch.stack([a, b]), a)
    assert stack.shape == (2, 12)
    assert torch.equal(stack[1], shells.fsc(b, a))
    with pytest.raises(ValueError, match="one size"):
        shells.fsc(a, torch.zeros(12, 12, 12))


def test_half_maps_of_known_noise_give_the_expected_correlation():
    """FSC = S/(S + N) for white signal and noise."""
    signal, n1, n2 = torch.randn(3, 32, 32, 32)
    curve = shells.fsc(signal + 0.5 * n1, signal + 0.5 * n2)[4:]
    assert abs(float(curve.mean()) - 0.8) < 0.02


def test_radial_mean():
    index = shells.shell_index(16, 2)
    assert index.shape == (16, 16) and index[8, 8] == 0 and index[8, 0] == 8 and index[0, 0] == 11
    values = torch.stack([index.double(), torch.ones(16, 16, dtype=torch.float64)])
    means = shells.radial_mean(values, index, 9)
    assert torch.allclose(means[0], torch.arange(9, dtype=torch.float64))
    assert torch.allclose(means[1], torch.ones(9, dtype=torch.float64))


def test_resolution_is_the_first_crossing_interpolated():
    curve = torch.tensor([1.0, 0.9, 0.4, 0.8, 0.1, 0.0, 0.0, 0.0])  # shells 1..8 of a box of 16
    # falls through 0.5 between shell 2 (0.9) and 3 (0.4), at r = 2.8
    assert shells.resolution(curve, 0.5, 16, 2.0) == pytest.approx(16 * 2.0 / 2.8)
    assert shells.resolution(torch.ones(8), 0.143, 16, 2.0) == 4.0
    assert shells.resolution(torch.zeros(8), 0.143, 16, 2.0) == 32.0
    assert shells.resolution(torch.tensor([1.0, float("nan")]), 0.5, 4, 1.0) == pytest.approx(4.0)


@pytest.mark.parametrize(("box_size", "maximum"), [(128, 0.492), (64, 0.484), (32, 0.469)])
def test_area_of_a_perfect_curve(box_size, maximum):
    assert float(shells.auc(torch.ones(box_size // 2), box_size)) == pytest.approx(maximum, abs=5e-4)
