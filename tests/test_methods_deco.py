"""CryoDECO: pose table, stages, what trains, and small trainings that must learn, stop and go on exactly."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs
from pretend_gpu import pretend_gpu
from sklearn.metrics import adjusted_rand_score

from cryosuite.analysis.clusters import cluster
from cryosuite.data.images import ArrayImages
from cryosuite.data.loader import BatchLoader
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.kernels import fourier
from cryosuite.kernels.rotations import geodesic_deg, random_rotations, six_d_to_matrix
from cryosuite.kernels.slices import extract_slices, volume_transform
from cryosuite.methods import LoadedRun, deco_finish, deco_hand
from cryosuite.methods.deco import Deco
from cryosuite.methods.deco_auto import decide
from cryosuite.methods.deco_encoder import encoder_of_state
from cryosuite.methods.deco_hand import mirrored, settle_hands
from cryosuite.methods.deco_images import encoder_cache
from cryosuite.methods.deco_model import DecoModel, PoseTable
from cryosuite.methods.deco_options import DecoOptions, preset
from cryosuite.methods.deco_run import can_resume, check, warn_of_noise
from cryosuite.methods.deco_search import Stage, stage_of
from cryosuite.metrics.clustering import agreement, kmeans_labels
from cryosuite.reconstruct.backproject import flip_hand
from cryosuite.training.loop import fit
from cryosuite.training.method import Step
from cryosuite.training.options import TrainOptions

BOX = 16
TINY = DecoOptions(
    encoder="random", encoder_size="micro", zdim=4, width=32, layers=1, n_frequencies=16, lr_encoder=1.0, lr_poses=1.0
)
QUICK = TrainOptions(epochs=2, batch_size=32, lr=2e-3, precision="32", save_every=10, checkpoint_every_minutes=60)


@pytest.fixture(scope="module")
def two():
    """Images of two molecules with their labels."""
    return blob_particles([blobs(BOX, 3, 8), blobs(BOX, 11, 3)], 160, noise=0.5)


def _built(particles, options: DecoOptions = TINY, epochs: int = 2):
    torch.manual_seed(0)
    method = Deco(options, None, epochs)
    return method, method.build(particles)


def _batch(particles, rows=range(8)):
    return BatchLoader(particles, 8, shuffle=False, prefetch=0).batch(np.asarray(list(rows)))


# options and stages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"finetune": "last-0"}, {"finetune": "some"}, {"field": "real"}, {"zdim": 0}, {"classes": 0},
              {"march_from": 0.0}, {"shift_extent": 0.7}, {"search_epochs": -1}, {"march_over": 2.0},
              {"lr_encoder": -0.1}, {"feat_sigma": 0.0}],
)  # fmt: skip
def test_impossible_options_are_refused(wrong: dict) -> None:
    """Each with a message that names the flag."""
    with pytest.raises(InputError, match="--"):
        DecoOptions(**wrong)


def test_presets_know_what_they_are_for() -> None:
    """The paper's form is the paper's; the CPU's is small; changes win."""
    assert preset("auto", gpu=False)[0] == "small" and preset("auto", gpu=True)[0] == "default"
    paper = preset("paper", gpu=True)[1].options
    assert (paper.field, paper.loss, paper.start, paper.bn, paper.zdim) == ("hartley", "mse", "network", "train", 128)
    assert preset("small", gpu=False, zdim=7)[1].options.zdim == 7
    with pytest.raises(InputError, match="--preset"):
        preset("tiny", gpu=False)


def test_what_the_encoder_sees_by_default() -> None:
    """Raw images for pre-trained encoders; what is known is taken out for one that begins from nothing."""
    assert DecoOptions(encoder="iev-tiny").seen == "raw"
    assert DecoOptions(encoder="random").seen == "upright"
    assert DecoOptions(encoder="random", poses="none", start="voxel").seen == "upright"
    assert DecoOptions(encoder="random", poses="none", start="network").seen == "flipped"
    assert DecoOptions(encoder="random", encoder_input="raw").seen == "raw"


