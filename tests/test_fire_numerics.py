"""Numbers at their limits, whoever reads the images: NaN and infinity, dead pixels, constant images, ten orders of
magnitude, few bits, no defocus, shifts of half a box; and the same seed twice."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import reconstruct_toy as toy
import torch
from fire_toy import COMMANDS, run_twice, small_networks
from training_toy import Toy, ToyOptions, toy_particles

from cryosuite.data.images import ArrayImages
from cryosuite.data.loader import BatchLoader
from cryosuite.data.noise import noise_spectrum
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.data.spectra import measure_spectra
from cryosuite.data.workdir import RunDir, WorkDir
from cryosuite.errors import InputError
from cryosuite.formats.mrc import StackReader
from cryosuite.formats.pickles import write_pickle
from cryosuite.kernels import fourier
from cryosuite.kernels.ctf import CtfParams, ctf
from cryosuite.reconstruct.backproject import reconstruct
from cryosuite.training.inference import encode_all
from cryosuite.training.loop import fit
from cryosuite.training.options import TrainOptions

MODES = {"float16": 12, "int8": 0, "int16": 1, "uint16": 6}
BAD = {3: np.nan, 17: np.inf, 40: -np.inf}
TOLD = r"image.* \(0-based\): NaN or infinite pixels; left out"


def spoilt(particles: ParticleSet, bad: dict[int, float] = BAD) -> ParticleSet:
    """The same set with one broken pixel in some images."""
    images = particles.read(slice(None))
    for row, value in bad.items():
        images[row, 2, 3] = value
    return replace(particles, images=ArrayImages(images))


def without(particles: ParticleSet) -> ParticleSet:
    return particles.subset(np.setdiff1d(np.arange(len(particles)), list(BAD)))


@pytest.fixture(scope="module")
def noisy() -> ParticleSet:
    return toy.particles(n=120, noise=1.0)


# --- NaN and infinity -------------------------------------------------------------------------------------------------


def test_training_batches_have_other_images_in_place_of_broken_ones(noisy: ParticleSet) -> None:
    loader = BatchLoader(spoilt(noisy), 16, seed=1)
    with pytest.warns(UserWarning, match=TOLD):
        batches = list(loader.epoch(0))
    rows = np.concatenate([batch.index.numpy() for batch in batches])
    images = torch.cat([batch.images for batch in batches])
    assert len(rows) == 120 and set(rows) == set(range(120)) - BAD.keys()
    np.testing.assert_array_equal(images.numpy(), noisy.read(rows))  # each row with its own image
    assert np.flatnonzero(loader.broken.rows).tolist() == sorted(BAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(loader.epoch(1))  # told once


def test_latents_of_broken_images_are_not_numbers(tmp_path: Path) -> None:
    """A whole training goes on without them; their latents are NaN, which analyze names and leaves out."""
    particles = spoilt(toy_particles(100), {5: np.nan, 80: np.inf})
    method = Toy(ToyOptions())
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"images? 10[08][05].*left out"):
        z = encode_all(method, method.build(particles), particles, progress=False)
    assert np.flatnonzero(np.isnan(z).any(1)).tolist() == [5, 80] and np.isnan(z[[5, 80]]).all()


@pytest.mark.filterwarnings("ignore")
def test_a_training_goes_on_without_them(tmp_path: Path) -> None:
    options = TrainOptions(epochs=2, batch_size=20, accelerator="cpu", seed=0)
    result = fit(Toy(ToyOptions()), spoilt(toy_particles(100), {5: np.nan}), RunDir(tmp_path / "run"), options)
    assert np.isfinite(result.model[0].weight.detach().numpy()).all()


def test_the_latent_space_is_that_of_the_good_images() -> None:
    """Principal axes, bank and neighbours of latents of which some rows are NaN."""
    from cryosuite.methods.hype_latent import centres, nearest_rows, principal_axes

    z = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    good = np.setdiff1d(np.arange(200), [3, 150])
    holes = z.copy()
    holes[[3, 150]] = np.nan
    for name in ("mean", "components", "variances"):
        torch.testing.assert_close(getattr(principal_axes(holes), name), getattr(principal_axes(z[good]), name))
    np.testing.assert_array_equal(centres(holes, 5), centres(z[good], 5))
    np.testing.assert_array_equal(nearest_rows(holes, z[:9], 198), good[nearest_rows(z[good], z[:9], 198)])


def test_spectra_are_those_of_the_good_images(noisy: ParticleSet) -> None:
    rows = np.arange(len(noisy))
    with pytest.warns(UserWarning, match=TOLD):
        found = noise_spectrum(spoilt(noisy), rows)
    np.testing.assert_allclose(found, noise_spectrum(without(noisy), rows[:-3]), rtol=1e-6)
    with pytest.warns(UserWarning, match=TOLD):
        spectra = measure_spectra(spoilt(noisy), window=True)
    expected = measure_spectra(without(noisy), window=True)
    torch.testing.assert_close(spectra.signal, expected.signal, rtol=1e-5, atol=0)
    with pytest.raises(InputError, match="no image without NaN"), pytest.warns(UserWarning):
        noise_spectrum(spoilt(noisy, dict.fromkeys(range(120), np.nan)), rows)


def test_a_map_is_that_of_the_good_images(noisy: ParticleSet) -> None:
    halves = noisy.half_sets()
    noisy = replace(noisy, half=halves)
    with pytest.warns(UserWarning, match=TOLD):
        found = reconstruct(spoilt(noisy))
    torch.testing.assert_close(found.map, reconstruct(without(noisy)).map, rtol=0, atol=2e-5)


def test_dataset_yaml_names_no_more_broken_images_than_it_may_hold(
    noisy: ParticleSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand names would make a work directory that cannot be opened again."""
    monkeypatch.setattr("cryosuite.data.preprocess.LISTED", 2)
    with pytest.warns(UserWarning, match="images 3, 17, 40"):
        preprocess(spoilt(noisy), tmp_path, PreprocessOptions())
    said = WorkDir(tmp_path).read_dataset()
    assert (said["n_excluded"], said["excluded"], said["n_particles"]) == (3, [3, 17], 117)


