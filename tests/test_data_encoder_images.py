"""Images for an encoder: Cryo-IEF's own preparation, contrast, the cache on disk, streamed features."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cryosuite.data import encoder_cache
from cryosuite.data.encoder_images import (
    EncoderCache,
    circle_mask,
    encoder_images,
    features,
    features_to_file,
    normalise,
    read_encoder_images,
    stored_sign,
)
from cryosuite.data.encoder_pixels import resize
from cryosuite.data.encoder_weights import shipped_encoder
from cryosuite.data.images import StackImages
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.errors import FileError, InputError, UserNotice
from cryosuite.formats.mrc import StackWriter
from cryosuite.formats.pickles import read_latent
from cryosuite.nets.ief import IefEncoder, IefSpec
from cryosuite.nets.ief_weights import LoadedEncoder

SPEC = IefSpec("toy", dim=32, depth=2, heads=2, patch=14, image_size=28)


@pytest.fixture(scope="module")
def published(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "cryo_ief" / "preprocess.npz"))


def toy_images(n: int = 12, box: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, box, box)).astype(np.float32)


def toy_set(n: int = 12, box: int = 16, seed: int = 0) -> ParticleSet:
    return ParticleSet.from_array(toy_images(n, box, seed), 2.0)


def toy_encoder(prep: str = "robust") -> LoadedEncoder:
    torch.manual_seed(0)
    return LoadedEncoder(IefEncoder(SPEC).eval(), SPEC, prep, 0.5, 0.15, "toy")


@pytest.mark.parametrize("box", [128, 300, 224])
def test_eight_bits_equal_the_published_preparation(box: int, published: dict[str, np.ndarray]) -> None:
    raw, wanted = published[f"raw_{box}"], published[f"u8_{box}"]
    found = encoder_images(raw, 224, "ief", circle=False)
    difference = np.abs(found.astype(int) - wanted)
    assert found.dtype == np.uint8 and difference.max() <= 1 and (difference > 0).mean() < 1e-3
    assert abs(found.mean() - wanted.mean()) < 1e-3
    resized = published[f"resized_first_{box}"]
    assert np.abs(resize(raw[:1], 224)[0] - resized).max() < 1e-5 * np.ptp(resized)


def test_circle_and_normalisation_equal_cryodeco(published: dict[str, np.ndarray]) -> None:
    masked = published["u8_128"][:1] * circle_mask(224)
    assert np.array_equal(masked[0], published["masked_u8"][0])
    mean, std = published["norm_mean_std"]
    normal = normalise(torch.from_numpy(masked), mean, std)
    assert normal.shape == (1, 1, 224, 224) and normal.dtype == torch.float32
    assert np.abs(normal[0, 0].numpy() - published["masked_norm_first"][0]).max() < 2e-6
    assert float(normal[0, 0, 0, 0]) == pytest.approx(-4.67, abs=0.01)
    found = encoder_images(published["raw_128"][:1], 224)
    assert np.abs(found[0].astype(int) - published["masked_u8"][0]).max() <= 1


@pytest.mark.parametrize(("box", "size"), [(32, 112), (100, 224), (222, 224), (112, 112), (130, 112), (256, 224)])
def test_sizes_equal_scipy_and_a_plain_hartley_transform(box: int, size: int) -> None:
    from scipy import ndimage

    images = toy_images(2, box)
    found = resize(images, size)
    for image, result in zip(images, found, strict=True):
        if box <= size:
            plain = ndimage.zoom(image, size / box, order=3)
        else:
            low = box // 2 - size // 2
            plain = hartley(hartley(image.astype(float))[low : low + size, low : low + size]) / size**2
        assert result.shape == plain.shape == (size, size)
        assert np.abs(result - plain).max() < 1e-5 * np.ptp(plain)


def hartley(image: np.ndarray) -> np.ndarray:
    transform = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image)))
    return transform.real - transform.imag


def test_scale_and_offset_of_the_grey_values_do_not_matter() -> None:
    images = toy_images(3, 64)
    for prep in ("ief", "robust"):
        one, other = (encoder_images(x, 112, prep).astype(int) for x in (images, 1000 * images - 40000))
        assert np.abs(one - other).max() <= 2
    negative = encoder_images(-images, 112, "ief", circle=False).astype(int)
    assert np.abs(255 - negative - encoder_images(images, 112, "ief", circle=False)).max() <= 1


def test_a_hot_pixel_dims_the_published_preparation_but_not_the_robust_one() -> None:
    image = toy_images(1, 112)
    hot = image.copy()
    hot[0, 50, 60] = 500.0
    changes = {}
    for prep in ("ief", "robust"):
        cold, warm = (encoder_images(x, 112, prep, circle=False).astype(float) for x in (image, hot))
        changes[prep] = np.abs(cold - warm)[:, :40].mean()
    assert changes["ief"] > 50 and changes["robust"] < 1


def test_constant_and_broken_images(published: dict[str, np.ndarray]) -> None:
    constant = np.stack([np.full((32, 32), value, np.float32) for value in (1.7, 0.0, -3.0, 400.0)])
    for size in (112, 16, 32):
        for prep in ("ief", "robust"):
            found = encoder_images(constant, size, prep, circle=False)
            assert [np.unique(image).tolist() for image in found] == [[1], [0], [0], [255]]
    broken = toy_images(4, 32)
    good = encoder_images(broken, 112)
    broken[1, 3, 3], broken[2, 0, 0], broken[3] = np.nan, np.inf, 3e38
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = encoder_images(broken, 112)
    assert np.array_equal(found[0], good[0]) and not found[1:].any()
    nearly = np.zeros((1, 32, 32), np.float32)
    nearly[0, 16, 16] = 1.0  # less than 0.1 % of the pixels: no spread is left between the percentiles
    assert np.isfinite(encoder_images(nearly, 32, "robust")).all()
    with pytest.raises(ValueError, match="prep"):
        encoder_images(constant, 112, "other")
    assert encoder_images(np.zeros((0, 32, 32), np.float32), 112).shape == (0, 112, 112)


def test_ief_sees_the_contrast_of_the_source_file_and_robust_sees_white(tmp_path: Path) -> None:
    """Dark particles in the file: the same pixels reach Cryo-IEF from the file and from the work directory."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] - 16
    stored = (rng.standard_normal((40, 32, 32)) - 3 * (y**2 + x**2 < 64)).astype(np.float32)
    with StackWriter(tmp_path / "dark.mrcs", 40, 32, 2.0) as writer:
        writer.write(stored)
    dark = open_particles(tmp_path / "dark.mrcs", need_poses=False, need_ctf=False, sign=-1)
    assert stored_sign(dark).tolist() == [-1] * 40
    preprocess(dark, tmp_path / "work", PreprocessOptions())
    work = open_particles(tmp_path / "work", need_poses=False, need_ctf=False)
    rows = np.array([3, 17])
    as_stored = encoder_images(stored[rows], 112, "ief").astype(int)
    white = encoder_images(-stored[rows], 112, "robust").astype(int)
    preprocess(work, tmp_path / "again", PreprocessOptions())  # in two steps as in one
    again = open_particles(tmp_path / "again", need_poses=False, need_ctf=False)
    with pytest.warns(UserWarning, match="you say dark"):
        wrong = open_particles(tmp_path / "work", need_poses=False, need_ctf=False, sign=-1)
    assert np.array_equal(wrong.read(rows), -work.read(rows))
    assert np.array_equal(read_encoder_images(wrong, rows, 112)[0], read_encoder_images(work, rows, 112)[0])
    for particles in (dark, work, again):
        found, finite = read_encoder_images(particles, rows, 112, "ief")
        assert finite.all() and np.abs(found - as_stored).max() <= 1
        assert np.abs(read_encoder_images(particles, rows, 112, "robust")[0] - white).max() <= 1
    mixed = StackImages(
        [tmp_path / "dark.mrcs"], np.zeros(40), np.arange(40), signs=np.where(np.arange(40) % 2, -1, 1).astype(np.int8)
    )
    both = ParticleSet(images=mixed, box_size=32, pixel_size=2.0)
    assert (
        np.abs(read_encoder_images(both, np.array([2, 5]), 112, "ief")[0] - encoder_images(stored[[2, 5]], 112)).max()
        == 0
    )