def test_stages_follow_one_another() -> None:
    """Warm-up, search, refinement for the network start; refinement at once after a voxel start; else known."""
    options = replace(TINY, poses="none", start="network", warmup_images=100, search_epochs=2)
    stages = [stage_of(Step(i, 60), 6, options, 100) for i in range(60)]  # ten steps per epoch
    assert stages == [Stage.WARMUP] * 10 + [Stage.SEARCH] * 20 + [Stage.REFINE] * 30
    assert stage_of(Step(0, 60), 6, replace(options, start="voxel"), 100) is Stage.REFINE
    assert stage_of(Step(0, 60), 6, TINY, 100) is Stage.KNOWN
    assert stage_of(Step(0, 60), 6, replace(TINY, refine_poses=True), 100) is Stage.REFINE


# pose table -----------------------------------------------------------------------------------------------------------


def test_gradients_of_the_pose_table() -> None:
    """Slices of a volume with respect to six numbers and a shift per particle, against finite differences."""
    torch.manual_seed(0)
    disc = fourier.half_disc(BOX, 3)
    transform = volume_transform(blobs(BOX, 0).double())
    shift = 0.02 * torch.randn(2, 2, dtype=torch.float64)
    table = PoseTable(random_rotations(2, dtype=torch.float64), shift).double()

    def moved(six: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        slices = extract_slices(transform, six_d_to_matrix(six[torch.tensor([1, 0])]), disc)
        return torch.view_as_real(fourier.phase_shift(slices, disc, t[torch.tensor([1, 0])]))

    six = table.six.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(moved, (six, table.shift.detach().clone().requires_grad_()), eps=1e-6, atol=1e-3)


def test_pose_table_gives_back_what_was_put() -> None:
    """Rotations to rounding, others untouched, margins kept."""
    first, other = random_rotations(5), random_rotations(2)
    table = PoseTable(first, torch.zeros(5, 2))
    table.put(torch.tensor([3, 1]), other, torch.full((2, 2), 0.1), torch.tensor([7.0, 8.0]))
    rotation, shift = table(torch.arange(5))
    assert not rotation.requires_grad
    assert (
        geodesic_deg(rotation[[3, 1]], other).max() < 0.05
        and geodesic_deg(rotation[[0, 2]], first[[0, 2]]).max() < 0.05
    )
    assert torch.allclose(shift[3], torch.tensor([0.1, 0.1])) and not shift[0].any()
    assert table.margin[1] == 8 and table.margin[0].isnan()


def test_poses_are_not_averaged(two) -> None:
    """A search may move a pose far at once: a running average would put it where no image belongs."""
    from cryosuite.training.ema import Ema

    _, model = _built(two[0], replace(TINY, refine_poses=True))
    names = Ema(model, 0.9).names
    assert not any(name.startswith("table.") for name in names) and any(name.startswith("field.") for name in names)


def test_poses_that_are_held_do_not_move(two, tmp_path: Path) -> None:
    """Nor do those of particles outside the batch, once poses are refined."""
    method, model = _built(two[0], replace(TINY, refine_poses=True, hold_poses=0.5))
    for index, moving in ((4, False), (5, True)):
        model.zero_grad()
        method.loss(model.train(), _batch(two[0], [3, 7]), Step(index, 10))["loss"].backward()
        before = model.table.six.clone(), model.table.shift.clone()
        assert (model.table.gather(2) is not None) == moving
        model.table.step(0.01, (0.9, 0.999))
        for was, now in zip(before, (model.table.six, model.table.shift), strict=True):
            rows = (was != now).any(1).nonzero().flatten().tolist()
            assert rows == ([3, 7] if moving else [])


# encoder --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("finetune", "blocks"), [("all", 4), ("last-1", 1), ("head", 0), ("none", 0)])
def test_only_what_should_train_trains(two, finetune: str, blocks: int) -> None:
    """Gradients reach the last blocks asked for, head and decoder always (there is no head with none)."""
    options = replace(TINY, finetune=finetune)
    method, model = _built(two[0], options)
    model.train()
    method.loss(model, _batch(two[0]), Step(5, 10))["loss"].backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert len({name.split(".")[2] for name in moved if name.startswith("encoder.blocks")}) == blocks
    assert any(name.startswith("head") for name in moved) == (finetune != "none")
    assert any(name.startswith("field") for name in moved)
    assert model.zdim == (128 if finetune == "none" else 4)
    trained = {id(p) for group in method.parameter_groups(model) for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_features_of_a_frozen_encoder_are_those_of_its_images(two) -> None:
    """Kept features and features made anew are the same."""
    method, model = _built(two[0], replace(TINY, finetune="head"))
    z = method.encode(model, _batch(two[0]))
    method.frozen = None
    assert torch.allclose(method.encode(model.eval(), _batch(two[0])), z, atol=1e-5)


def test_batch_norms_stay_as_they_are_when_frozen(two) -> None:
    """With ``bn frozen`` features in training are those of evaluation; with ``train`` statistics move."""
    from cryosuite.nets.ief import IefEncoder, IefSpec

    for bn, moves in (("frozen", False), ("train", True)):
        _, model = _built(two[0], replace(TINY, bn=bn))
        model.encoder = IefEncoder(IefSpec("micro", 32, 2, 2, 14, 28))
        model.train()
        images = torch.randint(0, 255, (8, 28, 28), dtype=torch.uint8)
        before = model.encoder.blocks[0].norm2.running_mean.clone()
        model.features(images)
        assert bool((model.encoder.blocks[0].norm2.running_mean != before).any()) == moves


def test_prepared_images_undo_what_is_known() -> None:
    """Upright, centred, sign-corrected images of one view look alike; raw ones do not."""
    particles, _ = blob_particles([blobs(32, 3, 8)], 40, noise=0.05)
    from cryosuite.kernels.rotations import euler_to_matrix

    table = torch.zeros(40, 3)
    table[:, 0], table[:, 1], table[:, 2] = 30, 50, torch.linspace(0, 350, 40)
    rotation = euler_to_matrix(table)
    disc = fourier.half_disc(32)
    slices = extract_slices(volume_transform(blobs(32, 3, 8)), rotation, disc)
    shift = torch.from_numpy(particles.shift)
    images = fourier.from_half_disc(fourier.phase_shift(slices, disc, -shift), disc).numpy()
    particles = replace(particles, rotation=rotation.numpy(), ctf=None)
    particles.images.array[:] = images
    noise = torch.ones(1, 17)

    def likeness(seen: str) -> float:
        eight = encoder_cache(particles, seen, noise, 56, "robust", None).images.reshape(40, -1).astype(float)
        return float(np.corrcoef(eight).mean())

    assert likeness("upright") > 0.97 and likeness("upright") > likeness("raw") + 0.1


def test_encoder_of_a_state_has_its_shape(two) -> None:
    """The encoder is rebuilt from the tensors alone."""
    _, model = _built(two[0])
    found = encoder_of_state(model.state_dict()).spec
    assert (found.dim, found.depth, found.heads, found.image_size, found.norm2) == (128, 4, 4, 56, "ln")


# training -------------------------------------------------------------------------------------------------------------


def test_loss_is_one_for_noise() -> None:
    """An untrained network that says nothing leaves the noise, one per coefficient."""
    generator = torch.Generator().manual_seed(0)
    particles, _ = blob_particles([blobs(BOX, 0)], 64, noise=1.0)
    particles.images.array[:] = torch.randn(64, BOX, BOX, generator=generator).numpy()
    method, model = _built(particles, replace(TINY, window=False))
    with torch.no_grad():
        for p in model.field.last.parameters():
            p.zero_()
        loss = method.loss(model, _batch(particles, range(64)), Step(9, 10))["loss"]
    assert abs(float(loss) - 1) < 0.1


@pytest.mark.slow
def test_two_molecules_are_told_apart_with_known_poses(two, tmp_path: Path) -> None:
    """Latents of a short training separate them."""
    particles, labels = two
    method = Deco(TINY, None, 20)
    model = fit(method, particles, RunDir(tmp_path), replace(QUICK, epochs=20, batch_size=16, ema=0.9)).model
    z = method.embed(model, len(particles))
    assert z.shape == (160, 4) and agreement(labels, kmeans_labels(z, 2))[0] > 0.8
    assert method.decode(model, torch.from_numpy(z[:2])).shape == (2, BOX, BOX, BOX)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        replace(TINY, refine_poses=True, hold_poses=0.3),
        replace(TINY, poses="none", start="network", warmup_images=64, search_epochs=1, encoder_input="raw"),
        replace(
            TINY, poses="none", start="network", warmup_images=32, search_epochs=2, search="cached", cached_volumes=2
        ),
    ],
    ids=["refine", "network", "cached"],
)
def test_goes_on_exactly_in_every_stage(two, tmp_path: Path, options: DecoOptions) -> None:
    """Stopped after some steps of any stage, a training ends in the same weights, poses and latents."""
    particles = two[0].subset(np.arange(96))
    if options.poses == "none":
        particles = replace(particles, rotation=None, shift=None)
    training = replace(QUICK, epochs=4, checkpoint_every_minutes=0)

    def run(folder: Path, stop_at: int | None = None, resume: bool = False):
        method = Deco(options, None, 4)
        if stop_at is not None:
            inner = method.loss

            def loss(model, batch, step):
                if step.index == stop_at:
                    raise KeyboardInterrupt
                return inner(model, batch, step)

            method.loss = loss
        return method, fit(method, particles, RunDir(folder), training, resume=resume).model

    whole_method, whole = run(tmp_path / "whole")
    for stop_at in (1, 4, 10):
        folder = tmp_path / f"cut{stop_at}"
        with pytest.raises(KeyboardInterrupt):
            run(folder, stop_at)
        method, model = run(folder, resume=True)
        assert torch.equal(model.table.six, whole.table.six) and torch.equal(model.table.shift, whole.table.shift)
        assert np.array_equal(method.embed(model, 96), whole_method.embed(whole, 96)), stop_at