# --- grey values ------------------------------------------------------------------------------------------------------


def stack_of(folder: Path, images: np.ndarray, particles: ParticleSet) -> Path:
    """Images of any type as a stack beside poses and CTF."""
    folder.mkdir(exist_ok=True, parents=True)
    with mrcfile.new(folder / "p.mrcs", overwrite=True) as mrc:
        mrc.set_data(images)
        mrc.voxel_size = toy.PIXEL
    write_pickle(folder / "poses.pkl", (particles.rotation, particles.shift))
    write_pickle(folder / "ctf.pkl", particles.ctf)
    return folder / "p.mrcs"


def prepared(folder: Path, images: np.ndarray, particles: ParticleSet) -> np.ndarray:
    """Images after preprocess."""
    path = stack_of(folder, images, particles)
    opened = open_particles(path, poses=folder / "poses.pkl", ctf=folder / "ctf.pkl", sign=1)
    preprocess(opened, folder / "work", PreprocessOptions())
    return open_particles(folder / "work").read(slice(None))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "scale", "error"), [
    ("float16", 1.0, 2e-3), ("int8", 12.0, 0.05), ("int16", 3000.0, 3e-4), ("uint16", 3000.0, 3e-4),
])  # fmt: skip
def test_stacks_of_few_bits_give_the_same_images(
    kind: str, scale: float, error: float, noisy: ParticleSet, tmp_path: Path
) -> None:
    """Modes 12, 0, 1 and 6: after preprocess the same as of float32 up to the rounding."""
    images = noisy.read(np.arange(20))
    images /= images.std()
    offset = 20_000 if kind == "uint16" else 0
    exact = prepared(tmp_path / "a", images, noisy.subset(np.arange(20)))
    stored = (images * scale + offset).round() if kind != "float16" else images
    found = prepared(tmp_path / "b", stored.astype(kind), noisy.subset(np.arange(20)))
    assert (
        StackReader(tmp_path / "b" / "p.mrcs").header.mode == {"float16": 12, "int8": 0, "int16": 1, "uint16": 6}[kind]
    )
    assert np.sqrt(np.square(found - exact).mean()) < error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("orders", [10, 50])
def test_orders_of_magnitude_between_images_do_not_matter(orders: int, noisy: ParticleSet, tmp_path: Path) -> None:
    """Half of the images 10^10 (and 10^50) times as bright as the others: after preprocess all are alike."""
    images, some = noisy.read(np.arange(20)), noisy.subset(np.arange(20))
    factor = np.where(np.arange(20) % 2, 10.0 ** (orders / 2), 10.0 ** (-orders / 2))[:, None, None]
    found = prepared(tmp_path / "b", (images * factor).astype(np.float32), some)
    np.testing.assert_allclose(found, prepared(tmp_path / "a", images, some), atol=2e-4)


