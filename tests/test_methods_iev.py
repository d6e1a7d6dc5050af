"""Contrastive training of the encoder: its images, augmentations, guards, resume, and features that are of use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cryosuite.data.encoder_images import encoder_images
from cryosuite.data.encoder_weights import load_encoder
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.methods.iev import Guard, Iev, IevModel, after_epoch, encode, encoder_file, guide_loss
from cryosuite.methods.iev_augment import augment, circled
from cryosuite.methods.iev_data import Corpus, CorpusLoader, PoolSource, StackSource, eight_bits
from cryosuite.methods.iev_options import AUGMENTATIONS, IevOptions, preset
from cryosuite.methods.iev_run import held_out_particles
from cryosuite.metrics.features import feature_spread, knn_accuracy, pixel_components
from cryosuite.nets import ief
from cryosuite.simulate.phantoms import make_phantoms
from cryosuite.simulate.pool import Imaging, PoolOptions, ProjectionPool, expose, ring_shapes, turned
from cryosuite.simulate.sources import from_phantom
from cryosuite.simulate.states import State
from cryosuite.training.logs import read_metrics
from cryosuite.training.loop import fit
from cryosuite.training.method import Step
from cryosuite.training.options import TrainOptions

SMALL = ief.IefSpec("vit_tiny", dim=32, depth=2, heads=2, patch=14, image_size=56, norm2="ln")
EASY = Imaging(snr=(0.3, 1.0), boxes=(32,), shift=0.02)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny preset that is tinier."""
    monkeypatch.setitem(ief.SPECS, "vit_tiny", SMALL)


def make_states(count: int, seed: int = 0) -> list[State]:
    """Phantoms as states."""
    found = [from_phantom(p, f"p{i}") for i, p in enumerate(make_phantoms(count, np.random.default_rng(seed)))]
    return [State(s.name, s.centred(), s.weight) for s in found]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ProjectionPool:
    """Clean projections of four phantoms."""
    path = tmp_path_factory.mktemp("pool") / "pool.f16"
    return ProjectionPool(path, make_states(4), PoolOptions(views=12, box_size=32))


def stacks(n: int = 40, box: int = 24, seed: int = 0) -> ParticleSet:
    """Images whose grey level tells their number."""
    images = np.random.default_rng(seed).normal(size=(n, box, box)).astype(np.float32)
    return ParticleSet.from_array(images, pixel_size=2.0)


# --- simulated particles


def test_pool_is_made_once_and_again_for_other_molecules(tmp_path: Path) -> None:
    states, options = make_states(2), PoolOptions(views=3, box_size=32)
    first = ProjectionPool(tmp_path / "p.f16", states, options)
    assert first.images.shape == (6, 32, 32)
    np.testing.assert_allclose(first.images.astype(np.float32).std(axis=(1, 2)), 1, atol=1e-2)
    made = first.path.stat().st_mtime_ns
    assert ProjectionPool(tmp_path / "p.f16", states, options).path.stat().st_mtime_ns == made
    other = ProjectionPool(tmp_path / "p.f16", states[::-1], options)
    assert other.path.stat().st_mtime_ns != made
    assert np.abs(np.asarray(other.images[0], np.float32) - np.asarray(first.images[3], np.float32)).max() < 20


def test_pool_is_not_built_again_where_its_source_says_the_same(tmp_path: Path) -> None:
    options = PoolOptions(views=2, box_size=32)
    first = ProjectionPool(tmp_path / "p.f16", lambda: make_states(2), options, source="two phantoms")
    again = ProjectionPool(tmp_path / "p.f16", lambda: pytest.fail("built again"), options, source="two phantoms")
    assert first.names == again.names
    np.testing.assert_array_equal(first.images, again.images)
    with open(tmp_path / "p.f16", "ab") as file:
        file.write(b"more")
    assert len(ProjectionPool(tmp_path / "p.f16", lambda: make_states(3), options, source="two phantoms").names) == 3


