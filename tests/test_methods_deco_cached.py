"""``--search cached``: poses found in a few volumes are those found in every particle's own where volumes are alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hype_toy import blob_particles, blobs
from pose_toy import Cloud, cloud
from torch import Tensor, nn

from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.kernels import fourier, pose_search
from cryosuite.kernels.pose_search import PointSource, SearchOptions, VolumeSource
from cryosuite.kernels.rotations import geodesic_deg, random_rotations
from cryosuite.methods.deco import Deco
from cryosuite.methods.deco_cached import CachedVolumes
from cryosuite.methods.deco_options import DecoOptions
from cryosuite.methods.deco_search import Searcher
from cryosuite.training.checkpoint import load_state
from cryosuite.training.loop import fit
from cryosuite.training.options import TrainOptions
from cryosuite.training.session import Objective

BOX = 24
CACHED = DecoOptions(
    encoder="random", encoder_size="micro", zdim=4, width=32, layers=1, n_frequencies=16, lr_encoder=1.0, lr_poses=1.0,
    poses="none", start="network", search="cached", cached_volumes=2, warmup_images=32,
)  # fmt: skip


class Toy(nn.Module):
    """A molecule of Gaussians in two halves; the latent (2) moves one of them, by so many pixels in x and y."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.body, self.arm = cloud(BOX, 10, seed=1, spread=0.25), cloud(BOX, 6, seed=2, spread=0.2)
        self.box_size, self.count = BOX, count
        self.cached: CachedVolumes | None = None
        self.table = SimpleNamespace(margin=torch.zeros(count))
        self.exact = 0  # values asked of the network

    def at(self, z: Tensor) -> Cloud:
        moved = self.arm.centres + torch.cat([z.double(), torch.zeros(1, dtype=torch.float64)])
        weights = torch.cat([self.body.weights, self.arm.weights])
        return Cloud(torch.cat([self.body.centres, moved]), weights, self.body.sigma, BOX)

    def field(self, q: Tensor, z: Tensor) -> Tensor:
        self.exact += q[..., 0].numel()
        values = torch.stack([self.at(one).values(points.double()) for points, one in zip(q, z, strict=True)])
        return torch.view_as_real(values).float()

    def amplitude(self, radius: Tensor) -> Tensor:
        return torch.ones_like(radius)

    def volumes(self, z: Tensor) -> Tensor:
        return torch.stack([self.at(one).volume() for one in z])


def searched(search: str, z: Tensor, centres: int = 4):
    """(poses found, their scores, truth, values asked of the network)."""
    torch.manual_seed(0)
    model = Toy(len(z))
    options = SimpleNamespace(shift_extent=0.08)
    searcher = Searcher(model, options)
    searcher.search_options = SearchOptions(r_min=6, r_max=BOX // 2, levels=2, base_order=1, base="polar", shift_grid=3)
    truth = random_rotations(len(z), dtype=torch.float32)
    disc = fourier.half_disc(BOX)
    q = disc.frequency @ truth[:, :2]
    clean = torch.view_as_complex(model.field(q, z).contiguous())
    noise = 0.3 * clean.abs().square().mean().sqrt()
    images = (clean / noise) + torch.randn(clean.shape, dtype=torch.complex64)
    target = SimpleNamespace(values=images, ctf=torch.full(images.shape, float(1 / noise)))
    index = torch.arange(len(z))
    source = PointSource(lambda q, index: searcher._values(q, z[index]), BOX)
    model.exact = 0
    if search == "exact":
        found = pose_search.search(source, target.values, target.ctf, index, searcher.search_options)
    else:
        model.cached = CachedVolumes(centres, z.shape[1], BOX)
        searcher.note(index, z)
        found = searcher._in_cached(source, target, index, z)
    return found, truth, model.exact


def latents(per_group: int = 8, spread: float = 0.05) -> Tensor:
    middle = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0]])
    return (middle.repeat_interleave(per_group, 0) + spread * torch.randn(4 * per_group, 2)).float()


def test_cached_volumes_find_what_the_exact_way_finds_at_a_part_of_its_cost() -> None:
    """Pose disagreement and loss of score against the number of volumes (DECO, T8)."""
    torch.manual_seed(3)
    z = latents()
    exact, truth, cost = searched("exact", z)
    four, _, cheap = searched("cached", z, 4)
    one, _, _ = searched("cached", z, 1)
    good = geodesic_deg(exact.rotation[:, 0], truth) < 5
    assert good.float().mean() > 0.85  # the toy can be solved
    same = geodesic_deg(four.rotation[:, 0], exact.rotation[:, 0]) < 3
    assert same[good].float().mean() > 0.9
    regret = {k: float((exact.score[:, 0] - found.score[:, 0])[good].mean()) for k, found in ((4, four), (1, one))}
    assert regret[4] < 0.02 * float(exact.score[good, 0].mean())
    assert regret[1] > 2 * regret[4]  # one volume for all is not enough
    assert cheap < 0.2 * cost


