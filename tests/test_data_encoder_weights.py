"""Encoder files: every layout that is out there loads unchanged, everything else is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cryosuite.data import encoder_weights
from cryosuite.data.encoder_weights import load_encoder, save_encoder, shipped_encoder
from cryosuite.errors import InputError
from cryosuite.formats.safetensors import read_safetensors, write_safetensors
from cryosuite.nets.ief import SPECS, IefEncoder, IefSpec

State = dict[str, np.ndarray]
SPEC = IefSpec("vit_64x3", dim=64, depth=3, heads=2, image_size=112)


def bare(seed: int = 0) -> State:
    """A small encoder as the released files hold it, with its head (head.*)."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    state = {name: value.numpy() for name, value in IefEncoder(SPEC).state_dict().items()}
    for name, value in state.items():
        if "norm" in name and value.ndim:
            value[:] = rng.uniform(0.5, 1.5, value.shape)
    return state | {"head.weight": np.zeros((16, 64), np.float32), "head.bias": np.zeros(16, np.float32)}


def written(tmp_path: Path, state: State, metadata: dict[str, str] | None = None) -> Path:
    write_safetensors(tmp_path / "w.safetensors", state, metadata)
    return tmp_path / "w.safetensors"


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def feature(encoder: IefEncoder, side: int = 112) -> torch.Tensor:
    with torch.inference_mode():
        return encoder(torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(0)))


def test_the_published_fixture_loads_with_the_published_constants(golden: Path) -> None:
    loaded = load_encoder(golden / "cryo_ief" / "vit_tiny.safetensors")
    assert (loaded.spec.dim, loaded.spec.depth, loaded.spec.heads, loaded.spec.norm2) == (64, 2, 2, "bn")
    assert (loaded.prep, loaded.mean, loaded.std) == ("ief", 0.549995056189533, 0.11784453744259035)
    published = np.load(golden / "cryo_ief" / "preprocess.npz")["norm_mean_std"]
    assert np.allclose([loaded.mean, loaded.std], published, rtol=0, atol=1e-15)
    assert loaded.dropped == ["base_encoder.head.bias", "base_encoder.head.weight"]
    assert "base_encoder." in loaded.source and not loaded.encoder.training
    assert not loaded.encoder.pos_embed.requires_grad and loaded.encoder.cls_token.requires_grad


@pytest.mark.parametrize("prefix", ["", "base_encoder.", "module.base_encoder.", "module."])
def test_every_known_prefix_gives_the_same_encoder(prefix: str, tmp_path: Path) -> None:
    state = bare()
    loaded = load_encoder(written(tmp_path, prefixed(state, prefix)))
    found = loaded.encoder.state_dict()
    assert loaded.spec == SPEC
    assert found.keys() == state.keys() - {"head.weight", "head.bias"}
    assert all(np.array_equal(found[name].numpy(), state[name]) for name in found)
    assert sorted(loaded.dropped) == sorted([prefix + "head.weight", prefix + "head.bias"])


def test_a_whole_moco_wrapper_gives_its_base_encoder(tmp_path: Path) -> None:
    base, momentum = bare(0), bare(1)
    base = {name: value for name, value in base.items() if not name.startswith("head")}
    base["head.0.weight"] = np.zeros((8, 64), np.float32)
    everything = prefixed(base, "base_encoder.") | prefixed(momentum, "momentum_encoder.")
    everything["predictor.0.weight"] = np.zeros((8, 8), np.float32)
    loaded = load_encoder(written(tmp_path, everything))
    assert np.array_equal(loaded.encoder.norm.weight.detach().numpy(), base["norm.weight"])
    assert len(loaded.dropped) == len(momentum) + 2


