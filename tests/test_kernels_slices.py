"""Slices: projections of known things, adjointness, symmetry, reconstruction, and RELION's own images and map."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from cryosuite.kernels import slices, slices_cpu
from cryosuite.kernels.ctf import CtfParams, ctf
from cryosuite.kernels.fourier import fft3c, from_half_disc, half_disc, phase_shift, to_half_disc
from cryosuite.kernels.rotations import euler_to_matrix, random_rotations
from cryosuite.kernels.shells import fsc, radial_mean, shell_index
from cryosuite.reconstruct.solve import solve

F64 = torch.float64


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["loops", "torch"])
def path(request, monkeypatch) -> str:
    """Run a test on the compiled loops and on the torch code that GPUs and gradients use."""
    if request.param == "torch":
        monkeypatch.setattr(slices_cpu, "available", lambda: False)
    return request.param


def blobs(box_size: int, n: int = 12, seed: int = 0, dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres (n, 3) in pixels from the origin and weights (n,) of a cloud inside a third of the box."""
    generator = torch.Generator().manual_seed(seed)
    centres = (torch.rand(n, 3, generator=generator, dtype=F64) - 0.5) * box_size / 2.5
    return centres.to(dtype), (0.5 + torch.rand(n, generator=generator, dtype=F64)).to(dtype)


def blob_volume(centres: torch.Tensor, weights: torch.Tensor, box_size: int, sigma: float) -> torch.Tensor:
    axis = torch.arange(box_size, dtype=centres.dtype) - box_size // 2
    x, y, z = (torch.exp(-((axis - c[:, None]) ** 2) / (2 * sigma**2)) for c in centres.T)
    return torch.einsum("n,nz,ny,nx->zyx", weights, z, y, x) / (2 * np.pi * sigma**2) ** 1.5