def test_ring_shapes_do_not_turn(pool: ProjectionPool) -> None:
    clean = torch.from_numpy(np.array(pool.images)).float()
    angle = torch.rand(len(clean), generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    one = ring_shapes(clean)
    two = ring_shapes(turned(clean, angle, torch.zeros(len(clean), 2), torch.ones(len(clean))))
    assert one.shape == (len(clean), 96)
    near = (one - two).square().sum(1)
    far = (one - one.roll(17, 0)).square().sum(1)
    assert float(near.mean()) < 0.25 * float(far.mean())


def test_guide_counts_simulated_images_only() -> None:
    guess = torch.randn(8, 96, requires_grad=True)
    shapes = torch.full((4, 2, 96), torch.nan)
    assert float(guide_loss(guess.detach(), shapes)) == 0
    shapes[1] = 0.0
    guide_loss(guess, shapes).backward()
    assert guess.grad[[1, 5]].abs().sum() > 0
    assert guess.grad[[0, 2, 3, 4, 6, 7]].abs().sum() == 0
    assert float(guide_loss(guess.detach(), None)) == 0


def test_turning_by_quarters_and_moving_is_what_it_says() -> None:
    image = torch.zeros(1, 16, 16)
    image[0, 8, 11] = 1.0
    one, zero = torch.ones(1), torch.zeros(1)
    back = turned(
        turned(image, one * torch.pi / 2, torch.zeros(1, 2), one), -one * torch.pi / 2, torch.zeros(1, 2), one
    )
    torch.testing.assert_close(back, image, atol=1e-4, rtol=0)
    moved = turned(image, zero, torch.tensor([[2 / 16, -1 / 16]]), one)
    assert int(moved.argmax()) == 7 * 16 + 13


def test_exposed_particles_have_the_noise_asked_for(pool: ProjectionPool) -> None:
    """With 16 times the pixels' area the same particle has 16 times the signal to noise ratio."""
    clean = torch.from_numpy(np.array(pool.images[:40]))
    powers = {}
    for box, snr in ((32, 0.05), (64, 0.05), (32, 1e-12)):
        imaging = Imaging(snr=(snr, snr), boxes=(box,))
        images = expose(clean, 320.0, imaging, box, torch.Generator().manual_seed(0))
        assert images.shape == (40, box, box)
        powers[box, snr] = float(images.var(dim=(1, 2)).mean())
    assert abs(powers[32, 1e-12] - 1) < 0.02
    assert abs(powers[32, 0.05] - 1 - 0.05 * 16) < 0.05
    assert abs(powers[64, 0.05] - 1 - 0.05 * 4) < 0.05


@pytest.mark.parametrize("prep", ["ief", "robust", "standard"])
@pytest.mark.parametrize("box", [32, 56, 80])
def test_eight_bits_on_the_device_are_those_of_the_files(box: int, prep: str) -> None:
    images = np.random.default_rng(1).normal(size=(6, box, box)).astype(np.float32)
    ours, theirs = (
        eight_bits(torch.from_numpy(images), 56, prep).numpy(),
        encoder_images(images, 56, prep, circle=False),
    )
    far = np.abs(ours.astype(int) - theirs)
    if box <= 56:  # a crop leaves out the Nyquist lines, and the ends of the grey range with them
        assert far.mean() < 0.2
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > (0.999 if box <= 56 else 0.97)


def test_pairs_are_a_pure_function_of_their_seed(pool: ProjectionPool) -> None:
    source = PoolSource(pool, 56, "standard", "same-view", EASY)
    one, label, shapes = source.pairs(8, [0, 1, 2])
    two, same, _ = source.pairs(8, [0, 1, 2])
    assert shapes.shape == (8, 2, 96)
    assert torch.equal(shapes[:, 0], shapes[:, 1])  # of one clean view
    assert torch.equal(one, two)
    assert torch.equal(label, same)
    assert not torch.equal(one, source.pairs(8, [0, 1, 3])[0])
    assert not torch.equal(one[:, 0], one[:, 1])
    alone = PoolSource(pool, 56, "standard", "augment", EASY).pairs(8, [0])[0]
    assert torch.equal(alone[:, 0], alone[:, 1])


# --- streams of many sets


def test_every_image_comes_once_per_pass_and_sets_by_weight() -> None:
    one, two = stacks(600), stacks(100, seed=1)
    corpus = Corpus([StackSource(one, 56, "ief", 3.0), StackSource(two, 56, "ief", 1.0)], 800, 56)
    counts = [np.bincount(corpus.plan(epoch, 0)[0], minlength=2) for epoch in range(3)]
    assert all(count.tolist() == [600, 200] for count in counts)
    source = corpus.sources[0]
    rows = source.rows(0, 600, 0, 0)
    assert sorted(rows.tolist()) == list(range(600))
    assert not np.array_equal(rows, source.rows(600, 600, 0, 0))
    np.testing.assert_array_equal(rows[100:300], source.rows(100, 200, 0, 0))
    assert np.count_nonzero(np.diff(rows) != 1) < 4  # long runs for the disk


def test_batches_do_not_depend_on_where_one_starts_or_on_the_processes(pool: ProjectionPool) -> None:
    sources = [StackSource(stacks(70), 56, "standard", 1.0), PoolSource(pool, 56, "standard", "same-view", EASY)]
    corpus = Corpus(sources, 64, 56)
    every = list(CorpusLoader(corpus, 16).epoch(1))
    assert [len(batch) for batch in every] == [16] * 4
    late = list(CorpusLoader(corpus, 16, prefetch=0).epoch(1, start=2))
    assert torch.equal(late[0].images, every[2].images)
    assert torch.equal(late[1].label, every[3].label)
    files = Corpus(sources[:1], 64, 56)
    whole = list(CorpusLoader(files, 16).epoch(0))[1]
    parts = [list(CorpusLoader(files, 16, rank, 2).epoch(0))[1] for rank in range(2)]
    assert torch.equal(parts[1].images, whole.images[1::2])
    assert torch.equal(parts[0].index, whole.index[0::2])


def test_simulated_images_join_those_of_files_wherever_they_were_made(pool: ProjectionPool) -> None:
    sources = [StackSource(stacks(70), 56, "standard", 1.0), PoolSource(pool, 56, "standard", "same-view", EASY)]
    elsewhere = CorpusLoader(Corpus(sources, 32, 56), 16, device="meta", prefetch=0)  # stands for another device
    batch = next(elsewhere.epoch(0))
    assert batch.images.shape == (16, 2, 56, 56)
    assert batch.images.device.type == "meta"


def test_broken_images_have_the_same_stand_in_whatever_is_read_with_them() -> None:
    particles = stacks(20)
    particles.images.array[[3, 4, 19], 0, 0] = np.nan
    whole = StackSource(particles, 56, "standard").read(np.arange(20))
    for rows in (np.array([3]), np.array([19, 4, 3, 0])):
        np.testing.assert_array_equal(StackSource(particles, 56, "standard").read(rows), whole[rows])
    np.testing.assert_array_equal(whole[3], whole[5])
    np.testing.assert_array_equal(whole[19], whole[0])


def test_broken_images_are_replaced_and_a_broken_set_is_refused() -> None:
    particles = stacks(20)
    particles.images.array[3, 0, 0] = np.nan
    made = StackSource(particles, 56, "standard").read(np.arange(8))
    assert made.shape == (8, 56, 56)
    assert (made.reshape(8, -1).max(1) > 0).all()
    particles.images.array[:] = np.inf
    with pytest.raises(InputError, match="NaN or infinite"):
        StackSource(particles, 56, "standard").read(np.arange(8))


def test_impossible_corpora_are_refused() -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        Corpus([], 10, 56)
    with pytest.raises(InputError, match="weight 0"):
        Corpus([StackSource(stacks(), 56, "ief", 0.0, "mine")], 10, 56)
    corpus = Corpus([StackSource(stacks(), 56, "ief")], 10, 56)
    with pytest.raises(InputError, match="batch-size"):
        CorpusLoader(corpus, 16)
    with pytest.raises(InputError, match="multiple of the number of processes"):
        CorpusLoader(corpus, 5, 0, 2)


# --- augmentations


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_changes_images_and_keeps_their_form(name: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 56, 56)
    out = augment(images, frozenset((name,)))
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert bool(torch.isfinite(out).all())
    assert not torch.equal(out, images)
    assert 0.3 < float(out.std()) < 1.5
    torch.manual_seed(0)
    assert torch.equal(augment(torch.randn(16, 56, 56), frozenset((name,))), out)
    assert torch.equal(augment(images, frozenset()), images)


def test_blur_and_defocus_keep_the_mean_and_flip_turns_back() -> None:
    images = torch.randn(64, 56, 56)
    out = augment(images, frozenset(("blur", "defocus")))
    torch.testing.assert_close(out.mean((1, 2)), images.mean((1, 2)), atol=1e-5, rtol=0)
    mirrored = augment(images, frozenset(("flip",)))
    same = (mirrored == images).flatten(1).all(1)
    assert 15 < int(same.sum()) < 49
    assert torch.equal(mirrored[~same].flip(2), images[~same])


def test_turned_particles_keep_their_mass() -> None:
    axis = torch.arange(56.0) - 27.5
    blob = torch.exp(-(axis[:, None] ** 2 + axis**2) / 60).expand(32, -1, -1)
    out = augment(blob, frozenset(("rotate",)))
    assert float((out - blob).abs().max()) < 0.02
    moved = augment(blob, frozenset(("shift",)))
    x = (moved * axis).sum((1, 2)) / moved.sum((1, 2))
    assert float(x.abs().max()) <= 0.05 * 56 + 0.1
    assert float(x.std()) > 0.5


def test_half_precision_moves_no_pixel() -> None:
    images = torch.randn(8, 112, 112)
    torch.manual_seed(0)
    wanted = augment(images, frozenset(("rotate", "shift", "crop")))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = augment(images, frozenset(("rotate", "shift", "crop")))
    torch.testing.assert_close(out, wanted)


def test_circle_is_the_last_thing_and_grey_zero(small: None) -> None:
    method = Iev(IevOptions(size="vit_tiny", norm2="ln", hidden=16, out=8))
    corpus = Corpus([StackSource(stacks(), 56, "standard")], 32, 56)
    model = method.build(corpus)
    view = method.view(next(CorpusLoader(corpus, 8).epoch(0)), 0, model)
    outside = -float(model.grey_mean / model.grey_std)
    assert float(view[:, 0, 0, 0].sub(outside).abs().max()) < 1e-5
    mask = torch.zeros(56, 56, dtype=torch.bool)
    assert float(circled(torch.ones(1, 56, 56), mask, -3.0).mean()) == -3.0


# --- training


def toy_training(
    run: Path, pool: ProjectionPool, *, guard: bool = True, resume: bool = False, epochs: int = 3, **changed: object
) -> IevModel:
    """Three short epochs."""
    options = preset("tiny", False, hidden=32, out=16, chunk=8)[1].options
    corpus = Corpus(
        [PoolSource(pool, 56, "standard", "same-view", EASY), StackSource(stacks(), 56, "standard", 0.2)], 48, 56
    )
    method, folder = Iev(options), RunDir(run)
    images, labels = held_out_particles(make_states(2, 5), "", 56, "standard", run / "h.f16", PoolOptions(8, 32))
    watch = Guard(images, labels, method, folder) if guard else None
    training = TrainOptions(epochs=epochs, batch_size=16, lr=1e-3, ema=0, log_every=1, **changed)
    return fit(
        method, corpus, folder, training, resume=resume, on_epoch=after_epoch(folder, options, watch, {"seed": 0})
    ).model


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pool: ProjectionPool) -> Path:
    """A finished toy run."""
    run = tmp_path_factory.mktemp("iev")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ief.SPECS, "vit_tiny", SMALL)
        toy_training(run, pool)
    return run