def test_latents_far_from_every_centre_take_the_exact_way() -> None:
    torch.manual_seed(4)
    z = latents(4)
    cached = CachedVolumes(4, 2, BOX)
    made = []
    cached.note(z, 1000, lambda centres: made.append(centres) or torch.zeros(1, BOX, BOX, BOX))
    assert len(made) == 4
    which, far = cached.nearest(torch.cat([z, torch.tensor([[40.0, 40.0]])]))
    assert len(which[:-1].view(4, 4).unique(dim=1)[0]) == 1 and bool(far[-1])
    assert far[:-1].float().mean() < 0.3
    assert [len(set(row.tolist())) for row in which[:-1].view(4, 4)] == [1, 1, 1, 1]


def test_large_boxes_keep_what_is_searched_and_no_more() -> None:
    """Transforms up to the radius of the search: slices of the whole volumes, bit for bit, in a part of the room."""
    volumes = torch.stack([blobs(32, seed) for seed in range(3)])
    known, order = torch.tensor([[0.0], [1.0], [2.0]]), []

    def make(centre: Tensor) -> Tensor:
        order.append(int(centre))
        return volumes[order[-1]][None]

    cached = CachedVolumes(3, 1, 32, r_max=4)
    assert cached.spectral and cached.volumes.numel() < 0.25 * volumes.numel()
    cached.note(known, 100, make)
    rotation, index = random_rotations(6).view(3, 2, 3, 3), torch.arange(3)
    whole = VolumeSource(volumes[order], r_max=4)
    for radius in (2, 4):
        ours, theirs = (source.slices(rotation, radius, index) for source in (cached.source(), whole))
        assert torch.equal(ours, theirs) and ours.abs().max() > 0
    disc = fourier.half_disc(32, 4)
    images = fourier.to_half_disc(torch.randn(3, 32, 32), disc)
    options = SearchOptions(r_min=4, r_max=4, levels=1, base_order=1, shift_grid=2)
    ours, theirs = (
        pose_search.search(source.of(index), images, torch.ones(3, len(disc)), index, options)
        for source in (cached.source(), whole)
    )
    assert torch.equal(ours.rotation, theirs.rotation) and torch.equal(ours.score, theirs.score)
    small = CachedVolumes(3, 1, 24)  # where a transform would take more room than the volume itself
    assert not small.spectral and small.volumes.shape == (3, 24, 24, 24)


def test_volumes_are_made_eight_times_per_pass() -> None:
    cached = CachedVolumes(2, 2, BOX)
    times = []
    for _ in range(50):  # 400 of 400 particles
        cached.note(torch.randn(8, 2), 400, lambda z: times.append(0) or torch.zeros(1, BOX, BOX, BOX))
    assert 6 <= len(times) / 2 <= 9


def test_search_in_cached_volumes_needs_a_search() -> None:
    with pytest.raises(InputError, match="re-search"):
        DecoOptions(search="cached")
    assert DecoOptions(search="cached", research_every=2, refine_poses=True).searches


def test_volumes_and_poses_are_not_sent_from_process_to_process_in_every_step() -> None:
    """DistributedDataParallel leaves out the buffers that the module which it wraps names."""
    method = Deco(CACHED, None, 2)
    objective = Objective(method, method.build(blob_particles([blobs(16, 3, 8)], 32, noise=0.5)[0]))
    large = {name for name, _ in objective.named_buffers() if ".cached." in name or ".table." in name}
    assert {"model.cached.volumes", "model.table.six", "model.table.mean"} <= large
    assert set(objective._ddp_params_and_buffers_to_ignore) == large


@pytest.mark.slow
def test_volumes_go_into_the_checkpoint_and_not_into_the_weights(tmp_path: Path) -> None:
    particles, _ = blob_particles([blobs(16, 3, 8), blobs(16, 11, 3)], 96, noise=0.5)
    particles = replace(particles, rotation=None, shift=None)
    training = TrainOptions(epochs=2, batch_size=32, lr=2e-3, precision="32", checkpoint_every_minutes=0)
    run = RunDir(tmp_path)
    model = fit(Deco(CACHED, None, 2), particles, run, training).model
    assert int(model.cached.age) > 0 and model.cached.volumes.abs().max() > 0
    assert not any("cached" in name for name in load_state(run.weights(2), "weights")["model_state_dict"])
