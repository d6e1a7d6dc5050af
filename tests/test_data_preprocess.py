"""The preprocessing pipeline: what comes out means what it says."""

from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest

from cryosuite.data.contrast import as_normal, contrast_score
from cryosuite.data.crop import fourier_crop
from cryosuite.data.images import ArrayImages
from cryosuite.data.noise import NoiseEstimator, radius_map
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.preprocess import PreprocessOptions, normalise, preprocess, target
from cryosuite.errors import InputError
from cryosuite.formats.mrc import read_header, read_map
from cryosuite.formats.pickles import read_ctf, read_indices, read_poses
from cryosuite.formats.star import particle_tables, read_star, write_star


def blobs(n: int, D: int = 32, snr: float = 0.1, sign: int = 1, seed: int = 0, pixel_size: float = 6.0) -> ParticleSet:
    """Gaussian particles behind a CTF under white noise; snr is that of the particle without CTF."""
    torch = pytest.importorskip("torch")
    from cryosuite.kernels.ctf import CtfParams, ctf

    rng = np.random.default_rng(seed)
    table = np.zeros((n, 9), np.float32)
    defocus = rng.uniform(8000, 25000, n)
    table[:, 0], table[:, 1], table[:, 2], table[:, 3], table[:, 5:8] = D, pixel_size, defocus, defocus, (300, 2.7, 0.1)
    shift = rng.uniform(-0.1, 0.1, (n, 2)).astype(np.float32)
    axis = np.arange(D) - D // 2
    x, y = axis[None, None, :] + shift[:, 0, None, None] * D, axis[None, :, None] + shift[:, 1, None, None] * D
    clean = np.exp(-(x**2 + y**2) / (2 * (D / 10) ** 2))
    kx, ky = np.meshgrid(np.fft.rfftfreq(D), np.fft.fftfreq(D))
    frequency = torch.from_numpy(np.stack([kx.ravel(), ky.ravel()], 1))
    transfer = ctf(frequency, CtfParams.from_table(torch.from_numpy(table))).numpy().reshape(n, *kx.shape)
    images = np.fft.irfft2(np.fft.rfft2(clean) * transfer, s=(D, D))
    images = sign * images + rng.standard_normal(images.shape) * clean.std() / np.sqrt(snr)
    return ParticleSet.from_array(images.astype(np.float32), pixel_size, ctf=table, shift=shift)


@pytest.mark.parametrize(("D", "d"), [(64, 32), (48, 48), (64, 62), (400, 32)])
def test_crop_equals_the_kernels(D, d):
    torch = pytest.importorskip("torch")
    from cryosuite.kernels.fourier import fourier_crop as kernel

    images = np.random.default_rng(0).standard_normal((3, D, D)).astype(np.float32) + 2
    ours = fourier_crop(images, d)
    assert np.abs(ours - kernel(torch.from_numpy(images), d).numpy()).max() < 2e-5
    assert np.allclose(ours.mean(axis=(1, 2)), images.mean(axis=(1, 2)), atol=1e-5)


def test_crop_agrees_with_cryodrgn_below_nyquist(golden):
    rows = read_indices(golden / "cryodrgn/ind_first50.pkl")
    ours = fourier_crop(open_particles(golden / "relion/particles.star").read(rows), 32)
    theirs = open_particles(golden / "cryodrgn/particles.32.mrcs", need_poses=False, need_ctf=False).read(rows)
    a, b = np.fft.rfft2(ours), np.fft.rfft2(theirs)
    keep = np.ones(a.shape[1:], bool)
    keep[16], keep[:, 16] = False, False
    scale = 64**2 / 32**2  # their crops change the grey values
    assert np.abs(a * scale - b)[:, keep].max() < 1e-5 * np.abs(b).max()


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_white_noise_has_a_flat_spectrum(scale):
    noise = np.random.default_rng(0).standard_normal((400, 64, 64)).astype(np.float32) * scale + 5 * scale
    estimator = NoiseEstimator(64, 1)
    estimator.add(noise, np.zeros(400, int))
    spectrum = estimator.spectrum()
    assert spectrum.shape == (1, 33)
    assert np.allclose(spectrum[0, 2:] / (scale * 64) ** 2, 1, atol=0.05)