def test_run_holds_encoder_curve_and_guards(trained: Path, small: None) -> None:
    records = read_metrics(RunDir(trained).metrics)
    guards = [record for record in records if "knn" in record]
    assert [record["epoch"] for record in guards] == [1, 2, 3]
    assert {"knn", "knn_random", "knn_pixels", "heldout_spread", "heldout_rank"} <= guards[0].keys()
    losses = [record for record in records if "loss" in record]
    assert len(losses) == 9
    assert {"spread", "effective_rank", "contrast", "guide", "grad_norm"} <= losses[0].keys()
    loaded = load_encoder(encoder_file(RunDir(trained)))
    assert (loaded.prep, loaded.spec.norm2, loaded.notes["seed"]) == ("standard", "ln", "0")
    z = encode(stacks(10), loaded, progress=False)
    assert z.shape == (10, 32)
    assert np.isfinite(z).all()


def test_exported_encoder_gives_the_features_of_the_model(trained: Path, pool: ProjectionPool, small: None) -> None:
    loaded = load_encoder(encoder_file(RunDir(trained)))
    particles = stacks(6, box=56)
    method = Iev(preset("tiny", False, hidden=32, out=16)[1].options)
    model = IevModel(method.options, loaded.mean, loaded.std).eval()
    model.base_encoder.load_state_dict(loaded.encoder.state_dict())
    source = StackSource(particles, 56, "standard")
    with torch.no_grad():
        z = model.base_encoder(method.plain(torch.from_numpy(source.read(np.arange(6))), model)).numpy()
    np.testing.assert_allclose(encode(particles, loaded, progress=False), z, atol=1e-5)