def blob_slices(centres, weights, rotation, disc, sigma: float) -> torch.Tensor:
    """Exact transform of the projections of Gaussians."""
    xy = torch.einsum("bij,nj->bni", rotation, centres)[..., :2]
    k = disc.frequency_as(centres.dtype)
    envelope = torch.exp(-2 * np.pi**2 * sigma**2 * (k**2).sum(1))
    return (weights[:, None] * torch.exp(-2j * np.pi * (xy @ k.T))).sum(1) * envelope


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Per row, over the half disc."""
    return (a * b.conj()).real.sum(-1) / (a.abs().square().sum(-1) * b.abs().square().sum(-1)).sqrt()


def test_a_point_projects_to_where_the_rotation_takes_it(path):
    D, sigma = 32, 1.5
    R = random_rotations(20, dtype=F64)
    point = torch.tensor([[6.0, -3.0, 5.0]], dtype=F64)
    transform = slices.volume_transform(blob_volume(point, torch.ones(1, dtype=F64), D, sigma))
    disc = half_disc(D)
    images = from_half_disc(slices.extract_slices(transform, R, disc), disc)
    images = images - images.amin((-1, -2), keepdim=True)
    power = images**2  # squares away the ripple of the interpolation
    axis = torch.arange(D, dtype=F64) - D // 2
    total = power.sum((-1, -2))
    found = torch.stack([(power.sum(-2) @ axis) / total, (power.sum(-1) @ axis) / total], 1)
    assert (found - (R @ point[0])[:, :2]).abs().max() < 0.3


def test_slices_are_transforms_of_projections(path):
    D, sigma = 48, 1.2
    centres, weights = blobs(D)
    R, disc = random_rotations(30, dtype=F64), half_disc(D)
    ours = slices.extract_slices(slices.volume_transform(blob_volume(centres, weights, D, sigma)), R, disc)
    exact = blob_slices(centres, weights, R, disc, sigma)
    assert correlation(ours, exact).min() > 0.9995
    scale = (ours * exact.conj()).real.sum() / exact.abs().square().sum()
    assert abs(scale - 1) < 0.005


def test_an_unrotated_slice_is_the_sum_over_z(path):
    volume = blob_volume(*blobs(32), 32, 1.5)
    disc = half_disc(32)
    ours = slices.extract_slices(slices.volume_transform(volume, correct_gridding=False), torch.eye(3)[None], disc)
    assert torch.allclose(ours, to_half_disc(volume.sum(0)[None], disc), atol=1e-9)


def test_loops_and_torch_agree_bit_for_rounding():
    D, pad = 24, 2
    disc, R = half_disc(D, 10), random_rotations(9)
    volumes = torch.randn(3, D, D, D)
    which = torch.arange(9) % 3
    transform = slices.volume_transform(volumes, pad)
    fast = slices.extract_slices(transform, R, disc, pad, which)
    slow = slices.extract_slices(transform.clone().requires_grad_(), R, disc, pad, which).detach()
    assert fast.dtype == torch.complex64
    assert (fast - slow).abs().max() < 1e-5 * slow.abs().max()
    values, weights = torch.randn_like(fast), torch.rand(fast.shape)
    first = slices.insert_slices(slices.new_accumulator(D, pad), values, weights, R, disc)
    second = slices.new_accumulator(D, pad)
    original = slices_cpu.available
    try:
        slices_cpu.available = lambda: False
        slices.insert_slices(second, values, weights, R, disc)
    finally:
        slices_cpu.available = original
    assert (first.data - second.data).abs().max() < 1e-5 * second.data.abs().max()


def test_half_precision_of_a_network_moves_no_frequency():
    disc, R = half_disc(24), random_rotations(4)
    transform = slices.volume_transform(torch.randn(24, 24, 24)).requires_grad_()  # gradients: without the loops
    wanted = slices.extract_slices(transform, R, disc)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(slices.extract_slices(transform, R, disc), wanted)


def test_insertion_is_the_adjoint_of_extraction(path):
    D, disc, R = 16, half_disc(16), random_rotations(40, dtype=F64)
    acc = slices.new_accumulator(D, dtype=F64)
    x = torch.randn(*acc.data.shape[:3], 2, dtype=F64)
    y = torch.randn(40, len(disc), dtype=torch.complex128)
    Ax = slices.extract_slices(x, R, disc)
    slices.insert_slices(acc, y, torch.ones(y.shape, dtype=F64), R, disc)
    assert torch.isclose((torch.view_as_real(Ax) * torch.view_as_real(y)).sum(), (x * acc.data[..., :2]).sum())
    # the weights are spread by the same shares: every sample leaves its weight
    assert torch.isclose(acc.data[..., 2].sum(), torch.tensor(float(y.numel()), dtype=F64))


def test_frequencies_beyond_nyquist_and_nan_are_left_out(path):
    disc = half_disc(16)
    acc = slices.new_accumulator(16)
    ones = torch.ones(2, len(disc))
    stretched = torch.stack([1.5 * torch.eye(3), torch.full((3, 3), float("nan"))])
    slices.insert_slices(acc, ones + 0j, ones, stretched, disc)
    inside = int((disc.radius * 1.5 <= 8).sum())
    assert float(acc.data[..., 2].sum()) == pytest.approx(inside, rel=1e-5)
    read = slices.extract_slices(torch.ones(*acc.data.shape[:3], 2), stretched, disc)
    assert int((read != 0).sum()) == inside


def test_volume_index_chooses_the_volume(path):
    volumes = torch.randn(3, 16, 16, 16)
    R, disc = random_rotations(4), half_disc(16)
    transform = slices.volume_transform(volumes)
    which = torch.tensor([2, 0, 2, 1])
    ours = slices.extract_slices(transform, R, disc, volume_index=which)
    for i, k in enumerate(which):
        alone = slices.extract_slices(transform[k], R[i : i + 1], disc)
        assert torch.allclose(ours[i], alone[0], atol=1e-4)
    with pytest.raises(ValueError, match="volume_index"):
        slices.extract_slices(transform, R, disc)


def test_gradients_in_volume_and_rotation():
    disc, R = half_disc(8, 3), random_rotations(2, dtype=F64)
    volume = torch.randn(8, 8, 8, dtype=F64, requires_grad=True)
    extract = lambda v, r: slices.extract_slices(slices.volume_transform(v), r, disc)  # noqa: E731
    assert torch.autograd.gradcheck(extract, (volume, R.clone().requires_grad_()), eps=1e-7, atol=1e-4)


def test_projections_of_a_volume_give_it_back(path):
    D = 24
    volume = blob_volume(*blobs(D), D, 1.3).float()
    disc, R = half_disc(D), random_rotations(1500)
    images = slices.extract_slices(slices.volume_transform(volume), R, disc)
    acc = slices.insert_slices(slices.new_accumulator(D), images, torch.ones(images.shape), R, disc)
    ours = solve(acc, 1e-3)
    assert ours.dtype == torch.float32 and ours.shape == (D, D, D)
    assert fsc(ours, volume)[: D // 2 - 2].min() > 0.99
    assert float((ours * volume).sum() / (volume * volume).sum()) == pytest.approx(1, abs=0.01)
    # the mean, which no slice holds, follows from the empty surroundings
    assert float(ours.sum()) == pytest.approx(float(volume.sum()), rel=0.15)


def test_two_halves_make_the_whole():
    D = 16
    disc, R = half_disc(D), random_rotations(200)
    values = torch.randn(200, len(disc), dtype=torch.complex64)
    weights = torch.rand(values.shape)
    insert = lambda rows: slices.insert_slices(  # noqa: E731
        slices.new_accumulator(D), values[rows], weights[rows], R[rows], disc
    )
    parts, whole = [insert(slice(i, None, 2)) for i in (0, 1)], insert(slice(None))
    assert torch.allclose((parts[0] + parts[1]).data, whole.data, atol=1e-4)
    with pytest.raises(ValueError, match="one box size"):
        whole + slices.new_accumulator(24)


def test_reconstruction_does_not_depend_on_which_friedel_mate_is_inserted(path):
    """Slices seen from behind (rotated by 180 degrees about y, mirrored) hold the same coefficients."""
    D = 16
    disc, R = half_disc(D), random_rotations(60)
    values = torch.randn(60, len(disc), dtype=torch.complex64)
    ones = torch.ones(values.shape)
    flip = torch.tensor([[-1.0, 0, 0], [0, -1, 0], [0, 0, 1]])  # k -> -k: the coefficients become conjugates
    one = slices.insert_slices(slices.new_accumulator(D), values, ones, R, disc)
    other = slices.insert_slices(slices.new_accumulator(D), values.conj(), ones, flip @ R, disc)
    a, b = solve(one, 1e-3), solve(other, 1e-3)
    assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_a_regulariser_per_shell_shrinks_what_it_names():
    D = 16
    disc, R = half_disc(D), random_rotations(300)
    noise = torch.randn(300, len(disc), dtype=torch.complex64)
    acc = slices.insert_slices(slices.new_accumulator(D), noise, torch.ones(noise.shape), R, disc)
    strong = torch.full((9,), 1e-6)
    strong[5:] = 1e3
    maps = [solve(acc, fraction, passes=0, sphere=False) for fraction in (1e-6, strong)]
    index = shell_index(D, 3)
    powers = [radial_mean(fft3c(v).abs() ** 2, index, 9) for v in maps]
    assert (powers[1][2:4] / powers[0][2:4] > 0.7).all()  # cropping the padded box mixes neighbouring shells
    assert (powers[1][6:8] / powers[0][6:8] < 0.05).all()


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="even"):
        slices.new_accumulator(15)
    with pytest.raises(ValueError, match="cubic"):
        slices.volume_transform(torch.zeros(8, 8, 6))
    with pytest.raises(ValueError, match="does not fit"):
        slices.extract_slices(slices.volume_transform(torch.zeros(8, 8, 8)), torch.eye(3)[None], half_disc(16))


# ---- RELION's own images and map ------------------------------------------------------------------------------------


def relion_set(folder: Path) -> dict[str, torch.Tensor | CtfParams]:
    """Images, poses and CTF of the golden particle set, parsed by hand (a room may not lean on another's reader)."""
    tables: dict[str, list[dict[str, str]]] = {}
    for line in (folder / "particles.star").read_text().splitlines():
        words = line.split()
        if not words or words[0].startswith(("#", "loop_")):
            continue
        if words[0].startswith("data_"):
            rows, labels = tables.setdefault(words[0], []), []
        elif words[0].startswith("_rln"):
            labels.append(words[0][4:])
        else:
            rows.append(dict(zip(labels, words, strict=True)))
    optics = {row["OpticsGroup"]: row for row in tables["data_optics"]}
    rows = [{**row, **optics[row["OpticsGroup"]]} for row in tables["data_particles"]]
    get = lambda *names: torch.tensor([[float(row[n]) for n in names] for row in rows], dtype=F64).squeeze(1)  # noqa: E731
    table = get(
        "ImageSize",
        "ImagePixelSize",
        "DefocusU",
        "DefocusV",
        "DefocusAngle",
        "Voltage",
        "SphericalAberration",
        "AmplitudeContrast",
        "PhaseShift",
    )
    shift = get("OriginXAngst", "OriginYAngst") / get("ImagePixelSize", "ImageSize").prod(1, keepdim=True)
    return {
        "images": torch.tensor(mrcfile.read(folder / "particles.mrcs")),
        "rotation": euler_to_matrix(get("AngleRot", "AngleTilt", "AnglePsi")),
        "shift": shift,
        "ctf": CtfParams.from_table(table),
    }


@pytest.fixture(scope="module")
def relion(shared: Path):
    folder = shared / "golden" / "relion"
    data = relion_set(folder)
    disc = half_disc(64)
    data["coeffs"] = phase_shift(to_half_disc(data["images"], disc), disc, data["shift"].float())
    data["volume"] = torch.tensor(mrcfile.read(folder / "volume.mrc"))
    data["reconstruct"] = torch.tensor(mrcfile.read(folder / "reconstruct.mrc"))
    data["blobs"] = dict(np.load(folder / "blobs.npz"))
    return data


def test_relion_images_are_ctf_times_projection(relion):
    disc = half_disc(64)
    frequency, model = disc.frequency_as(F64), relion["blobs"]
    xy = torch.einsum("bij,nj->bni", relion["rotation"], torch.from_numpy(model["centres_px_xyz"]))[..., :2]
    sigma, weight = torch.from_numpy(model["sigma_px"]), torch.from_numpy(model["weight"])
    # weight is the height of a three-dimensional Gaussian
    amplitude = weight * (2 * np.pi * sigma**2) ** 1.5
    envelope = amplitude[:, None] * torch.exp(-2 * np.pi**2 * sigma[:, None] ** 2 * (frequency**2).sum(1))
    exact = torch.stack([(envelope * torch.exp(-2j * np.pi * (c @ frequency.T))).sum(0) for c in xy])
    exact = exact * ctf(frequency, relion["ctf"])
    assert correlation(relion["coeffs"], exact).min() > 0.999
    scale = (relion["coeffs"] * exact.conj()).real.sum() / exact.abs().square().sum()
    assert abs(scale - 1) < 0.01


def test_our_projections_match_relions(relion):
    disc = half_disc(64)
    projections = slices.extract_slices(slices.volume_transform(relion["volume"]), relion["rotation"].float(), disc)
    modelled = projections * ctf(disc.frequency, relion["ctf"])
    assert correlation(relion["coeffs"], modelled).min() > 0.999
    # both interpolate trilinearly: the images are the same to single precision times a little
    assert (relion["coeffs"] - modelled).abs().max() < 1e-3 * modelled.abs().max()


def reconstruct(relion) -> torch.Tensor:
    disc = half_disc(64)
    transfer = ctf(disc.frequency, relion["ctf"])
    acc = slices.new_accumulator(64)
    slices.insert_slices(acc, relion["coeffs"] * transfer, transfer**2, relion["rotation"].float(), disc)
    return solve(acc, 1e-3)


def test_reconstruction_of_relions_images(relion):
    ours = reconstruct(relion)
    truth, theirs = fsc(ours, relion["volume"]), fsc(ours, relion["reconstruct"])
    assert truth[:16].min() > 0.99 and theirs[:16].min() > 0.99  # to 0.25 cycles/px
    axis = torch.arange(64) - 32
    inside = (axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2) < 30**2
    assert np.corrcoef(ours[inside], relion["volume"][inside])[0, 1] > 0.999
    scale = (ours * relion["volume"]).sum() / relion["volume"].square().sum()
    assert abs(scale - 1) < 0.01


def test_backprojection_by_cryodrgns_rules_gives_cryodrgns_map(relion, shared: Path):
    """No padding, weights + their shell mean, no gridding correction; shifts exact. Density is positive."""
    disc = half_disc(64)
    transfer = ctf(disc.frequency, relion["ctf"])
    acc = slices.new_accumulator(64, pad=1)
    slices.insert_slices(acc, relion["coeffs"] * transfer, transfer**2, relion["rotation"].float(), disc)
    ours = solve(acc, 1.0, passes=0, sphere=False)
    kernel = torch.sinc((torch.arange(64) - 32) / 64) ** 2
    ours = ours * kernel[:, None, None] * kernel[None, :, None] * kernel
    theirs = torch.tensor(mrcfile.read(shared / "golden" / "cryodrgn" / "backproject_exact_shift.mrc"))
    assert fsc(ours, theirs)[:25].min() > 0.97
    assert fsc(reconstruct(relion), theirs)[:23].min() > 0.95
