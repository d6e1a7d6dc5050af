"""The multi-view network: a star is dense attention with a mask, order and company do not matter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from multiview_toy import SMALL, TABLE, images, model, noise, template_cache
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cryosuite.kernels.planar import token_map
from cryosuite.kernels.rotations import random_rotations
from cryosuite.nets import multiview_blocks as blocks
from cryosuite.nets.multiview import SPECS, Multiview, MultiviewSpec, flops, parameter_count, released
from cryosuite.nets.multiview_heads import Heads

PUBLISHED = {"micro": (4.7, 0.10), "nano64": (7.6, 0.71), "tiny64": (19.2, 1.74), "small64": (50, 4.75)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_sizes_of_the_design(name: str) -> None:
    """Stem, heads and what rotations are scored with add a little to the star of the table."""
    spec, (millions, gflops) = SPECS[name], PUBLISHED[name]
    assert 1.0 < parameter_count(spec) / 1e6 / millions < 1.25
    assert 1.0 < flops(spec, 8) / 1e9 / gflops < 1.08


def test_the_published_network_has_its_published_size_and_cost() -> None:
    unused = 768 + 1024 * 3 * 256 + 1024
    assert parameter_count(released()) == 533_362_176 - unused
    assert SPECS["paper"] == released()
    for views in (2, 32, 128):  # linear in the number of views
        assert flops(released(), views) / 1e9 == pytest.approx(54.2, abs=0.1)


@pytest.mark.parametrize("name", SPECS)
def test_the_cost_is_counted_right(name: str) -> None:
    spec, n = SPECS[name], 6
    with torch.device("meta"):
        net, x = Multiview(spec), torch.randn(n, spec.in_channels, spec.size, spec.size)
        with FlopCounterMode(display=False) as counted:
            net.heads(net.star(net.encode(x)[None]))
        assert counted.get_total_flops() == pytest.approx(n * flops(spec, n), rel=1e-6)
        if spec.head == "affine":
            cache = net.templates(x[None], torch.randn(1, n, spec.tokens, 9))
            with FlopCounterMode(display=False) as counted:
                net.heads(net.against(cache, net.encode(x)[None]))
            assert counted.get_total_flops() == pytest.approx(n * flops(spec, 0, templates=n), rel=1e-6)
            with FlopCounterMode(display=False) as counted:
                net.match(net.encode(x))
            assert counted.get_total_flops() == pytest.approx(n * flops(spec, 0), rel=1e-6)


def turned(x: Tensor, grid: int) -> Tensor:
    """Rotary positions written with complex numbers: (L, heads, d), L = views * grid^2."""
    L, _, d = x.shape
    quarter = d // 4
    place = torch.arange(L) % (grid * grid)
    out = torch.empty_like(x)
    for half, position in enumerate((place // grid, place % grid)):
        part = x[..., 2 * quarter * half : 2 * quarter * (half + 1)]
        angle = position[:, None] / 100 ** (torch.arange(quarter) / quarter)
        z = (
            torch.complex(part[..., :quarter], part[..., quarter:])
            * torch.polar(torch.ones_like(angle), angle)[:, None]
        )
        out[..., 2 * quarter * half : 2 * quarter * (half + 1)] = torch.cat([z.real, z.imag], -1)
    return out


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax over all patches of all views with the forbidden ones at -inf; (L, heads, d) -> (L, heads d)."""
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    weight = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num()
    return torch.einsum("hij,jhd->ihd", weight, v).flatten(1)


def dense_star(net: Multiview, tokens: Tensor) -> Tensor:  # (N, T, enc) -> (N, T, dec)
    """The star as masked attention over everything: nothing is cut out, nothing computed view by view."""
    n, t = tokens.shape[:2]
    grid, table = net.spec.grid, net.spec.role == "table"
    view = torch.arange(n).repeat_interleave(t)
    own = view[:, None] == view
    x = net.decoder_embed(net.enc_norm(tokens)).flatten(0, 1)
    x = x + (net.segment_embeddings.weight[view] if table else net.role[(view > 0).long()])

    def block(layer: nn.Module, x: Tensor, sees: Tensor) -> Tensor:
        source, heads = layer.norm_y(x), layer.attn.heads
        q, k, v = layer.attn.qkv(layer.norm1(x)).unflatten(-1, (3, heads, -1)).unbind(1)
        x = x + layer.attn.proj(dense_attention(turned(q, grid), turned(k, grid), v, own))
        cross = layer.cross_attn
        q = cross.projq(layer.norm2(x)).unflatten(-1, (heads, -1))
        k, v = (proj(source).unflatten(-1, (heads, -1)) for proj in (cross.projk, cross.projv))
        if table:
            q, k = turned(q, grid), turned(k, grid)
        x = x + cross.proj(dense_attention(q, k, v, sees))
        return x + layer.mlp(layer.norm3(x))

    is_reference = (view == 0)[:, None]
    for integrate, update in zip(net.dec_blocks, net.dec_blocks2, strict=True):
        x = torch.where(is_reference, block(integrate, x, (view != 0)[None].expand_as(own)), x)
        x = torch.where(is_reference, x, block(update, x, (view == 0)[None].expand_as(own)))
    return x.unflatten(0, (n, t))


