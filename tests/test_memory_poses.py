"""Poses without a reference when memory runs out: half as many images at a time, said once, the same poses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs

from cryosuite.errors import InputError, UserNotice
from cryosuite.kernels import pose_search
from cryosuite.kernels.rotations import geodesic_deg
from cryosuite.methods.deco import Deco
from cryosuite.methods.deco_options import DecoOptions
from cryosuite.methods.fastar_predict import StarPredictor
from cryosuite.nets.multiview import SPECS, Multiview
from cryosuite.reconstruct import abinitio_em as em
from cryosuite.reconstruct.abinitio import AbInitio, AbInitioOptions

OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
QUICK = AbInitioOptions(
    classes=1, starts=1, iterations=3, batch=40, settle=1, radius=(2, 3), rounds=((4, True), (6, False))
)


def hungry(monkeypatch: pytest.MonkeyPatch, room: object, name: str, most: int, which: int) -> list[int]:
    """Let a function run out of memory for more than ``most`` rows of argument ``which``; the rows it was given."""
    work: Callable = getattr(room, name)
    sizes: list[int] = []

    def work_or_die(*arguments: object, **more: object) -> object:
        sizes.append(len(arguments[which]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError(OOM)
        return work(*arguments, **more)

    monkeypatch.setattr(room, name, work_or_die)
    return sizes


def searched(particles) -> AbInitio:
    engine = AbInitio(particles, QUICK)
    while not engine.done:
        engine.advance()
    return engine


@pytest.mark.parametrize(("room", "name", "most", "which"), [(em, "expect", 2, 1), (pose_search, "search", 20, 1)])
def test_a_search_from_nothing_goes_on_with_less(
    room: object, name: str, most: int, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the starts, whose sums are those of all portions, and in the rounds."""
    particles, _ = blob_particles([blobs(16, 3, 8)], 60, noise=0.5)
    whole = searched(particles).found
    sizes = hungry(monkeypatch, room, name, most, which)
    with pytest.warns(UserNotice, match="out of memory with .* going on with"):
        found = searched(particles).found
    assert max(sizes) > most and sizes.count(max(sizes)) == 1  # never tried whole again
    apart = geodesic_deg(torch.from_numpy(found.rotation), torch.from_numpy(whole.rotation))
    assert float(apart.quantile(0.95)) < 0.1
    assert np.allclose(np.median(found.score), np.median(whole.score), rtol=1e-3)


def test_one_image_that_does_not_fit_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    particles, _ = blob_particles([blobs(16, 3, 8)], 60, noise=0.5)
    hungry(monkeypatch, pose_search, "search", 0, 1)
    with pytest.warns(UserNotice), pytest.raises(InputError, match="not enough memory for one of the images"):
        searched(particles)


def test_a_star_of_images_goes_on_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are encoded, and sets decoded, fewer at a time; a set that does not fit alone cannot be cut."""
    torch.manual_seed(0)
    predictor = StarPredictor(Multiview(SPECS["micro"]))
    size, channels = predictor.spec.size, predictor.spec.in_channels
    images = torch.randn(12, channels, size, size)
    tokens = predictor.encode(images, torch.arange(12))
    whole = predictor.decode(tokens.unflatten(0, (3, 4)))
    sizes = hungry(monkeypatch, predictor.model, "encode", 5, 0)
    with pytest.warns(UserNotice, match="12 images at a time: going on with 6"):
        less = predictor.encode(images, torch.arange(12))
    assert torch.allclose(less, tokens, atol=1e-5) and sizes == [12, 6, 3, 3, 3, 3]
    sizes = hungry(monkeypatch, predictor.model, "star", 1, 0)
    with pytest.warns(UserNotice, match="3 sets of images"):
        found = predictor.decode(tokens.unflatten(0, (3, 4)))
    assert sizes == [3, 1, 1, 1]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, whole, strict=True))
    hungry(monkeypatch, predictor.model, "star", 0, 0)
    with pytest.raises(InputError, match="one of the sets of images"):
        predictor.decode(tokens)


def test_latents_of_all_particles_go_on_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean pass after an epoch of deco-classify."""
    particles, _ = blob_particles([blobs(16, 3, 8)], 40, noise=0.5)
    torch.manual_seed(0)
    options = DecoOptions(encoder="random", encoder_size="micro", zdim=4, width=32, layers=1, n_frequencies=16)
    method = Deco(options, None, 1)
    model = method.build(particles)
    whole = method.embed(model, 40)
    sizes = hungry(monkeypatch, model, "features", 15, 0)
    with pytest.warns(UserNotice, match="40 images at a time: going on with 20"):
        less = method.embed(model, 40)
    assert sizes[:3] == [40, 20, 10] and np.allclose(less, whole, atol=1e-5)