def test_a_fine_tuned_cryodeco_encoder_brings_its_head(tmp_path: Path) -> None:
    state = {name: value for name, value in bare().items() if not name.startswith("head")}
    state["head.norm.weight"], state["head.norm.bias"] = state.pop("norm.weight"), state.pop("norm.bias")
    rng = np.random.default_rng(0)
    head = rng.standard_normal((8, 64)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    state["head.mlp_classifier.0.weight"], state["head.mlp_classifier.0.bias"] = head
    loaded = load_encoder(written(tmp_path, prefixed(state, "vit_backbone.")))
    assert np.array_equal(loaded.encoder.norm.weight.detach().numpy(), state["head.norm.weight"])
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(loaded.head, head, strict=True))
    assert loaded.dropped == []


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_precisions_are_brought_to_float32(dtype: type, tmp_path: Path) -> None:
    state = {name: value.astype(dtype) if value.dtype == np.float32 else value for name, value in bare().items()}
    loaded = load_encoder(written(tmp_path, state))
    assert loaded.encoder.norm.weight.dtype == torch.float32
    assert np.allclose(loaded.encoder.norm.weight.detach().numpy(), bare()["norm.weight"], atol=1e-3)


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: value for name, value in state.items() if name not in names}


def changed(name: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable[[State], State]:
    return lambda state: state | {name: value(state[name])}


def set_value(number: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[3] = number
        return array

    return change


def layer_norm(state: State) -> State:
    return {
        name: value for name, value in state.items() if not ("norm2" in name and "running" in name or "num_" in name)
    }


BROKEN: dict[str, tuple[Callable[[State], State], str]] = {
    "a wrong prefix": (lambda state: prefixed(state, "encoder_q."), "no cls_token under any of the prefixes"),
    "nothing in it": (lambda state: {"x": np.zeros(3, np.float32)}, "no Cryo-IEF encoder.*begins with .*x"),
    "no tensor at all": (lambda state: {}, "begins with nothing"),
    "one running mean missing": (
        without("blocks.1.norm2.running_mean"),
        "50 of 51 tensors match; missing blocks.1.norm2.running_mean",
    ),
    "one counter missing": (without("blocks.0.norm2.num_batches_tracked"), "missing blocks.0.norm2.num_batches"),
    "the final norm missing": (without("norm.weight", "norm.bias"), "missing norm.weight; missing norm.bias"),
    "a block in the middle missing": (
        lambda state: {name: value for name, value in state.items() if ".1." not in name},
        "36 of 51 tensors match; missing blocks.1.* and 10 more",
    ),
    "qkv transposed": (
        changed("blocks.1.attn.qkv.weight", lambda a: a.T.copy()),
        r"\(64, 192\), expected \(192, 64\)",
    ),
    "qkv without bias": (without(*(f"blocks.{i}.attn.qkv.bias" for i in range(3))), "missing blocks.0.attn.qkv.bias"),
    "a LayerNorm ViT": (layer_norm, "this is a LayerNorm ViT, not Cryo-IEF"),
    "an unknown tensor": (lambda state: state | {"blocks.0.ls1.gamma": np.zeros(64)}, "unknown blocks.0.ls1.gamma"),
    "colour images": (changed("patch_embed.proj.weight", lambda a: a.repeat(3, 1)), "3 channels"),
    "positions of no square": (changed("pos_embed", lambda a: a[:, :-1]), "64 positions"),
    "positions of another width": (changed("pos_embed", lambda a: a[..., :-1]), "expected"),
    "no positions": (without("pos_embed"), "missing or not of"),
    "class token of two dimensions": (changed("cls_token", lambda a: a[0]), "missing or not of"),
    "an empty class token": (lambda s: s | {"cls_token": np.zeros((0, 1, 1 << 40), np.float32)}, "no encoder"),
    "no width at all": (lambda s: s | {"cls_token": np.zeros((1, 1, 0), np.float32)}, "no encoder|no known size"),
    "a patch of nothing": (
        lambda s: s | {"patch_embed.proj.weight": np.zeros((64, 1, 0, 0), np.float32)},
        "no known size|no encoder",
    ),
    "a block of a far number": (lambda s: s | {"blocks.9999.norm1.weight": np.zeros(1)}, "10000 blocks"),
    "NaN weights": (changed("blocks.2.mlp.fc1.weight", set_value(np.nan)), "blocks.2.mlp.fc1.weight holds NaN"),
    "infinite bias": (changed("norm.bias", set_value(np.inf)), "norm.bias holds NaN or infinite"),
    "negative variance": (changed("blocks.0.norm2.running_var", set_value(-1)), "negative variances"),
    "whole numbers as weights": (changed("norm.bias", lambda a: a.astype(np.int32)), "norm.bias holds int32"),
    "a counter of fractions": (
        changed("blocks.0.norm2.num_batches_tracked", lambda a: a.astype(np.float32)),
        "must be a count",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("prefix", ["", "base_encoder."])
def test_what_does_not_fit_is_refused_in_words(name: str, prefix: str, tmp_path: Path) -> None:
    change, words = BROKEN[name]
    path = written(tmp_path, prefixed(change(bare()), prefix))
    with pytest.raises(InputError, match=words) as caught:
        load_encoder(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 900


def test_ours_comes_back_with_what_was_said_of_it(tmp_path: Path) -> None:
    torch.manual_seed(3)
    encoder = IefEncoder(SPEC).eval()
    save_encoder(tmp_path / "a.safetensors", encoder, "robust", 0.51, 0.123, {"command": "cryosuite ...", "seed": 3})
    loaded = load_encoder(tmp_path)
    assert (loaded.prep, loaded.mean, loaded.std, loaded.spec) == ("robust", 0.51, 0.123, encoder.spec)
    assert loaded.notes["command"] == "cryosuite ..." and loaded.notes["seed"] == "3" and loaded.dropped == []
    assert torch.equal(feature(loaded.encoder), feature(encoder))
    assert len(read_safetensors(tmp_path / "a.safetensors")) == 51
    with pytest.raises(InputError, match="prepared as 'robust', not 'ief'"):
        load_encoder(tmp_path, prep="ief")
    assert load_encoder(tmp_path, prep="robust").prep == "robust"


def test_layer_norm_of_our_own_is_known_by_its_metadata(tmp_path: Path) -> None:
    encoder = IefEncoder(replace(SPEC, norm2="ln")).eval()
    save_encoder(tmp_path / "a.safetensors", encoder, "ief", 0.5, 0.1)
    loaded = load_encoder(tmp_path)
    assert loaded.spec == replace(SPEC, norm2="ln") and torch.equal(feature(loaded.encoder), feature(encoder))


def test_weights_that_failed_are_not_written(tmp_path: Path) -> None:
    encoder = IefEncoder(SPEC)
    encoder.norm.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="norm.bias holds NaN"):
        save_encoder(tmp_path / "a.safetensors", encoder, "ief", 0.5, 0.1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        ({"prep": "other"}, "says prep other"),
        ({"mean": "0.5"}, "both mean and std"),
        ({"mean": "nan", "std": "0.1"}, "grey values"),
        ({"mean": "0.5", "std": "0"}, "grey values"),
        ({"heads": "7"}, "7 heads"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(notes: dict[str, str], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        load_encoder(written(tmp_path, bare(), notes))


def test_folders_and_absent_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        load_encoder(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="folder with 0"):
        load_encoder(tmp_path)
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", bare())
    with pytest.raises(InputError, match="folder with 2"):
        load_encoder(tmp_path)
    (tmp_path / "b.safetensors").rename(tmp_path / "model.safetensors")
    assert load_encoder(tmp_path).source.startswith(str(tmp_path / "model.safetensors"))


def test_an_encoder_that_is_not_installed_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_weights, "WEIGHTS", tmp_path)
    for name in ("iev-tiny", "", "../w"):
        with pytest.raises(InputError, match="none is installed.*Give the path"):
            shipped_encoder(name)
    save_encoder(tmp_path / "iev-tiny.safetensors", IefEncoder(SPEC), "robust", 0.5, 0.1)
    assert shipped_encoder().prep == "robust"
    with pytest.raises(InputError, match="installed: iev-tiny"):
        shipped_encoder("iev-small")


@pytest.mark.parametrize(("size", "mean"), [("vit_small", 0.549995056189533), ("vit_base", 0.53786290141223)])
def test_full_sizes_are_told_from_their_tensors(size: str, mean: float, tmp_path: Path) -> None:
    """One block of each, to keep the file small: width, heads, positions and constants are those of the size."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in IefEncoder(SPECS[size]).state_dict().items()}
    state = {
        name: np.zeros(shape, np.float16) for name, shape in shapes.items() if "blocks" not in name or ".0." in name
    }
    state["blocks.0.norm2.num_batches_tracked"] = np.zeros((), np.int64)
    loaded = load_encoder(written(tmp_path, state))
    assert (loaded.spec.heads, loaded.spec.image_size, loaded.spec.depth, loaded.mean) == (12, 224, 1, mean)