@pytest.mark.filterwarnings("ignore")
def test_sets_of_other_intensity_in_one_backprojection(noisy: ParticleSet) -> None:
    """Two optics groups, ten orders of magnitude apart and not normalised: the map is finite, and that of the set
    whose grey values weigh least is not lost in the other's noise."""
    group = np.arange(len(noisy)) % 2
    images = noisy.read(slice(None)) * np.where(group, 1e5, 1e-5).astype(np.float32)[:, None, None]
    both = replace(noisy, images=ArrayImages(images), optics_group=group.astype(np.int32), noise=None)
    spectrum = noise_spectrum(both, np.arange(len(both)))
    assert 1e19 < np.median(spectrum[1] / spectrum[0]) < 1e21
    assert np.isfinite(reconstruct(both).map.numpy()).all()


@pytest.mark.filterwarnings("ignore")
def test_hot_and_dead_pixels(noisy: ParticleSet, tmp_path: Path) -> None:
    """A pixel at 10^4 standard deviations, a row of zeros: images stay finite and in the set, the others unchanged."""
    images, some = noisy.read(np.arange(20)), noisy.subset(np.arange(20))
    images /= images.std()
    exact = prepared(tmp_path / "a", images, some)
    images[4, 1, 1], images[5, :, 7] = 1e4, 0.0
    found = prepared(tmp_path / "b", images, some)
    assert found.shape == exact.shape and np.isfinite(found).all()
    others = np.setdiff1d(np.arange(20), [4, 5])
    np.testing.assert_array_equal(found[others], exact[others])
    assert np.abs(found[5] - exact[5]).mean() < 0.2


def test_constant_images(noisy: ParticleSet, tmp_path: Path) -> None:
    """Some are named and kept; a set of nothing else is refused by what needs a signal, without a traceback."""
    images, some = noisy.read(np.arange(20)), noisy.subset(np.arange(20))
    images[7] = 5.0
    with pytest.warns(UserWarning, match=r"image 7 \(0-based\): no variation outside the particle; kept \(1 in all\)"):
        found = prepared(tmp_path / "a", images, some)
    assert np.abs(found[7]).max() < 1e-5 and np.isfinite(found).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(reconstruct(replace(some, images=ArrayImages(images))).map.numpy()).all()
        flat = prepared(tmp_path / "b", np.full_like(images, 3.0), some)
        assert np.abs(flat).max() < 1e-5
        found = reconstruct(open_particles(tmp_path / "b" / "work"))
        assert np.isfinite(found.map.numpy()).all() and float(found.map.abs().max()) < 1e-6


# --- optics and shifts ------------------------------------------------------------------------------------------------


def test_a_ctf_without_defocus(noisy: ParticleSet) -> None:
    """In focus only the amplitude contrast is left at low frequencies: w, and no division by it."""
    table = noisy.ctf.copy()
    table[:, 2:4] = 0
    disc = fourier.half_disc(32)
    values = ctf(disc.frequency, CtfParams.from_table(torch.from_numpy(table)))
    assert torch.isfinite(values).all() and float((values[:, disc.shell == 1] - 0.1).abs().max()) < 1e-3
    found = reconstruct(replace(noisy, ctf=table))
    assert np.isfinite(found.map.numpy()).all()


def test_shifts_of_half_a_box() -> None:
    """Half a box and back is the same image; a stack rolled by half a box with such shifts gives the same map."""
    disc = fourier.half_disc(32)
    clean = toy.particles(n=60, shifts=0.0, with_ctf=False)
    images = torch.from_numpy(clean.read(slice(None)))
    half = torch.full((60, 2), 0.5)
    rolled = torch.roll(images, (16, 16), (1, 2))
    once = fourier.phase_shift(fourier.to_half_disc(images, disc), disc, half)
    torch.testing.assert_close(once, fourier.to_half_disc(rolled, disc), atol=1e-3, rtol=0)
    back = fourier.phase_shift(once, disc, half)
    torch.testing.assert_close(back, fourier.to_half_disc(images, disc), atol=1e-3, rtol=0)
    for sign in (1, -1):
        moved = replace(clean, images=ArrayImages(rolled.numpy()), shift=np.full((60, 2), 0.5 * sign, np.float32))
        torch.testing.assert_close(reconstruct(moved).map, reconstruct(clean).map, atol=1e-4, rtol=0)


# --- the same seed ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_same_seed_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command with a seed, twice in one process: nothing may depend on what ran before."""
    from cryosuite.cli import app

    monkeypatch.chdir(tmp_path)
    small_networks(monkeypatch)

    def call(words: list[str]) -> None:
        monkeypatch.setattr("sys.argv", ["cryosuite", *words])
        app(args=words, prog_name="cryosuite", standalone_mode=False)

    differ = {name: run_twice(name, call) for name in COMMANDS}
    assert {name: files for name, files in differ.items() if files} == {}