@pytest.mark.slow
def test_refinement_moves_poses_towards_the_truth(tmp_path: Path) -> None:
    """Perturbed by some degrees, rotations come nearer to the truth with the training."""
    particles, _ = blob_particles([blobs(BOX, 3, 8)], 200, noise=0.2)
    truth = torch.from_numpy(particles.rotation)
    from cryosuite.kernels.rotations import expmap

    torch.manual_seed(0)
    off = expmap(torch.randn(200, 3) * np.deg2rad(6)) @ truth
    disturbed = replace(particles, rotation=off.numpy())
    method = Deco(replace(TINY, refine_poses=True, lr_poses=3.0, hold_poses=0.0), None, 15)
    training = replace(QUICK, epochs=15, ema=0.0)
    model = fit(method, disturbed, RunDir(tmp_path), training).model
    found = model.table(torch.arange(200))[0].detach()
    assert geodesic_deg(found, truth).median() < 0.9 * geodesic_deg(off, truth).median()


# choices and bad days -------------------------------------------------------------------------------------------------


def test_shortest_latent_that_is_as_good() -> None:
    """Within the error of the best one the shorter is taken, and the reason is said."""
    generator = np.random.default_rng(0)
    base = 1 + 0.1 * generator.standard_normal(500)
    jitter = 0.01 * generator.standard_normal((3, 500))
    losses = {4: base + 0.05 + jitter[0], 8: base + 0.0001 + jitter[1], 64: base + jitter[2] - jitter[2].mean()}
    assert decide(losses)[0] == 8 and "64" in decide(losses)[1]
    losses[8] += 0.05
    assert decide(losses)[0] == 64 and "lowest" in decide(losses)[1]