def test_stopped_and_resumed_is_never_stopped(trained: Path, tmp_path: Path, pool: ProjectionPool, small: None) -> None:
    toy_training(tmp_path, pool, max_minutes=1e-9)  # stops after its first step
    assert len([r for r in read_metrics(RunDir(tmp_path).metrics) if "loss" in r]) == 1
    toy_training(tmp_path, pool, resume=True)
    one, two = (
        [(r["step"], r.get("loss"), r.get("knn")) for r in read_metrics(RunDir(path).metrics)]
        for path in (trained, tmp_path)
    )
    assert one == two
    a, b = (load_encoder(encoder_file(RunDir(path))).encoder.state_dict() for path in (trained, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_pieces_move_the_momentum_copy_once(pool: ProjectionPool, small: None) -> None:
    method = Iev(IevOptions(size="vit_tiny", norm2="ln", hidden=16, out=8, m_cos=False, momentum=0.5))
    corpus = Corpus([PoolSource(pool, 56, "standard", "augment", EASY)], 32, 56)
    model, batch = method.build(corpus).train(), next(CorpusLoader(corpus, 8).epoch(0))
    with torch.no_grad():
        model.base_encoder.norm.bias += 1.0
    for _ in range(2):
        method.loss(model, batch, Step(4, 100))
    torch.testing.assert_close(model.momentum_encoder.norm.bias, torch.full((32,), 0.5))


def test_weight_decay_is_for_matrices_only(small: None) -> None:
    method = Iev(IevOptions(size="vit_tiny", norm2="ln", hidden=16, out=8))
    model = IevModel(method.options, 0.5, 0.1)
    decayed, free = method.parameter_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert "base_encoder.cls_token" in {names[id(p)] for p in free["params"]}
    assert all(name.endswith("weight") and "norm" not in name for name in (names[id(p)] for p in decayed["params"]))
    ours = {id(p) for group in (decayed, free) for p in group["params"]}
    assert ours == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any("momentum" in names[i] or "pos_embed" in names[i] or "patch_embed" in names[i] for i in ours)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"aug": ("rotate", "smear")}, "unknown smear"),
        ({"tau": 0.0}, "--tau"),
        ({"size": "vit_huge"}, "vit_small"),
        ({"momentum": 1.0}, "--momentum"),
        ({"chunk": 8}, "batch norm"),
        ({"keep": 0.0}, "--keep"),
        ({"hidden": 0}, "--hidden 0"),
    ],
)
def test_impossible_options_are_refused(wrong: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        replace(IevOptions(), **wrong)


# --- judging features


def test_neighbours_find_labels_where_there_are_any() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([3, 7, 9], 60)
    z = np.eye(3)[np.repeat([0, 1, 2], 60)] + 0.05 * rng.normal(size=(180, 3))
    assert knn_accuracy(z, labels) == 1.0
    assert 0.15 < knn_accuracy(rng.normal(size=(180, 3)), labels) < 0.55
    assert knn_accuracy(z * rng.uniform(1, 50, (180, 1)), labels) > 0.99  # lengths do not count
    with pytest.raises(ValueError, match="labels"):
        knn_accuracy(z, labels[:5])


def test_spread_and_rank_tell_collapse() -> None:
    torch.manual_seed(0)
    spread, rank = feature_spread(torch.randn(4000, 32))
    assert 0.97 < float(spread) < 1.03
    assert float(rank) > 31
    spread, rank = feature_spread(torch.ones(100, 32) + 1e-3 * torch.randn(100, 1))
    assert float(spread) < 0.01
    assert pixel_components(np.random.default_rng(0).normal(size=(20, 8, 8)), 5).shape == (20, 5)