def test_coloured_noise_is_measured_per_group_whatever_the_particle():
    rng, D = np.random.default_rng(1), 64
    radius = np.hypot(*np.meshgrid(np.fft.rfftfreq(D) * D, np.fft.fftfreq(D) * D))
    powers = [400 / (1 + (radius / 8) ** 2) + 20, 100 * np.ones_like(radius)]
    estimator = NoiseEstimator(D, 3)
    particle = 1000 * (radius_map(D) < 18)
    for group, power in enumerate(powers):
        white = np.fft.rfft2(rng.standard_normal((1000, D, D)))
        images = np.fft.irfft2(white * np.sqrt(power) / D, s=(D, D)) + particle
        estimator.add(images.astype(np.float32), np.full(1000, group), radius=22)
    spectrum = estimator.spectrum()
    shells = np.rint(radius).astype(int)
    for group, power in enumerate(powers):
        truth = np.array([power[shells == r].mean() for r in range(D // 2 + 1)])
        assert np.abs(spectrum[group, 3:] / truth[3:] - 1).max() < 0.08
    assert np.allclose(spectrum[2], spectrum[:2].mean(axis=0))  # a group without images


def test_normalised_background_has_mean_zero_and_sd_one():
    rng = np.random.default_rng(0)
    images = (rng.standard_normal((20, 32, 32)) * 7 + 1000).astype(np.float32)
    outside = radius_map(32) > 12
    flat = normalise(images, outside, flip=True)
    assert not flat.any()
    assert np.allclose(images[:, outside].mean(axis=1), 0, atol=1e-4)
    assert np.allclose(images[:, outside].std(axis=1), 1, atol=1e-3)


def test_constant_images_are_not_divided_by_zero():
    images = np.stack([np.full((16, 16), 5.3), np.zeros((16, 16)), np.eye(16)]).astype(np.float32)
    flat = normalise(images, radius_map(16) > 6)
    assert flat.tolist() == [True, True, False]
    assert np.abs(images[:2]).max() < 1e-5


@pytest.mark.parametrize("sign", [1, -1])
def test_contrast_is_found_from_noisy_images(sign):
    assert sign * contrast_score(blobs(400, snr=0.05, sign=sign)) > 8
    particles = blobs(400, snr=0.05, sign=sign)
    particles.ctf = None
    assert sign * contrast_score(particles) > 4


def test_contrast_of_pure_noise_is_not_found():
    scores = [contrast_score(blobs(200, snr=1e-9, seed=seed)) for seed in range(20)]
    assert np.abs(scores).max() < 4
    assert 0.6 < np.std(scores) < 1.5  # the score is in standard errors


def test_a_handful_of_images_proves_little():
    assert abs(contrast_score(blobs(3, snr=0.3))) < 4
    assert as_normal(5.0, 3) == pytest.approx(2.08, abs=0.01)  # one-sided p = 0.0189
    assert as_normal(-5.0, 5000) == -5.0


def test_a_star_becomes_a_work_directory(golden, tmp_path):
    source = open_particles(golden / "relion/particles.star")
    done = preprocess(source, tmp_path / "w", PreprocessOptions(32))
    work = open_particles(tmp_path / "w")
    assert (len(work), work.box_size, work.normalised) == (200, 32, True)
    assert np.allclose(work.pixel_size, 6.0)
    assert np.array_equal(work.rotation, source.rotation)
    assert np.array_equal(work.shift, source.shift)  # a fraction of the box
    assert np.array_equal(work.half, source.half)
    assert np.array_equal(work.optics_group, source.optics_group)
    assert np.allclose(work.ctf[:, :2], [32, 6.0])
    assert np.array_equal(work.ctf[:, 2:], source.ctf[:, 2:])
    assert read_header(tmp_path / "w/particles.mrcs").pixel_size == pytest.approx(6.0)
    cropped, images = fourier_crop(source.read(np.arange(5)), 32), work.read(np.arange(5))
    for a, b in zip(cropped, images, strict=True):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99999
    assert done.sign == 1
    # the star beside the stack says the same, to other programs
    star = open_particles(tmp_path / "w/particles.star")
    assert np.abs(star.rotation - work.rotation).max() < 1e-6
    assert np.abs(star.shift - work.shift).max() < 1e-6
    assert np.allclose(star.ctf, work.ctf, rtol=1e-6)
    assert np.array_equal(star.read(np.arange(5)), images)


def test_cryodrgn_reads_the_pickles(golden, tmp_path):
    preprocess(open_particles(golden / "relion/particles.star"), tmp_path / "w", PreprocessOptions(32))
    rotation, shift = read_poses(tmp_path / "w/poses.pkl", 200)
    theirs = read_poses(golden / "cryodrgn/pose.pkl")
    assert np.abs(rotation - theirs[0]).max() < 1e-6
    assert np.abs(shift - theirs[1]).max() < 1e-6
    assert read_ctf(tmp_path / "w/ctf.pkl", 200)[0, :2].tolist() == [32, 6.0]


def test_foreign_columns_and_blocks_survive(golden, tmp_path):
    source = open_particles(golden / "adversarial/multiple_blocks.star")
    preprocess(source, tmp_path / "w", PreprocessOptions())
    blocks = read_star(tmp_path / "w/particles.star")
    assert list(blocks["extra"]["rlnB"]) == [i * i for i in range(24)]
    assert blocks["general"]["rlnCustomKey"].iloc[0] == "value1"
    assert set(blocks["particles"]["rlnMicrographName"]) == {"mic0.mrc", "mic1.mrc"}
    assert blocks["particles"]["rlnImageOriginalName"].iloc[2] == "000003@good.mrcs"


def test_the_30_form_is_written_as_31(golden, tmp_path):
    source = open_particles(golden / "adversarial/no_optics_v30.star")
    preprocess(source, tmp_path / "w", PreprocessOptions())
    tables = particle_tables(tmp_path / "w/particles.star")
    assert tables.optics["rlnImagePixelSize"].tolist() == [2.5]
    assert not {"rlnMagnification", "rlnOriginX", "rlnVoltage"} & set(tables.particles.columns)
    assert np.abs(open_particles(tmp_path / "w/particles.star").shift - source.shift).max() < 1e-6


def test_a_cs_becomes_a_work_directory(golden, tmp_path):
    source = open_particles(golden / "adversarial/good.cs")
    preprocess(source, tmp_path / "w", PreprocessOptions(16))
    work = open_particles(tmp_path / "w")
    assert (work.sign, work.dataset["sign"], work.dataset["sign_from"]) == (1, -1, "blob/sign")
    cropped = fourier_crop(source.read(np.arange(8)), 16)  # sign applied: white
    for a, b in zip(cropped, work.read(np.arange(8)), strict=True):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.9999
    assert np.abs(open_particles(tmp_path / "w/particles.star").rotation - source.rotation).max() < 1e-6


def test_dark_particles_become_white_and_it_is_said(tmp_path):
    particles = blobs(600, snr=0.1, sign=-1)
    with pytest.warns(UserWarning, match="dark in the stack.*found from the images"):
        preprocess(particles, tmp_path / "w", PreprocessOptions())
    work = open_particles(tmp_path / "w", need_poses=False)
    assert (work.dataset["sign"], work.dataset["sign_from"]) == (-1, "data")
    assert contrast_score(work) > 8


def test_a_stated_sign_wins_but_a_contradiction_is_told(tmp_path):
    particles = blobs(600, snr=0.1)
    particles.sign, particles.sign_from = -1, "option"
    with pytest.warns(UserWarning, match="the images look white"):
        preprocess(particles, tmp_path / "w", PreprocessOptions())
    assert open_particles(tmp_path / "w", need_poses=False).dataset["sign"] == -1


def test_noise_of_the_work_directory_is_that_of_its_images(tmp_path):
    preprocess(blobs(600, D=64, snr=0.02), tmp_path / "w", PreprocessOptions(32))
    work = open_particles(tmp_path / "w", need_poses=False)
    assert work.noise.shape == (1, 17)
    power = np.square(np.abs(np.fft.fft2(work.read(slice(None))))).mean(axis=0)
    assert np.median(work.noise[0, 8:]) == pytest.approx(np.median(power), rel=0.1)
    assert np.median(work.noise) == pytest.approx(32**2, rel=0.1)


@pytest.mark.parametrize(
    ("name", "message", "kept"),
    [
        ("nan_image.mrcs", r"image 3 \(0-based\): NaN", [0, 1, 2, 4, 5, 6, 7]),
        ("inf_pixel.mrcs", r"images 1 and 6 \(0-based\): NaN", [0, 2, 3, 4, 5, 7]),
        ("constant_image.mrcs", r"image 2 \(0-based\): no variation", list(range(8))),
    ],
)
def test_broken_images(golden, tmp_path, name, message, kept):
    source = open_particles(golden / "adversarial" / name, need_poses=False, need_ctf=False)
    with pytest.warns(UserWarning, match=message):
        preprocess(source, tmp_path / "w", PreprocessOptions())
    work = open_particles(tmp_path / "w", need_poses=False, need_ctf=False)
    assert work.index.tolist() == kept
    assert np.isfinite(work.read(slice(None))).all()


def test_original_indices_survive_two_rounds_and_select(golden, tmp_path):
    first = open_particles(golden / "relion/particles.star", ind=np.arange(50, 150))
    preprocess(first, tmp_path / "a", PreprocessOptions(48))
    again = open_particles(tmp_path / "a", ind=np.arange(60, 160, 2))  # 150..158 were never in
    preprocess(again, tmp_path / "b", PreprocessOptions(32))
    second = open_particles(tmp_path / "b")
    assert second.index.tolist() == list(range(60, 150, 2))
    assert second.dataset["source_particles"] == 200
    whole = open_particles(golden / "relion/particles.star")
    assert np.array_equal(second.rotation, whole.rotation[second.index])
    with pytest.raises(InputError, match="none of its"):
        open_particles(tmp_path / "b", ind=np.array([0, 1]))


def test_boxes_of_one_field_of_view_are_brought_together():
    images = ArrayImages(np.zeros((4, 8, 8), np.float32))
    boxes = np.array([128, 128, 192, 192], np.int32)
    same = ParticleSet(images, 192, np.array([1.5, 1.5, 1.0, 1.0]), box_sizes=boxes)
    size, pixel_size = target(same, 64)
    assert size == 64
    assert np.allclose(pixel_size, 3.0)
    other = ParticleSet(images, 192, np.array([1.5, 1.5, 1.01, 1.01]), box_sizes=boxes)
    with pytest.raises(InputError, match="box 128 at 1.5 A spans 192 A.*Extract"):
        target(other, 64)


def test_two_boxes_end_to_end(golden, tmp_path):
    """The same views at 64 px / 3 A and cropped to 48 px / 4 A, in one star, come out the same."""
    from cryosuite.formats.mrc import StackWriter

    whole = open_particles(golden / "relion/particles.star")
    for name, D, rows in (("a.mrcs", 64, range(10)), ("b.mrcs", 48, range(10))):
        with StackWriter(tmp_path / name, 10, D, 192 / D) as writer:
            writer.write(fourier_crop(whole.read(np.array(rows)), D))
    blocks = read_star(golden / "relion/particles.star")
    optics, table = blocks["optics"], blocks["particles"].iloc[list(range(10)) * 2].reset_index(drop=True)
    table["rlnImageName"] = [f"{i % 10 + 1:06d}@{'a' if i < 10 else 'b'}.mrcs" for i in range(20)]
    table["rlnOpticsGroup"] = [1] * 10 + [2] * 10
    optics["rlnImageSize"], optics["rlnImagePixelSize"] = [64, 48], [3.0, 4.0]
    write_star(tmp_path / "mixed.star", {"optics": optics, "particles": table})
    with pytest.raises(InputError, match="different box sizes.*preprocess"):
        open_particles(tmp_path / "mixed.star")
    preprocess(open_particles(tmp_path / "mixed.star", mixed_boxes=True), tmp_path / "w", PreprocessOptions(32))
    work = open_particles(tmp_path / "w")
    assert np.allclose(work.pixel_size, 6.0)
    images = work.read(slice(None))
    assert np.abs(images[:10] - images[10:]).max() < 0.02 * images.std()
    assert np.abs(work.shift[:10] - work.shift[10:]).max() < 1e-6


@pytest.mark.parametrize(("D", "message"), [(31, "even"), (66, "larger than the images"), (0, "even")])
def test_impossible_boxes_are_refused(golden, tmp_path, D, message):
    with pytest.raises(InputError, match=message):
        preprocess(open_particles(golden / "relion/particles.star"), tmp_path / "w", PreprocessOptions(D))
    assert not (tmp_path / "w").exists()


def test_a_particle_as_large_as_the_box_is_refused(golden, tmp_path):
    with pytest.raises(InputError, match="smaller than the box, which is 192 A"):
        preprocess(
            open_particles(golden / "relion/particles.star"), tmp_path / "w", PreprocessOptions(32, diameter=200)
        )


def test_a_failure_leaves_no_particle_set(golden, tmp_path, monkeypatch):
    source = open_particles(golden / "relion/particles.star")
    preprocess(source, tmp_path / "w", PreprocessOptions(32))

    def fail(*_: object) -> None:
        raise InputError("no more")

    monkeypatch.setattr("cryosuite.data.work_files.write_pickle", fail)
    with pytest.raises(InputError, match="no more"):
        preprocess(source, tmp_path / "w", PreprocessOptions(48))
    with pytest.raises(InputError, match="not a work directory"):
        open_particles(tmp_path / "w")


def test_float16_keeps_three_digits(golden, tmp_path):
    source = open_particles(golden / "relion/particles.star")
    for dtype in ("float32", "float16"):
        preprocess(source, tmp_path / dtype, PreprocessOptions(32, dtype=dtype))
    a, b = (open_particles(tmp_path / dtype).read(np.arange(20)) for dtype in ("float32", "float16"))
    assert 0 < np.abs(a - b).max() < 2e-3 * np.abs(a).max()
    assert (tmp_path / "float16/particles.mrcs").stat().st_size < 0.51 * (
        tmp_path / "float32/particles.mrcs"
    ).stat().st_size


def test_images_to_measure_noise_by_may_all_be_empty(tmp_path, monkeypatch):
    """Of a large set only every n-th image is asked."""
    monkeypatch.setattr("cryosuite.data.preprocess.NOISE_IMAGES", 4)
    images = np.zeros((8, 16, 16), np.float32)
    images[[1, 3]] = np.random.default_rng(0).standard_normal((2, 16, 16))
    particles = ParticleSet.from_array(images, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert preprocess(particles, tmp_path / "w", PreprocessOptions()).written == 8
    assert (
        not (tmp_path / "w/noise.txt").exists()
        and len(open_particles(tmp_path / "w", need_poses=False, need_ctf=False)) == 8
    )


def test_relion_could_place_the_images(golden, tmp_path):
    preprocess(open_particles(golden / "relion/particles.star"), tmp_path / "w", PreprocessOptions(32))
    optics = read_star(tmp_path / "w/particles.star")["optics"]
    assert optics["rlnVoltage"].tolist() == [300, 200]
    assert optics["rlnImageSize"].tolist() == [32, 32]
    assert read_map(golden / "relion/volume.mrc").pixel_size / optics["rlnImagePixelSize"][0] == 0.5


def test_no_warning_is_left_to_chance(golden, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        preprocess(open_particles(golden / "relion/particles.star"), tmp_path / "w", PreprocessOptions(32))


@pytest.mark.parametrize("name", ["particles.star", "poses.pkl"])
def test_files_that_are_read_are_never_written_over(golden, tmp_path, name):
    """RELION's own particles.star, or the user's poses.pkl, in the folder given with -o."""
    shutil.copy(golden / "relion/particles.star", tmp_path / "particles.star")
    shutil.copy(golden / "cryodrgn/pose.pkl", tmp_path / "poses.pkl")
    if name == "particles.star":
        source = open_particles(tmp_path / name, datadir=golden / "relion")
    else:
        source = open_particles(golden / "relion/particles.mrcs", poses=tmp_path / name, need_ctf=False)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(InputError, match=f"would write over {name}"):
        preprocess(source, tmp_path, PreprocessOptions(32))
    assert (tmp_path / name).read_bytes() == before


def test_a_failure_while_images_are_read_leaves_the_old_set(golden, tmp_path, monkeypatch):
    source = open_particles(golden / "relion/particles.star")
    preprocess(source, tmp_path / "w", PreprocessOptions(32))

    def fail(*_: object) -> None:
        raise InputError("no more")

    monkeypatch.setattr("cryosuite.data.preprocess.normalise", fail)
    with pytest.raises(InputError, match="no more"):
        preprocess(source, tmp_path / "w", PreprocessOptions(48))
    assert open_particles(tmp_path / "w").read(np.arange(3)).shape == (3, 32, 32)


def test_groups_of_few_images_borrow_from_the_others():
    """A group of each micrograph: two images alone would give shell 2 to 20 %, and all is divided by it."""
    rng = np.random.default_rng(0)
    noise = NoiseEstimator(32, 300)
    noise.add(rng.standard_normal((600, 32, 32)).astype(np.float32), np.repeat(np.arange(300), 2))
    spectrum = noise.spectrum() / 32**2
    assert spectrum[:, 2].std() < 0.08
    assert abs(spectrum.mean() - 1) < 0.02


def test_groups_of_different_pixel_sizes_keep_them(golden, tmp_path):
    """One session at another magnification: the CTF and the map of its images need its own pixel size."""
    blocks = read_star(golden / "relion/particles.star")
    blocks["optics"] = blocks["optics"].iloc[[0, 0]].assign(rlnOpticsGroup=[1, 2], rlnImagePixelSize=[3.0, 3.06])
    blocks["particles"]["rlnOpticsGroup"] = 1 + np.arange(200) % 2
    write_star(tmp_path / "p.star", blocks)
    preprocess(open_particles(tmp_path / "p.star", datadir=golden / "relion"), tmp_path / "w", PreprocessOptions(32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to tell: the table and the CTF agree
        work = open_particles(tmp_path / "w", ind=np.arange(9, 20))
    assert np.allclose(work.pixel_size, np.where(np.arange(9, 20) % 2, 6.12, 6.0))
    assert np.allclose(work.ctf[:, 1], work.pixel_size)