@pytest.mark.parametrize("spec", [SMALL, TABLE], ids=["ours", "released layout"])
@pytest.mark.parametrize("n", [2, 5])
@torch.no_grad()
def test_the_star_is_dense_attention_with_the_right_mask(spec: MultiviewSpec, n: int) -> None:
    net = model(spec)
    tokens = net.encode(images(n, spec=spec))
    assert torch.allclose(net.star(tokens[None])[0], dense_star(net, tokens), atol=2e-5)


@torch.no_grad()
def test_order_of_the_others_does_not_matter() -> None:
    net = model()
    tokens = net.encode(images(8)).unflatten(0, (1, 8))
    order = torch.tensor([0, 3, 1, 7, 2, 6, 5, 4])
    before, after = (net.heads(net.star(x)) for x in (tokens, tokens[:, order]))
    for name in ("c", "a", "b", "conf_logit", "shift", "pooled"):
        assert torch.allclose(getattr(before, name)[:, order], getattr(after, name), atol=2e-5), name
    other_reference = net.heads(net.star(tokens.flip(1)))
    assert not torch.allclose(before.c, other_reference.c.flip(1), atol=1e-2)


@torch.no_grad()
def test_the_released_network_does_number_its_views() -> None:
    net = model(TABLE)
    tokens = net.encode(images(4, spec=TABLE))[None]
    order = torch.tensor([0, 3, 1, 2])
    assert not torch.allclose(net.star(tokens)[:, order], net.star(tokens[:, order]), atol=1e-2)


@pytest.mark.parametrize("n", [2, 3, 8, 33])
@torch.no_grad()
def test_any_number_of_views_and_sets_stay_apart(n: int) -> None:
    net = model()
    tokens = net.encode(images(2 * n)).unflatten(0, (2, n))
    both = net.star(tokens)
    assert both.shape == (2, n, 16, 48)
    assert torch.allclose(both[1:], net.star(tokens[1:]), atol=2e-5)
    found = net.poses(net.heads(both))
    assert found.rotation.shape == (2, n, 3, 3) and found.shift.shape == (2, n, 2) and found.confidence.shape == (2, n)


@torch.no_grad()
def test_against_a_target_no_image_depends_on_its_neighbours() -> None:
    net = model()
    cache = template_cache(net)
    batch = images(64)
    together = net.poses(net.heads(net.against(cache, net.encode(batch)[None])))
    alone = [net.poses(net.heads(net.against(cache, net.encode(image[None])[None]))) for image in batch[:5]]
    for i, one in enumerate(alone):
        assert torch.allclose(one.rotation[0, 0], together.rotation[0, i], atol=1e-4)
        assert torch.allclose(one.shift[0, 0], together.shift[0, i], atol=1e-5)
        assert torch.allclose(one.confidence[0, 0], together.confidence[0, i], atol=1e-4)


@torch.no_grad()
def test_cached_templates_are_fresh_templates_in_any_order() -> None:
    net = model()
    rotation, pictures = random_rotations(5)[None], images(1, 5, seed=3)
    tokens = net.encode(images(6))[None]
    cache = net.templates(pictures, net.maps_of(rotation))
    first, again = net.against(cache, tokens), net.against(cache, tokens)
    assert torch.equal(first, again)
    order = torch.tensor([4, 2, 0, 1, 3])
    fresh = net.templates(pictures[:, order], net.maps_of(rotation[:, order]))
    assert torch.allclose(net.against(fresh, tokens), first, atol=2e-5)
    turned_frame = net.templates(pictures, net.maps_of(rotation @ random_rotations(1)))
    assert not torch.allclose(net.against(turned_frame, tokens), first, atol=1e-2)


@torch.no_grad()
def test_each_set_is_matched_with_its_own_target() -> None:
    net = model()
    tokens = net.encode(images(6)).unflatten(0, (2, 3))
    one, other = template_cache(net, seed=4), template_cache(net, seed=5)
    both = [tuple(torch.cat(pair) for pair in zip(*layer, strict=True)) for layer in zip(one, other, strict=True)]
    together = net.against(both, tokens)
    assert torch.allclose(together[:1], net.against(one, tokens[:1]), atol=2e-5)
    assert torch.allclose(together[1:], net.against(other, tokens[1:]), atol=2e-5)


@torch.no_grad()
def test_the_sign_shown_on_the_first_other_view_is_seen() -> None:
    net = model()
    tokens = net.encode(images(8)).unflatten(0, (2, 4))
    plus, none = net.star(tokens, torch.tensor([1.0, 0.0])), net.star(tokens)
    assert torch.allclose(plus[1], none[1], atol=2e-5) and not torch.allclose(plus[0], none[0], atol=1e-3)