def test_stacks_of_several_boxes_are_resized_each_from_its_own(tmp_path: Path) -> None:
    images = {16: toy_images(3, 16), 24: toy_images(2, 24)}
    for box, stack in images.items():
        with StackWriter(tmp_path / f"{box}.mrcs", len(stack), box, 2.0) as writer:
            writer.write(stack)
    source = StackImages([tmp_path / "16.mrcs", tmp_path / "24.mrcs"], [0, 1, 0, 1, 0], [0, 0, 1, 1, 2])
    boxes = np.array([16, 24, 16, 24, 16], np.int32)
    particles = ParticleSet(images=source, box_size=24, pixel_size=2.0, box_sizes=boxes)
    found, _ = read_encoder_images(particles, np.array([3, 2, 1]), 28, "ief")
    assert np.array_equal(found[[0, 2]], encoder_images(images[24][[1, 0]], 28))
    assert np.array_equal(found[1:2], encoder_images(images[16][1:2], 28))


def test_the_cache_holds_what_the_images_give(tmp_path: Path) -> None:
    particles = toy_set()
    wanted = encoder_images(toy_images(), 28, "robust")
    for path in (None, tmp_path / "images.u8"):
        cache = EncoderCache(particles, 28, "robust", path, progress=False)
        assert len(cache) == 12 and not cache.bad.any()
        for index in (torch.tensor([7, 0, 7]), np.array([7, 0, 7])):
            batch = cache.batch(index)
            assert batch.dtype == torch.uint8 and np.array_equal(batch.numpy(), wanted[[7, 0, 7]])
    assert (tmp_path / "images.u8").stat().st_size == 12 * 28 * 28
    batch[:] = 0  # a batch is the caller's own
    assert np.array_equal(np.asarray(cache.images), wanted)


