"""CryoKRAQEN with a network field: every switch trains, the gauge, splitting, k-means, resume, and it finds classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs
from sklearn.metrics import adjusted_rand_score

from cryosuite.data.loader import BatchLoader
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.kernels import assignment
from cryosuite.kernels.shells import fsc
from cryosuite.methods.kraqen import Kraqen, describe, responsibilities
from cryosuite.methods.kraqen_model import OFFSET
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.training.loop import fit
from cryosuite.training.method import Step
from cryosuite.training.options import TrainOptions

TINY = KraqenOptions(field="triplane", n_codes=5, rank=4, channels=2, features=8, width=16, layers=2)


@pytest.fixture(scope="module")
def tiny_set():
    return blob_particles([blobs(16, 0), blobs(16, 1)], 48, noise=0.3)


def first_batch(particles, size: int = 64):
    return next(iter(BatchLoader(particles, size, shuffle=False, prefetch=0).epoch(0)))


def built(particles, **changes):
    torch.manual_seed(0)
    method = Kraqen(replace(TINY, **changes))
    return method, method.build(particles)


@pytest.mark.parametrize(
    "changes",
    [{}, {"field": "fourier"}, {"assign": "zcos"}, {"assign": "kernel", "kernel": "gaussian"}, {"loss": "l1"},
     {"loss": "huber"}, {"blend": "em"}, {"beta": 0.05}, {"straight_through": True}, {"anneal": "paper", "t_max": 13.0},
     {"assign": "kernel", "kernel": "none"}, {"init": "kmeans"}, {"n_codes": 1, "rank": 1}, {"n_codes": 60}],
)  # fmt: skip
def test_every_switch_trains_and_describes(tiny_set, changes):
    method, model = built(tiny_set[0], **changes)
    model.train()
    batch = first_batch(tiny_set[0])
    for index in (0, 40, 95):
        losses = method.loss(model, batch, Step(index, 100))
        losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    for name, p in model.named_parameters():
        assert p.grad is not None and bool(torch.isfinite(p.grad).all()), name
    weights, z = describe(model.eval(), tiny_set[0], progress=False)
    K, M = model.codes.shape
    assert weights.n_classes == K and z.shape == (48, M) and np.isfinite(z).all()
    assert np.allclose(weights.dense().sum(1), 1, atol=1e-5)
    assert method.decode(model, torch.from_numpy(z[:2])).shape == (2, 16, 16, 16)


def test_loss_and_scores_are_those_of_explicit_slices(tiny_set):
    method, model = built(tiny_set[0], jitter=0.0, split=False, balance=0.0, em_last=0.0)
    batch = first_batch(tiny_set[0])
    scene = model.scene(batch, 8)
    S = torch.view_as_complex(model.field.slices(scene.hidden, scene.sign, model.codes.expand(48, -1, -1)))
    S = S * scene.weight[..., None]
    x = scene.target.values
    likelihood = -(x[..., None] - S).abs().square().sum(1)
    system = model.gram(scene)
    found = model.logits(system, scene.points, 8, model.codes)
    assert torch.allclose(found - found[:, :1], likelihood - likelihood[:, :1], atol=1e-2, rtol=1e-4)
    p = torch.softmax(found, 1)
    blended = (x - (S * p[:, None]).sum(-1)).abs().square().mean()
    loss = method.loss(model, batch, Step(90, 100))["loss"]
    assert loss.item() == pytest.approx(blended.item(), rel=1e-4)
    em = (p[:, None] * (x[..., None] - S).abs().square()).sum(-1).mean()
    method.options = replace(method.options, blend="em")
    # the shares beyond the three best count as one mixed slice: never more than all of them one by one
    loss = method.loss(model, batch, Step(90, 100))["loss"].item()
    assert blended.item() - 1e-4 <= loss <= em.item() + 1e-4


def test_images_times_ten_give_the_same_shares(tiny_set):
    particles = tiny_set[0]
    from cryosuite.data.images import ArrayImages

    louder = replace(particles, images=ArrayImages(10 * particles.read(slice(0, 48))), noise=100 * particles.noise)
    one, other = (built(p)[1].eval() for p in (particles, louder))
    p = [responsibilities(model, s, progress=False).dense() for model, s in ((one, particles), (other, louder))]
    assert np.allclose(*p, atol=1e-3)


def test_gauge_changes_no_volume(tiny_set):
    _, model = built(tiny_set[0])
    with torch.no_grad():
        model.codes[:, 1:] *= 3
    before = model.volumes(model.codes)
    model.hold_gauge()
    assert model.codes[:, 1:].square().mean().sqrt().item() == pytest.approx(OFFSET, rel=1e-5)
    assert torch.allclose(model.volumes(model.codes), before, atol=1e-5 * before.abs().max().item())


def test_dead_codes_move_beside_the_busiest_the_same_way_everywhere(tiny_set):
    _, model = built(tiny_set[0])
    before = model.codes.detach().clone()
    results = []
    for _ in range(2):  # as two processes would, whatever their own random state
        with torch.no_grad():
            model.codes.copy_(before)
        model.hard.copy_(torch.tensor([50.0, 0, 30, 20, 0]))
        model.usage.copy_(torch.tensor([0.5, 0, 0.3, 0.2, 0]))
        torch.rand(3)
        model.split(7)
        results.append(model.codes.detach().clone())
    assert torch.equal(*results) and float(model.hard.sum()) == 0
    moved = results[0]
    assert torch.equal(moved[[0, 2, 3]], before[[0, 2, 3]])
    near = torch.cdist(moved[[1, 4]], before[[0, 2, 3]])
    assert sorted(near.argmin(1).tolist()) == [0, 1]  # one beside each of the two busiest
    assert float(near.min(1).values.max()) < OFFSET
    assert model.usage.sum().item() == pytest.approx(1, abs=1e-6)


def test_kmeans_start_finds_clumps_of_own_codes(tiny_set):
    _, model = built(tiny_set[0], init="kmeans")
    centres = torch.randn(5, 4)
    system = assignment.Gram(torch.eye(4).expand(200, 4, 4) * 7, torch.zeros(200, 4), torch.ones(200))
    model.remember(centres[torch.arange(200) % 5] + 0.01 * torch.randn(200, 4), system)
    model.start_from_means(3)
    assert float(torch.cdist(centres, model.codes.detach()).min(1).values.max()) < 0.05


def test_voxel_field_and_missing_poses_are_refused(tiny_set):
    with pytest.raises(InputError, match="--field voxel"):
        Kraqen(KraqenOptions()).build(tiny_set[0])
    with pytest.raises(InputError, match="needs poses"):
        Kraqen(TINY).build(replace(tiny_set[0], rotation=None))


def test_resumed_run_is_the_run_nobody_disturbed(tiny_set, tmp_path):
    options = TrainOptions(epochs=4, batch_size=8, lr=1e-3, accelerator="cpu", log_every=5)
    changed = {"init": "kmeans", "balance": 0.5}
    whole = fit(Kraqen(replace(TINY, **changed)), tiny_set[0], RunDir(tmp_path / "a"), options).model
    stops = iter([False] * 2)

    def stop(epoch, model):
        if epoch == 2 and next(stops, None) is not None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Kraqen(replace(TINY, **changed)), tiny_set[0], RunDir(tmp_path / "b"), options, on_epoch=stop)
    again = fit(Kraqen(replace(TINY, **changed)), tiny_set[0], RunDir(tmp_path / "b"), options, resume=True).model
    for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
def test_network_finds_three_classes(tmp_path):
    """Three maps, 600 images of moderate noise: the classes, and maps most like those they stand for."""
    volumes = [blobs(16, seed) for seed in (0, 1, 2)]
    particles, labels = blob_particles(volumes, 600, noise=1.0)
    options = replace(TINY, n_codes=5, rank=5, width=32, channels=4, features=16)
    training = TrainOptions(epochs=25, batch_size=50, lr=2e-3, accelerator="cpu", warmup=0.0, lr_final=0.1, ema=0.99)
    result = fit(Kraqen(options), particles, RunDir(tmp_path), training)
    weights, _ = describe(result.model, particles, progress=False)
    found = weights.labels()
    purity = sum(np.bincount(labels[found == k]).max() for k in np.unique(found)) / len(labels)
    assert purity > 0.95 and adjusted_rand_score(labels, found) > 0.5
    maps = result.model.volumes(result.model.codes)
    for k in np.unique(found):
        members = np.bincount(labels[found == k], minlength=3)
        if members.sum() > 50 and members.max() > 0.9 * members.sum():  # a mixed code shows a mixed map
            near = [float(fsc(maps[k], volume)[:4].mean()) for volume in volumes]
            assert np.argmax(near) == members.argmax()