def test_noise_is_called_noise(two) -> None:
    """A stack without particles gets a warning, one with particles does not."""
    particles, _ = blob_particles([blobs(BOX, 0)], 400, noise=1.0)
    assert warn_of_noise(particles) > 4
    generator = torch.Generator().manual_seed(0)
    particles.images.array[:] = torch.randn(400, BOX, BOX, generator=generator).numpy()
    with pytest.warns(UserNotice, match="nothing above the noise"):
        assert warn_of_noise(particles) < 4


def test_missing_poses_and_tiny_sets_are_refused(two) -> None:
    """With one sentence that says what to do."""
    with pytest.raises(InputError, match="no poses"):
        Deco(TINY).check(replace(two[0], rotation=None, shift=None))
    with pytest.raises(InputError, match="too few"):
        Deco(TINY).check(two[0].subset(np.arange(5)))
    for count, refused in ((18, True), (19, False)):
        with pytest.raises(InputError, match="--zdim auto") if refused else nullcontext():
            check(two[0].subset(np.arange(count)), TINY.changed(zdim_auto=True, k=2), QUICK)
    with pytest.raises(InputError, match="--encoder-size"):
        _built(two[0], replace(TINY, encoder_size="huge"))


def test_mirrored_poses_give_the_same_images() -> None:
    """A volume and its mirror image under mirrored poses are the same to every image."""
    rotation = random_rotations(20)
    disc = fourier.half_disc(BOX, 6)
    volume = blobs(BOX, 3)
    turned = torch.from_numpy(mirrored(rotation.numpy(), np.zeros((20, 2)))[0])
    assert torch.allclose(torch.linalg.det(turned), torch.ones(20), atol=1e-5)
    there = extract_slices(volume_transform(volume), rotation, disc)
    back = extract_slices(volume_transform(flip_hand(volume)), turned, disc)
    assert torch.allclose(there, back, atol=1e-3 * float(there.abs().max()))


