"""The Cryo-IEF encoder against outputs of its authors' program, and against its blocks written out plainly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cryosuite.data.encoder_weights import load_encoder
from cryosuite.formats.safetensors import read_safetensors
from cryosuite.nets import ief
from cryosuite.nets.ief import SPECS, IefEncoder, IefSpec, make_spec, sincos_positions

SMALL = IefSpec("small", dim=32, depth=3, heads=2, patch=7, image_size=28)


@pytest.fixture(scope="module")
def published(golden: Path) -> dict[str, Tensor]:
    io = np.load(golden / "cryo_ief" / "vit_tiny_io.npz")
    return {name: torch.from_numpy(np.asarray(io[name])) for name in io}


@pytest.fixture
def encoder(golden: Path) -> IefEncoder:
    return load_encoder(golden / "cryo_ief" / "vit_tiny.safetensors").encoder


def small(seed: int = 0, **changes: object) -> IefEncoder:
    torch.manual_seed(seed)
    spec = IefSpec(**{**SMALL.__dict__, **changes})
    encoder = IefEncoder(spec)
    for name, value in encoder.state_dict().items():  # nothing at its neutral start
        if "norm" in name and value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    return encoder


def written_out(encoder: IefEncoder, image: Tensor, batch_statistics: bool) -> Tensor:
    """All tokens after the final norm, from tensors and sums only."""
    state, spec = encoder.state_dict(), encoder.spec
    b, p, n = len(image), spec.patch, image.shape[-1] // spec.patch

    def layer_norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[name + ".weight"] + state[name + ".bias"]

    def batch_norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[name + ".running_mean"], state[name + ".running_var"]
        if batch_statistics:
            mean = x.mean((0, 1))
            var = (x - mean).square().mean((0, 1))
        return (x - mean) / (var + 1e-5).sqrt() * state[name + ".weight"] + state[name + ".bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    tokens = []
    for row in range(n):
        for column in range(n):
            patch = image[:, :, row * p : row * p + p, column * p : column * p + p]
            tokens.append(torch.einsum("bcyx,dcyx->bd", patch, state["patch_embed.proj.weight"]))
    x = torch.stack(tokens, 1) + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(b, 1, -1), x], 1) + state["pos_embed"]
    for number in range(spec.depth):
        name = f"blocks.{number}."
        q, k, v = linear(layer_norm(x, name + "norm1"), name + "attn.qkv").chunk(3, -1)
        heads = []
        for q1, k1, v1 in zip(*(part.chunk(spec.heads, -1) for part in (q, k, v)), strict=True):
            weights = torch.softmax(q1 @ k1.transpose(1, 2) / q1.shape[-1] ** 0.5, -1)
            heads.append(weights @ v1)
        x = x + linear(torch.cat(heads, -1), name + "attn.proj")
        hidden = linear(batch_norm(x, name + "norm2"), name + "mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + linear(hidden, name + "mlp.fc2")
    return layer_norm(x, "norm")


def test_features_equal_the_published_encoders(encoder: IefEncoder, published: dict[str, Tensor]) -> None:
    image = published["input_f32"]
    with torch.inference_mode():
        features, tokens = encoder(image), encoder.tokens(image)
        precise = encoder.double()(image.double())
    assert (features - published["cls_f32"]).abs().max() < 1e-5
    assert (tokens[0] - published["tokens_image0_f32"]).abs().max() < 1e-5
    assert (tokens[:, 0] - features).abs().max() < 1e-5
    assert (precise - published["cls_f64"]).abs().max() < 1e-10


def test_other_image_sizes_resample_the_positions(encoder: IefEncoder, published: dict[str, Tensor]) -> None:
    image = F.interpolate(published["input_f32"], size=(196, 196), mode="bilinear", align_corners=False)
    assert torch.equal(image[0], published["input196_image0"])
    with torch.inference_mode():
        assert (encoder(image) - published["cls196_f32"]).abs().max() < 1e-5
        assert encoder(torch.randn(2, 1, 256 - 256 % 14, 252)).shape == (2, 64)
    with pytest.raises(ValueError, match="multiple of 14"):
        encoder(torch.randn(1, 1, 225, 225))
    with pytest.raises(ValueError, match="takes images"):
        encoder(torch.randn(1, 224, 224))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_equals_the_published_encoders(
    golden: Path, encoder: IefEncoder, published: dict[str, Tensor], checkpointing: bool
) -> None:
    """Features, every gradient and the running statistics after one step; also when parts are computed twice."""
    head = read_safetensors(golden / "cryo_ief" / "vit_tiny.safetensors")
    weight, bias = (torch.from_numpy(head[f"base_encoder.head.{part}"]) for part in ("weight", "bias"))
    encoder.train()
    encoder.set_checkpointing(checkpointing)
    features = encoder(published["input_f32"])
    answer = F.linear(features, weight, bias)
    loss = features.square().mean() + answer.mean()
    loss.backward()
    assert (features - published["train_cls_f32"]).abs().max() < 1e-4
    assert (answer - published["train_head_f32"]).abs().max() < 1e-4
    assert abs(float(loss.detach() - published["train_loss"])) < 1e-5
    norms = json.loads((golden / "cryo_ief" / "vit_tiny_grad_norms.json").read_text())
    gradients = {name: value.grad for name, value in encoder.named_parameters() if value.grad is not None}
    assert gradients.keys() == {name for name in norms if not name.startswith("head")}
    for name, gradient in gradients.items():
        assert float(gradient.norm()) == pytest.approx(norms[name], rel=1e-3), name
    norm = encoder.blocks[0].norm2
    assert (norm.running_mean - published["train_running_mean_block0"]).abs().max() < 1e-5
    assert (norm.running_var - published["train_running_var_block0"]).abs().max() < 1e-5
    assert int(norm.num_batches_tracked) == int(published["train_num_batches_tracked"])


@pytest.mark.parametrize("size", ["vit_small", "vit_base"])
def test_state_keys_are_those_of_the_released_files(golden: Path, size: str) -> None:
    released = json.loads((golden / "cryo_ief" / "vit_keys.json").read_text())[size]
    wanted = {name: (tuple(shape), dtype) for name, (shape, dtype) in released.items() if not name.startswith("head.")}
    with torch.device("meta"):
        state = IefEncoder(SPECS[size]).state_dict()
    assert len(released) == 188 and len(state) == 186
    assert {name: (tuple(value.shape), str(value.dtype)[6:]) for name, value in state.items()} == wanted


def test_the_net_equals_its_blocks_written_out() -> None:
    encoder = small().double()
    image = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    with torch.inference_mode():
        encoder.eval()
        plain = written_out(encoder, image, batch_statistics=False)
        assert (encoder.tokens(image) - plain).abs().max() < 1e-12
        assert (encoder(image) - plain[:, 0]).abs().max() < 1e-12
        plain = written_out(encoder, image, batch_statistics=True)
        encoder.train()
        assert (encoder(image) - plain[:, 0]).abs().max() < 1e-12


def test_running_statistics_move_by_a_tenth_with_the_unbiased_variance() -> None:
    """One training step of the first block: momentum .1 over all B N tokens."""
    encoder = small(depth=1).double().train()
    norm, seen = encoder.blocks[0].norm2, []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().reshape(-1, 32)))
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    encoder(torch.randn(3, 1, 28, 28, dtype=torch.float64))
    assert seen[0].shape == (3 * 17, 32)
    assert torch.allclose(norm.running_mean, 0.9 * mean + 0.1 * seen[0].mean(0), atol=1e-14)
    assert torch.allclose(norm.running_var, 0.9 * var + 0.1 * seen[0].var(0), atol=1e-14)


@pytest.mark.parametrize("norm2", ["bn", "ln"])
@pytest.mark.parametrize("training", [True, False])
def test_the_class_token_alone_costs_no_gradient(norm2: str, training: bool) -> None:
    """``forward`` leaves out work that only other tokens need: same feature and gradients as from all tokens."""
    results = []
    for short in (True, False):
        encoder = small(norm2=norm2).double().train(training)
        image = torch.randn(3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        image.requires_grad_(True)
        feature = encoder(image) if short else encoder.tokens(image)[:, 0]
        feature.square().sum().backward()
        gradients = {name: value.grad for name, value in encoder.named_parameters() if value.grad is not None}
        results.append((feature.detach(), image.grad, gradients))
    (first, image, gradients), (all_tokens, image_too, gradients_too) = results
    assert torch.allclose(first, all_tokens, atol=1e-12) and torch.allclose(image, image_too, atol=1e-12)
    trained = {name for name, value in encoder.named_parameters() if value.requires_grad}
    assert gradients.keys() == gradients_too.keys() == trained
    assert all(torch.allclose(value, gradients_too[name], atol=1e-12) for name, value in gradients.items())


def test_batch_norm_makes_features_depend_on_the_batch_in_training_only() -> None:
    encoder = small()
    image = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        encoder.eval()
        assert torch.allclose(encoder(image)[:1], encoder(image[:1]), atol=1e-5)
        encoder.train()
        assert not torch.allclose(encoder(image)[:1], encoder(image[:1]), atol=1e-2)
        layer = small(norm2="ln").train()
        assert torch.allclose(layer(image)[:1], layer(image[:1]), atol=1e-5)


def test_positions_are_row_major_sines_first() -> None:
    code = sincos_positions(16, 384)[0]
    assert code.shape == (257, 384) and bool((code[0] == 0).all())
    assert code[2, 0] == 0 and code[2, 192] == pytest.approx(0.8415, abs=1e-4)  # row 0, column 1
    assert code[17, 0] == pytest.approx(0.8415, abs=1e-4) and code[17, 192] == 0  # row 1, column 0
    assert code[17, 96] == pytest.approx(np.cos(1), abs=1e-6)


def test_the_published_files_positions_are_ours(golden: Path) -> None:
    stored = read_safetensors(golden / "cryo_ief" / "vit_tiny.safetensors")["base_encoder.pos_embed"]
    assert np.abs(sincos_positions(16, 64).numpy() - stored).max() < 1e-6


def test_the_start_is_that_of_moco() -> None:
    torch.manual_seed(0)
    encoder = IefEncoder(make_spec("vit_tiny"))
    assert not encoder.pos_embed.requires_grad
    encoder.requires_grad_(False)
    block = encoder.blocks[0]
    bound = (6 / (192 + 192)) ** 0.5
    assert 0.95 * bound < float(block.attn.qkv.weight.abs().max()) <= bound
    bound = (6 / (192 + 4 * 192)) ** 0.5
    assert 0.95 * bound < float(block.mlp.fc1.weight.abs().max()) <= bound
    bound = (6 / (3 * 14**2 + 192)) ** 0.5
    assert 0.95 * bound < float(encoder.patch_embed.proj.weight.abs().max()) <= bound
    assert float(encoder.cls_token.abs().max()) < 1e-5
    assert all(float(module.bias.abs().max()) == 0 for module in (block.attn.qkv, block.mlp.fc2))
    assert encoder.spec.grid == 8 and encoder(torch.randn(2, 1, 112, 112)).shape == (2, 192)


def test_sizes_that_do_not_go_together_are_refused() -> None:
    for changes in ({"dim": 33}, {"image_size": 30}, {"norm2": "group"}, {"heads": 5}):
        with pytest.raises(ValueError, match="width"):
            IefSpec(**{**SMALL.__dict__, **changes})
    assert make_spec("vit_base", "ln").norm2 == "ln"


def test_half_precision_features_point_the_same_way() -> None:
    torch.manual_seed(0)
    encoder = IefEncoder(make_spec("vit_tiny")).eval()
    image = torch.randn(4, 1, 112, 112)
    with torch.inference_mode():
        exact = encoder(image)
        with torch.autocast("cpu", torch.bfloat16):
            short = encoder(image).float()
    assert float(F.cosine_similarity(exact, short).min()) > 0.999


def test_half_precision_gradients_point_the_same_way() -> None:
    gradients = []
    for half in (False, True):
        encoder = small().train()
        image = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            features = encoder(image)
        (features.float() @ torch.linspace(-1, 1, 32)).square().sum().backward()
        gradients.append([value.grad.flatten() for value in encoder.parameters() if value.grad is not None])
    for exact, short in zip(*gradients, strict=True):
        assert short.dtype == torch.float32
        assert float(F.cosine_similarity(exact, short, dim=0)) > 0.99 or float(exact.norm()) < 1e-4


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_attention_in_half_precision_on_a_cpu(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ief, "CPU_SCORES", at_once)
    q, k, v = torch.randn(3, 5, 2, 9, 8).bfloat16()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (ief._attention_cpu(q, k, v).double() - exact).abs().max() < 0.03
    first = ief._attention_cpu(q[:, :, :1], k, v)
    assert first.shape == (5, 2, 1, 8) and (first.double() - exact[:, :, :1]).abs().max() < 0.03


def test_the_fast_product_gives_the_same_features_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 with oneDNN and without, against float64."""
    results = []
    for product in (ief.product, F.linear, None):
        monkeypatch.setattr(ief, "product", product or F.linear)
        dtype = torch.float64 if product is None else torch.float32
        encoder = small().train().to(dtype)
        image = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(1)).to(dtype)
        features = encoder(image)
        features.square().mean().backward()
        results.append([features.detach(), *(value.grad for value in encoder.parameters() if value.grad is not None)])
    for fast, plain, exact in zip(*results, strict=True):
        assert (fast - exact).abs().max() < 1e-5 + 3 * (plain - exact).abs().max()


def test_synchronised_batch_norm_can_take_its_place() -> None:
    """Torch's own conversion finds the norms, keeps the keys and the features."""
    encoder = small().eval()
    image = torch.randn(2, 1, 28, 28)
    with torch.inference_mode():
        before = encoder(image)
        converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules()) == 3
        assert torch.allclose(converted(image), before, atol=1e-6)
    assert converted.state_dict().keys() == small().state_dict().keys()