@torch.no_grad()
def test_maps_of_templates_are_their_planar_maps() -> None:
    net, rotation = model(), random_rotations(6).view(2, 3, 3, 3)
    maps = net.maps_of(rotation)
    assert maps.shape == (2, 3, 16, 9)
    assert torch.equal(maps[..., :3], token_map(rotation, 16, 4)[0]) and torch.equal(
        maps[1, 2, 7, 3:6], rotation[1, 2, 0]
    )


def test_rotary_attention_knows_distances_only() -> None:
    """A product of turned query and key depends on the difference of their rows and columns."""
    table = blocks.rope_table(8, 32)
    q, k = noise(2, 32)
    products = torch.einsum("ihd,jhd->ij", *(blocks.rotate(x.expand(64, 1, 32), table) for x in (q, k))).view(
        8, 8, 8, 8
    )
    assert torch.allclose(products[0, 0, 2, 3], products[4, 1, 6, 4], atol=1e-5)
    assert torch.allclose(products[5, 6, 1, 3], products[7, 7, 3, 4], atol=1e-5)
    assert not torch.allclose(products[0, 0, 2, 3], products[0, 0, 3, 2], atol=1e-2)  # rows are not columns


def test_attention_on_a_cpu_in_half_precision_is_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = noise(5, 7, 3, 16), noise(5, 9, 3, 16, seed=1), noise(5, 9, 3, 16, seed=2)
    expected = blocks.attend(q, k, v)
    for held in (1 << 23, 200, 1):  # all at once, in parts, one by one
        monkeypatch.setattr(blocks, "CPU_SCORES", held)
        found = blocks.attend(*(x.bfloat16() for x in (q, k, v)))
        assert torch.allclose(found.float(), expected, atol=0.03)


@torch.no_grad()
def test_half_precision_changes_little_and_heads_answer_in_full() -> None:
    net = model()
    batch = images(4)

    def said() -> Heads:
        return net.heads(net.against(template_cache(net), net.encode(batch)[None]))

    full = said()
    with torch.autocast("cpu", torch.bfloat16):
        half = said()
        scores = net.grid_scores(half.pooled, random_rotations(3))
    for name in ("c", "a", "b", "conf_logit", "shift", "pooled"):
        found, expected = getattr(half, name), getattr(full, name)
        assert found.dtype == torch.float32 and (found - expected).std() < 0.05 * expected.std() + 0.01, name
    assert scores.dtype == torch.float32


def test_every_parameter_learns_in_its_mode() -> None:
    net = model()
    batch, pictures = images(4), images(1, 3, seed=8)
    cache = net.templates(pictures, net.maps_of(random_rotations(3)[None]))
    tokens = net.encode(batch)[None]
    embed = {name for name, _ in net.named_parameters() if name.startswith("map_embed.")}
    for x, idle in ((net.against(cache, tokens), {"hand"}), (net.star(tokens, torch.ones(1)), embed)):
        net.zero_grad()
        said, match = net.heads(x), net.match(tokens)
        total = sum(getattr(said, name).square().mean() for name in ("c", "a", "b", "conf_logit", "shift"))
        total = total + net.grid_scores(said.pooled, random_rotations(5)).square().mean() + match.shift.square().mean()
        total = total + net.match_scores(match.vector, match.vector)[..., 0].sum() + net.denoised(x).square().mean()
        total.backward(retain_graph=True)
        without = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
        assert without == idle


@torch.no_grad()
def test_a_network_begins_the_same_from_the_same_seed_and_says_little() -> None:
    torch.manual_seed(5)
    one = Multiview(SMALL)
    torch.manual_seed(5)
    two = Multiview(SMALL)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    said = one.heads(one.star(one.encode(images(4))[None]))
    assert said.c.abs().max() < 1 and said.shift.abs().max() < 0.2 and said.conf_logit.abs().max() < 1


@pytest.mark.parametrize(
    "change",
    [
        {"size": 18}, {"patch": 3}, {"patch": 12, "size": 24}, {"enc_dim": 30}, {"dec_heads": 5}, {"stem": "none"},
        {"head": "dense"}, {"enc_depth": 0}, {"in_channels": 3}, {"match_dim": -1}, {"grid_head": 1}, {"dec_dim": 48.0},
    ],
)  # fmt: skip
def test_sizes_that_do_not_go_together_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="patch|multiples|unknown|whole numbers|grid head|cut"):
        replace(SMALL, **change)


def test_what_cannot_be_asked_is_refused() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"shape \(2, 16, 16\), not \(1, 16, 16\)"):
        net.encode(noise(3, 1, 16, 16))
    with pytest.raises(ValueError, match="at least one other"):
        net.star(net.encode(images(1))[None])
    dense = model(TABLE)
    with pytest.raises(ValueError, match="shown a target"):
        dense.templates(images(1, 2, spec=TABLE), torch.zeros(1, 2, 16, 9))