@pytest.mark.slow
def test_length_of_the_latent_is_chosen_and_kept(two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every length is tried once; an interrupted choice goes on with the next; the result is one of them."""
    from cryosuite.methods import deco_auto

    monkeypatch.setattr(deco_auto, "ZDIMS", (2, 4))
    monkeypatch.setattr(deco_auto, "IMAGES_SEEN", 200)
    run, tried, trial = RunDir(tmp_path), [], deco_auto._trial

    def counted(particles, options, training, zdim):
        tried.append(zdim)
        if len(tried) == 2:
            raise deco_auto.Interrupted("SIGTERM")
        return trial(particles, options, training, zdim)

    monkeypatch.setattr(deco_auto, "_trial", counted)
    with pytest.raises(deco_auto.Interrupted):
        deco_auto.choose_zdim(two[0], run, TINY, QUICK)
    assert deco_auto.choose_zdim(two[0], run, TINY, QUICK) in (2, 4)
    assert tried == [2, 4, 4]


def test_trials_of_lengths_search_for_no_pose(two, monkeypatch: pytest.MonkeyPatch) -> None:
    """They train with poses that are there, so that no option of a search may stand in their way."""
    from cryosuite.methods import deco_auto

    seen = []
    stopped = SimpleNamespace(stopped="SIGTERM")
    monkeypatch.setattr(deco_auto, "fit", lambda method, *rest: seen.append(method.options) or stopped)
    options = TINY.changed(poses="none", start="voxel", research_every=2, search="cached", zdim_auto=True)
    with pytest.raises(deco_auto.Interrupted):
        deco_auto._trial(two[0], options, QUICK, 4)
    assert seen[0].zdim == 4 and not seen[0].searches


def test_learning_rate_of_the_encoder_follows_where_it_begins() -> None:
    """From nothing it learns as fast as the decoder, pre-trained more slowly, and what was typed wins."""
    assert preset("small", gpu=False)[1].options.lr_encoder == 1.0
    assert preset("small", gpu=False, encoder="iev-tiny")[1].options.lr_encoder == 0.3
    assert preset("default", gpu=True, encoder="random")[1].options.lr_encoder == 1.0
    assert preset("default", gpu=True)[1].options.lr_encoder == 0.1
    assert preset("small", gpu=False, lr_encoder=0.5)[1].options.lr_encoder == 0.5


def test_classes_found_with_their_poses_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a frame of its own; with one frame for all the images settle their classes (here: both are mended)."""
    particles, labels = blob_particles([blobs(24, seed) for seed in (1, 2, 3)], 300, noise=4.0, seed=4)
    wrong = np.where(np.random.default_rng(3).random(300) < 0.15, (labels + 1) % 3, labels)
    z = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)
    z[np.arange(300), wrong] += 20
    loaded = LoadedRun("deco", particles, z, 1, 6.0, 24, None, {})
    latents = cluster(z, "kmeans", 3)
    assert adjusted_rand_score(labels, latents.labels) < 0.8
    start = (np.arange(300) // 3) % 4
    monkeypatch.setattr(deco_finish, "start_record", lambda run: {"poses": {"label": torch.from_numpy(start)}})
    alone = DecoOptions(poses="none", classes=4)
    assert adjusted_rand_score(start, deco_finish.settled(RunDir(tmp_path), loaded, latents, alone, 0).labels) == 1
    asked = replace(alone, k=2)  # another number of classes than maps was asked for: those of the latents
    assert deco_finish.settled(RunDir(tmp_path), loaded, latents, asked, 0) is latents
    found = deco_finish.settled(RunDir(tmp_path), loaded, latents, DecoOptions(), 0)
    assert found.k == 3 and adjusted_rand_score(labels, found.labels) > 0.95
    network = DecoOptions(
        poses="none", start="network", classes=4, k=3
    )  # one network is one frame, whatever the number
    found = deco_finish.settled(RunDir(tmp_path), loaded, latents, network, 0)
    assert found.k == 3 and adjusted_rand_score(labels, found.labels) > 0.95


def test_states_that_share_a_cluster_of_latents_are_parted(tmp_path: Path) -> None:
    """The latents of noisy images know two groups of two states each: the images tell the four, and no more."""
    particles, labels = blob_particles([blobs(24, seed) for seed in (1, 2, 3, 4)], 480, noise=4.0, seed=4)
    z = np.random.default_rng(0).standard_normal((480, 3)).astype(np.float32)
    z[np.arange(480), labels // 2] += 20
    latents = cluster(z, "kmeans", 2)
    assert adjusted_rand_score(labels // 2, latents.labels) == 1
    loaded = LoadedRun("deco", particles, z, 1, 6.0, 24, None, {})
    found = deco_finish.settled(RunDir(tmp_path), loaded, latents, DecoOptions(), 0)
    assert found.k == 4 and adjusted_rand_score(labels, found.labels) > 0.95
    two = deco_finish.settled(RunDir(tmp_path), loaded, latents, DecoOptions(k=2), 0)
    assert two.k == 2  # as many as were asked for


def test_hands_that_are_flipped_agree_too(two, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that "auto" turns over is the one that "flip" leaves: each gives maps of one hand."""
    particles, labels = two
    monkeypatch.setattr(deco_hand, "_other_hand", lambda particles, labels: [1])

    def turned(hand: str) -> np.ndarray:
        return np.abs(settle_hands(particles, labels, hand).rotation - particles.rotation).max((1, 2)) > 1e-3

    with pytest.warns(UserNotice, match="hand of the maps"):
        assert (turned("auto") == (labels == 1)).all()
    assert (turned("flip") == (labels == 0)).all() and not turned("keep").any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"warmup_images": 320}, "--warmup-images 320"), ({"search_epochs": 0}, "--hps-epochs 0"),
     ({"zdim_auto": True}, "--zdim auto")],
)  # fmt: skip
def test_a_network_start_that_would_find_no_pose_is_refused(two, changes: dict, message: str) -> None:
    """Before the folder is touched."""
    options = replace(TINY, poses="none", start="network", warmup_images=100, search_epochs=1)
    check(two[0], options, QUICK)
    with pytest.raises(InputError, match=message):
        check(two[0], replace(options, **changes), QUICK)


def test_options_without_effect_are_told() -> None:
    """With what stands in their way."""
    known = TINY.without_effect(["hand", "lr_poses", "bn", "lr_encoder", "width", "research_every"])
    assert known == {
        "hand": "with known poses",
        "lr_poses": "with --fixed-poses",
        "bn": "with --encoder random",
        "research_every": "with --fixed-poses",
    }
    searched = replace(TINY, poses="none", start="network", finetune="head")
    assert searched.without_effect(["hand", "lr_poses", "refine_poses", "lr_encoder", "shift_extent"]) == {
        "hand": "with --start network", "refine_poses": "with poses that are found, which are always refined",
        "lr_encoder": "with --finetune head",
    }  # fmt: skip


def test_pixel_sizes_of_rows_reach_the_slices(two) -> None:
    """A point of an image with larger pixels lies nearer to the centre of the one volume."""
    table = two[0].ctf.copy()
    table[1::2, 1] = 7.5
    method, model = _built(replace(two[0], ctf=table, pixel_size=table[:, 1]), replace(TINY, march_from=1.0))
    seen = []
    model.values = lambda q, radius, z: seen.append(q) or torch.zeros(*q.shape[:2], 2)
    method.loss(model, _batch(replace(two[0], ctf=table, pixel_size=table[:, 1])), Step(19, 20))
    found = seen[0].norm(dim=-1) / (fourier.half_disc(BOX).radius / BOX)
    expected = torch.tensor([1, 6.0 / 7.5] * 4)[:, None].expand_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_choice_of_the_length_stops_in_time_and_can_go_on(two, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the trial in which the minutes have passed; what was found is kept."""
    from cryosuite.methods import deco_auto

    run, tried = RunDir(tmp_path), []
    run.config.write_text("method: deco\nparticles: p\noptions: {}\ntraining: {}\n")
    assert not can_resume(run)
    monkeypatch.setattr(deco_auto, "_trial", lambda *rest: tried.append(rest[3]) or [1.0, 2.0])
    monkeypatch.setattr(deco_auto, "time", SimpleNamespace(monotonic=lambda: 100.0 * len(tried)))
    with pytest.raises(deco_auto.Interrupted, match="max_minutes"):
        deco_auto.choose_zdim(two[0], run, TINY, replace(QUICK, max_minutes=1.0))
    assert tried == [4] and can_resume(run)
    assert deco_auto.choose_zdim(two[0], run, TINY, QUICK) == 4 and tried == [4, 8, 16, 32, 64, 128]


@pytest.mark.parametrize(("precision", "exact"), [("32", True), ("bf16", False), ("auto", False)])
@pytest.mark.parametrize("finetune", ["all", "head"])
def test_all_images_are_encoded_in_the_precision_asked_for(two, precision: str, exact: bool, finetune: str) -> None:
    """On a GPU: in float32 the latents are those of the processor, in bfloat16 they are not quite."""
    particles = two[0].subset(np.arange(40))
    options = replace(TINY, finetune=finetune)
    here, model = _built(particles, options)
    expected = here.embed(model, 40)
    with pretend_gpu() as gpu:
        torch.manual_seed(0)
        method = Deco(options, None, 1, precision)
        found = method.embed(method.build(particles).to(gpu), 40)
    apart = np.abs(found - expected).max() / np.abs(expected).max()
    assert apart < 1e-5 if exact else 1e-4 < apart < 0.1


def test_features_of_an_encoder_that_stays_are_made_where_the_training_will_be(two, monkeypatch) -> None:
    """Not on the processor, where the model is built."""
    particles, places = two[0].subset(np.arange(40)), []
    whole = DecoModel.features

    def features(model: DecoModel, images: torch.Tensor) -> torch.Tensor:
        places.append(images.device.type)
        return whole(model, images)

    monkeypatch.setattr(DecoModel, "features", features)
    found = []
    for accelerator in ("cpu", "cuda"):
        with pretend_gpu():
            torch.manual_seed(0)
            method = Deco(replace(TINY, finetune="head"), None, 1, "32", accelerator)
            model = method.build(particles)
        assert model.envelope.device.type == method.frozen.device.type == "cpu"
        found.append(method.frozen.clone())
    half = len(places) // 2
    assert half and set(places[:half]) == {"cpu"} and set(places[half:]) == {"cuda"}
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_held_out_images_are_seen_as_the_trained_ones_were(two) -> None:
    """Mean and deviation of the encoder's images stay those of the training."""
    from cryosuite.methods import deco_auto

    method, model = _built(two[0])
    before = model.pixels.clone()
    other = replace(two[0], images=ArrayImages(np.abs(two[0].read(slice(None)))))
    deco_auto.held_out(method, model.eval(), other.subset(np.arange(20)))
    assert torch.equal(model.pixels, before)
