"""CryoHype's latents: principal axes of the pooled tokens, and the bank that volumes come from without images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hype_toy import blob_particles, blobs
from test_methods_hype import TINY, first_batch, flat

from cryosuite.methods.hype import Hype
from cryosuite.methods.hype_latent import build_bank, mean_tokens, nearest_rows, principal_axes
from cryosuite.methods.hype_model import HypeModel


@pytest.fixture(scope="module")
def tiny_set():
    return blob_particles([blobs(16, 0), blobs(16, 1)], 48, noise=0.3)


def test_principal_axes_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    rows = np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32) * np.arange(1, 13)
    space = principal_axes(rows, 5)
    reference = PCA(5).fit(rows)
    assert np.allclose(np.abs(space.components.numpy() @ reference.components_.T), np.eye(5), atol=1e-3)
    assert np.allclose(space.variances, reference.explained_variance_, rtol=1e-3)
    z = space.project(torch.from_numpy(rows))
    assert np.allclose(z.mean(0), 0, atol=1e-3) and np.allclose(z.var(0), reference.explained_variance_, rtol=1e-2)


def test_mean_tokens_reads_every_image_once():
    tokens = torch.randn(20, 3, 4)
    asked = []

    def read(rows):
        for part in np.array_split(rows, 3):
            asked.extend(part.tolist())
            yield part, tokens[part]

    groups = [np.array([1, 5, 7]), np.array([5]), np.array([19, 1])]
    found = mean_tokens(groups, read)
    assert torch.allclose(found, torch.stack([tokens[g].mean(0) for g in groups]), atol=1e-6)
    assert asked == [1, 5, 7, 19]


def test_bank_answers_like_the_images():
    """Two tight clusters with different tokens: a bank gives back each cluster's tokens."""
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(size=(40, 3)), 20 + rng.normal(size=(40, 3))]).astype(np.float32)
    tokens = torch.cat([torch.zeros(40, 2, 4), torch.ones(40, 2, 4)])
    space = principal_axes(z, 3)
    build_bank(space, z, lambda rows: iter([(rows, tokens[rows])]), size=6, knn=10)
    found = space.tokens_at(torch.from_numpy(z[[0, 50]]))
    assert torch.allclose(found[0], torch.zeros(2, 4), atol=1e-3)
    assert torch.allclose(found[1], torch.ones(2, 4), atol=1e-3)
    assert (nearest_rows(z, z[[3]], 1) == 3).all()


def test_all_tokens_as_latent_decode_to_each_images_own_volume(tiny_set):
    particles = tiny_set[0].subset(np.arange(6))
    method = Hype(replace(TINY, latent="tokens"))
    model = method.build(particles).eval()
    z = method.embed(model, particles, progress=False)
    assert z.shape == (6, 5 * 32) and z.dtype == np.float16
    batch = first_batch(particles)
    with torch.no_grad():
        own = model.volumes(model.tokens(model.prepare(batch)[1], batch)[:2])
    decoded = method.decode(model, torch.from_numpy(z[:2].astype(np.float32)))
    assert torch.allclose(decoded, own, atol=0.02 * float(own.abs().max()))


def test_volume_of_the_nearest_image_is_its_own(tiny_set):
    particles = tiny_set[0]
    method = Hype(replace(TINY, volume_from="image"))
    model = method.build(particles).eval()
    z = method.embed(model, particles, progress=False)
    method.use_images(model, particles, z)
    batch = first_batch(particles)
    with torch.no_grad():
        own = model.tokens(model.prepare(batch)[1], batch)
    assert torch.allclose(method.tokens(model, torch.from_numpy(z[[7, 3]])), own[[7, 3]], atol=1e-4)


def test_pooling_is_what_the_layers_are_told():
    """Mean of the heads' outputs over the groups of a layer; length and offset of a token do not matter."""
    model = HypeModel(16, TINY, flat(16))
    tokens = torch.randn(3, 5, 32)  # two layers of two tokens, one for the output
    pooled = model.pool(tokens)
    heads = model.hyper.heads
    assert pooled.shape == (3, 3 * 32)
    assert torch.allclose(pooled[:, :32], heads[0](tokens[:, :2]).mean(1), atol=1e-6)
    assert torch.allclose(pooled[:, 64:], heads[2](tokens[:, 4]), atol=1e-6)
    assert torch.allclose(model.pool(3 * tokens + 1), pooled, atol=1e-3)