def test_a_set_without_particles(tmp_path: Path) -> None:
    empty = toy_set().subset(np.zeros(0, np.int64))
    for path in (None, tmp_path / "images.u8", tmp_path / "images.u8"):
        assert EncoderCache(empty, 28, "ief", path, progress=False).images.shape == (0, 28, 28)
    assert features(empty, toy_encoder(), progress=False).shape == (0, 32)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read: list[int] = []
    original = encoder_cache.read_encoder_images

    def counting(particles: ParticleSet, rows: np.ndarray, *rest: object) -> tuple[np.ndarray, np.ndarray]:
        read.extend(rows.tolist())
        return original(particles, rows, *rest)

    monkeypatch.setattr(encoder_cache, "read_encoder_images", counting)
    return read


def test_an_interrupted_cache_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of a write: what was recorded as done is kept, the rest made again."""
    path, particles = tmp_path / "images.u8", toy_set(40)
    monkeypatch.setattr(encoder_cache, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(encoder_cache, "CHUNK_BYTES", 4 * 16 * 16 * 5)  # five images at once
    original = encoder_cache.EncoderCache._note

    def dying(self: EncoderCache, done: int) -> None:
        if done > 20:
            raise KeyboardInterrupt
        original(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(encoder_cache.EncoderCache, "_note", dying)
        with pytest.raises(KeyboardInterrupt):
            EncoderCache(particles, 28, "ief", path, progress=False)
    assert json.loads((tmp_path / "images.u8.json").read_text())["done"] == 20
    with open(path, "ab") as file:
        file.write(b"half an image")  # bytes of a write that was cut short
    read = count_reads(monkeypatch)
    cache = EncoderCache(particles, 28, "ief", path, progress=False)
    assert np.array_equal(cache.images, encoder_images(toy_images(40), 28))
    assert max(read[:16]) < 20 and read[16:] == list(range(20, 40))  # some to be compared, then what is missing
    read.clear()
    again = EncoderCache(particles, 28, "ief", path, progress=False)
    assert np.array_equal(again.images, cache.images) and len(read) == 16


def tamper_short(path: Path, record: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def tamper_pixels(path: Path, record: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def tamper_record(text: str):
    def tamper(path: Path, record: Path) -> None:
        record.write_text(text)

    return tamper


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (tamper_short, "shorter"),
        (tamper_pixels, "other images"),
        (tamper_record("not JSON"), "cannot be read"),
        (tamper_record("[1]"), "cannot be read"),
        (tamper_record('{"done": 1e999, "bad": []}'), "cannot be read"),
        (tamper_record('{"done": 12, "bad": []}'), "other particles or another preparation"),
    ],
)
def test_a_damaged_cache_is_made_anew(tamper, words: str, tmp_path: Path) -> None:
    path = tmp_path / "images.u8"
    EncoderCache(toy_set(), 28, "ief", path, progress=False)
    tamper(path, tmp_path / "images.u8.json")
    with pytest.warns(UserNotice, match=words):
        cache = EncoderCache(toy_set(), 28, "ief", path, progress=False)
    assert np.array_equal(cache.images, encoder_images(toy_images(), 28))


def test_a_cache_of_something_else_is_not_believed(tmp_path: Path) -> None:
    """Other pixels under the same name and count, another size, preparation, selection or order of the rows."""
    path = tmp_path / "images.u8"
    EncoderCache(toy_set(), 28, "ief", path, progress=False)
    others = [
        (toy_set(seed=1), 28, "ief", "other images"),
        (toy_set(seed=1), 28, "robust", "another preparation"),
        (toy_set(), 42, "robust", "another preparation"),
        (toy_set().subset(np.arange(12)[::-1]), 42, "robust", "other particles"),
        (toy_set(14), 42, "robust", "other particles"),
    ]
    for particles, size, prep, words in others:
        with pytest.warns(UserNotice, match=words):
            cache = EncoderCache(particles, size, prep, path, progress=False)
        assert np.array_equal(cache.images, encoder_images(particles.read(slice(None)), size, prep))


def test_broken_images_are_named_and_remembered(tmp_path: Path) -> None:
    images = toy_images()
    images[[2, 9], 4, 4] = np.nan
    particles = ParticleSet.from_array(images, 2.0)
    for _ in range(2):
        with pytest.warns(UserNotice, match=r"images 2 and 9 \(0-based\) hold NaN"):
            cache = EncoderCache(particles, 28, "robust", tmp_path / "images.u8", progress=False)
        assert np.flatnonzero(cache.bad).tolist() == [2, 9] and not cache.images[2].any()


def test_a_folder_that_is_not_there_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="cannot write"):
        EncoderCache(toy_set(), 28, "ief", tmp_path / "absent" / "images.u8", progress=False)
    monkeypatch.setattr("cryosuite.formats.atomic.shutil.disk_usage", lambda _: type("Usage", (), {"free": 5})())
    with pytest.raises(InputError, match="not enough disk space: needs .*9408 bytes"):
        EncoderCache(toy_set(), 28, "ief", tmp_path / "images.u8", progress=False)


def test_features_do_not_depend_on_how_they_are_streamed(tmp_path: Path) -> None:
    particles, loaded = toy_set(), toy_encoder()
    x = normalise(torch.from_numpy(encoder_images(toy_images(), 28, "robust")), loaded.mean, loaded.std)
    with torch.inference_mode():
        wanted = loaded.encoder(x).numpy()
    cache = EncoderCache(particles, 28, "robust", tmp_path / "images.u8", progress=False)
    loaded.encoder.train()  # a net left in train mode would mix the images of a batch
    for batch, kept in ((5, None), (12, None), (1, cache)):
        found = features(particles, loaded, batch, progress=False, cache=kept)
        assert found.shape == (12, 32) and found.dtype == np.float32
        assert np.abs(found - wanted).max() < 1e-5
    plain = features(particles, loaded, 5, progress=False, circle=False)
    assert np.abs(plain - wanted).max() > 1e-3


def test_features_of_broken_images_are_named() -> None:
    images = toy_images()
    images[7, 0, 0] = np.nan
    with pytest.warns(UserNotice, match=r"image 7 \(0-based\)"):
        found = features(ParticleSet.from_array(images, 2.0), toy_encoder(), 5, progress=False)
    assert np.isfinite(found).all()


def test_features_on_disk_are_those_in_memory_and_take_no_memory(tmp_path: Path) -> None:
    images = toy_images(4000)
    images[[7, 3999], 0, 0] = np.nan
    particles, spec = ParticleSet.from_array(images, 2.0), IefSpec("wide", dim=512, depth=1, heads=2, image_size=28)
    torch.manual_seed(0)
    loaded = LoadedEncoder(IefEncoder(spec).eval(), spec, "robust", 0.5, 0.15, "toy")
    tracemalloc.start()
    with pytest.warns(UserNotice, match=r"images 7 and 3999 \(0-based\)"):
        found = features_to_file(tmp_path / "z.1.pkl", particles, loaded, 50, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5e6, "the features are 8 MB"
    assert [path.name for path in tmp_path.iterdir()] == ["z.1.pkl"] and found.shape == (4000, 512)
    some = np.array([3999, 0, 1234])
    wanted = features(particles.subset(some), loaded, progress=False)
    np.testing.assert_allclose(found.take(some), wanted, atol=1e-5)
    np.testing.assert_array_equal(read_latent(tmp_path / "z.1.pkl")[0][some], found.take(some))


def test_features_of_half_precision_point_the_same_way() -> None:
    """Images with something on them, the shipped encoder: cosine above 0.999, but not the same numbers."""
    rng, axis = np.random.default_rng(0), np.arange(48) - 24.0
    x, y = rng.uniform(-8, 8, (2, 12, 3))
    waves = [np.exp(-((axis - v[..., None]) ** 2) / 18) for v in (x, y)]
    images = np.einsum("nki,nkj->nij", *waves) + 0.3 * rng.standard_normal((12, 48, 48))
    particles, loaded = ParticleSet.from_array(images.astype(np.float32), 3.0), shipped_encoder()
    whole, half = (torch.from_numpy(features(particles, loaded, progress=False, half=bf16)) for bf16 in (False, True))
    cosine = torch.nn.functional.cosine_similarity(whole, half)
    assert float(cosine.min()) > 0.999 and not torch.equal(whole, half)
    assert torch.equal(whole, torch.from_numpy(features(particles, loaded, progress=False))), (
        "a CPU is exact by default"
    )


def test_features_that_do_not_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryosuite.formats.atomic.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(FileError, match=r"z.1.pkl: not enough disk space: needs .*, 1000 bytes are free"):
        features_to_file(tmp_path / "z.1.pkl", toy_set(), toy_encoder(), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_cache_of_another_size_is_no_source_of_features() -> None:
    cache = EncoderCache(toy_set(), 42, "robust", progress=False)
    with pytest.raises(ValueError, match="cache"):
        features(toy_set(), toy_encoder(), cache=cache, progress=False)
