"""Weights of pose networks: ours come back with their notes, the released layout loads strictly, the rest is not."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cryosuite.data import multiview_weights
from cryosuite.data.multiview_weights import load_multiview, load_released, save_multiview, shipped_multiview
from cryosuite.errors import InputError
from cryosuite.formats.safetensors import read_safetensors, read_safetensors_header, write_safetensors
from cryosuite.nets.multiview import SPECS, Multiview, MultiviewSpec, released
from cryosuite.nets.multiview_weights import UNUSED, adapt_released, released_table

OURS = MultiviewSpec(16, 4, 32, 2, 2, 48, 2, 3)
TINY = MultiviewSpec(16, 4, 32, 2, 2, 48, 2, 3, "patch", "table", "dense", False, 1, 0)  # of the released layout
State = dict[str, Tensor]


def released_state(seed: int = 0) -> State:
    """A random checkpoint of the released layout in small."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in released_table(TINY).items()}


def saved(path: Path, said: object) -> Path:
    torch.save(said, path / "released.pth")
    return path / "released.pth"


@torch.no_grad()
def look(net: Multiview) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, net.spec.in_channels, net.spec.size, net.spec.size, generator=generator)
    heads = net.heads(net.star(net.encode(x)[None]))
    return heads.x if net.spec.head == "dense" else torch.cat([heads.c, heads.a, heads.b], -1)


def test_the_released_layout_is_the_published_one() -> None:
    table = released_table()
    assert len(table) == 896 and sum(int(np.prod(shape)) for shape in table.values()) == 533_362_176
    assert table["enc_blocks.23.attn.qkv.weight"] == (3072, 1024) and table["mask_token"] == (1, 1, 768)
    assert table["dec_blocks2.11.cross_attn.projk.bias"] == (768,)
    assert table["downstream_heads.1.neck.2.weight"] == (256, 256, 3, 3)
    assert table["downstream_heads.0.proj.weight"] == (1024, 256) and table["segment_embeddings.weight"] == (128, 768)


def test_every_tensor_of_the_published_network_finds_its_place() -> None:
    """On the meta device: 533 million values, no memory."""
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in released_table().items()}
        net = Multiview(released())
    adapted = adapt_released(state)
    own = net.state_dict()
    assert own.keys() == adapted.keys() and adapted.keys() | set(UNUSED) == state.keys()
    assert all(own[name].shape == adapted[name].shape for name in own)
    net.load_state_dict(adapted, strict=True, assign=True)


WRAPPED: dict[str, Callable[[State], object]] = {
    "bare": lambda state: state,
    "as released": lambda state: {
        "model": state, "args": argparse.Namespace(lr=1e-4, data="x"), "epoch": 3, "optimizer": {"state": {}},
    },
    "data parallel": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_a_random_checkpoint_of_the_released_layout_round_trips(how: str, tmp_path: Path) -> None:
    state = released_state()
    net, notes = load_released(saved(tmp_path, WRAPPED[how](state)), TINY)
    found = net.state_dict()
    assert all(torch.equal(found[name], state[name]) for name in state if name not in UNUSED)
    assert len(found) == len(state) - 3 and notes["mode"] == "released"
    by_hand = Multiview(TINY).eval()
    by_hand.load_state_dict({name: value for name, value in state.items() if name not in UNUSED})
    assert torch.equal(look(net), look(by_hand)) and not net.training


def test_safetensors_of_the_released_layout_load_too(tmp_path: Path) -> None:
    state = released_state()
    write_safetensors(tmp_path / "r.safetensors", {name: value.numpy() for name, value in state.items()})
    net, notes = load_multiview(tmp_path / "r.safetensors", TINY)
    assert torch.equal(net.state_dict()["enc_norm.weight"], state["enc_norm.weight"]) and notes["mode"] == "released"


def test_view_update_is_copied_from_view_integration_when_the_file_has_none() -> None:
    state = {name: value for name, value in released_state().items() if not name.startswith("dec_blocks2.")}
    adapted = adapt_released(state, spec=TINY)
    assert torch.equal(adapted["dec_blocks2.1.mlp.fc1.weight"], state["dec_blocks.1.mlp.fc1.weight"])
    partly = state | {"dec_blocks2.0.norm1.weight": torch.zeros(48)}
    with pytest.raises(InputError, match=r"47 missing: dec_blocks2.0.norm1.bias"):
        adapt_released(partly, spec=TINY)


def test_one_error_counts_and_names_all_that_does_not_fit(tmp_path: Path) -> None:
    state = released_state()
    del state["enc_blocks.1.norm2.weight"]
    for i in range(7):
        state[f"extra.{i}"] = torch.zeros(2)
    state["decoder_embed.weight"] = state["decoder_embed.weight"].T.contiguous()
    with pytest.raises(InputError) as caught:
        load_released(saved(tmp_path, {"model": state}), TINY)
    message = str(caught.value)
    total = len(released_table(TINY))
    assert f"{total - 2} of {total} tensors fit" in message and "released.pth" in message
    assert "1 missing: enc_blocks.1.norm2.weight" in message
    assert "7 unexpected: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more" in message
    assert "1 of another shape: decoder_embed.weight is (32, 48), expected (48, 32)" in message
    assert "\n" not in message and len(message) < 900


@pytest.mark.parametrize("name", UNUSED)
def test_tensors_that_are_never_used_must_still_be_there(name: str) -> None:
    state = released_state()
    del state[name]
    with pytest.raises(InputError, match=f"1 missing: {name}"):
        adapt_released(state, spec=TINY)


class Foreign:
    """Something that a weights file has no business to hold."""

    def __reduce__(self) -> tuple:
        return os.getcwd, ()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"model": released_state(), "args": Foreign()}, "refused: it holds .*getcwd, which could run as code"),
        ({"model": [1, 2]}, "model is no tensor"),
        ([1, 2], "holds no weights"),
        ({}, "holds no weights"),
        ({"model": {"a": 3}}, "a is no tensor"),
        ({"model": released_state() | {"mask_token": torch.zeros(1, 1, 48, dtype=torch.int64)}}, None),
        ({"model": released_state() | {"enc_norm.bias": torch.zeros(32).long()}}, "enc_norm.bias holds int64"),
        ({"model": released_state() | {"enc_norm.bias": torch.full((32,), torch.nan)}}, "enc_norm.bias holds NaN"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused_in_words(said: object, words: str | None, tmp_path: Path) -> None:
    path = saved(tmp_path, said)
    if words is None:
        load_released(path, TINY)
        return
    with pytest.raises(InputError, match=words) as caught:
        load_released(path, TINY)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "absent"])
def test_broken_files_are_refused_in_words(damage: str, tmp_path: Path) -> None:
    path = saved(tmp_path, released_state())
    content = {"cut": path.read_bytes()[:5000], "text": b"not weights at all, only words", "empty": b""}
    path.unlink() if damage == "absent" else path.write_bytes(content[damage])
    for load in (load_released, load_multiview):
        with pytest.raises(InputError, match="released.pth"):
            load(path)


def test_ours_comes_back_in_half_precision_with_what_was_said_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Multiview(OURS)
    notes = {"mode": "target", "images_seen": 123, "command": "cryosuite train-fastar", "scores": {"median": 9.5}}
    save_multiview(tmp_path / "weights.safetensors", net, notes)
    for place in (tmp_path, tmp_path / "weights.safetensors"):  # a run's folder, the file
        found, said = load_multiview(place, OURS)
        assert found.spec == OURS and not found.training
        assert said["mode"] == "target" and said["images_seen"] == "123" and json.loads(said["scores"])["median"] == 9.5
        assert said.keys() == notes.keys()
        assert torch.allclose(look(found), look(net), atol=3e-3)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in found.parameters())
    stored = read_safetensors(tmp_path / "weights.safetensors")
    assert all(array.dtype == np.float16 for array in stored.values())
    save_multiview(tmp_path / "again.safetensors", found, said)
    again = read_safetensors(tmp_path / "again.safetensors")
    assert all(np.array_equal(again[name], stored[name]) for name in stored)


def test_the_released_network_can_be_kept_as_one_of_ours(tmp_path: Path) -> None:
    net, notes = load_released(saved(tmp_path, released_state()), TINY)
    save_multiview(tmp_path / "half.safetensors", net, notes)
    found, said = load_multiview(tmp_path / "half.safetensors")
    assert found.spec == TINY and said["mode"] == "released" and torch.allclose(look(found), look(net), atol=0.02)


def test_a_checkpoint_of_another_preset_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_multiview(path, Multiview(SPECS["micro"]))
    with pytest.raises(InputError, match="another preset: it is micro, not nano64: give the preset"):
        load_multiview(path, SPECS["nano64"])
    with pytest.raises(InputError, match="another preset: it is micro, not 16 px / 4, 32 x 2"):
        load_multiview(path, replace(OURS, grid_head=False))
    with pytest.raises(InputError, match="not a weights file of train-fastar, expected one of micro"):
        load_multiview(saved(tmp_path, {"model": released_state()}), SPECS["micro"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: (t, m | {"spec": "{"}), "describe no network"),
        (lambda t, m: (t, m | {"spec": json.dumps({"size": 16})}), "other fields"),
        (lambda t, m: (t, m | {"spec": json.dumps(asdict(OURS) | {"size": 10**9})}), "sizes that no network has"),
        (lambda t, m: (t, m | {"spec": json.dumps(asdict(OURS) | {"enc_depth": 10000})}), "sizes that no network has"),
        (lambda t, m: (t, m | {"spec": json.dumps(asdict(OURS) | {"patch": 5})}), "cannot be cut"),
        (lambda t, m: (t, m | {"spec": json.dumps(asdict(OURS) | {"enc_depth": 3})}), "12 missing: enc_blocks.2"),
        (lambda t, m: ({k: v for k, v in t.items() if k != "role"}, m), "1 missing: role"),
        (lambda t, m: (t | {"role": t["role"].astype(np.int32)}, m), "role holds int32"),
        (lambda t, m: (t | {"role": t["role"] * np.float16(np.nan)}, m), "role holds NaN"),
    ],
)
def test_files_that_lie_about_themselves_are_refused(change: Callable, words: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_multiview(path, Multiview(OURS))
    tensors, metadata = change(read_safetensors(path), read_safetensors_header(path).metadata)
    write_safetensors(path, tensors, metadata)
    with pytest.raises(InputError, match=words) as caught:
        load_multiview(path)
    assert "w.safetensors" in str(caught.value)


def test_weights_that_failed_are_not_written(tmp_path: Path) -> None:
    for value in (torch.nan, 1e6):  # half precision ends at 65504
        net = Multiview(OURS)
        net.role.data[0, 0] = value
        with pytest.raises(InputError, match="role holds values that are not finite"):
            save_multiview(tmp_path / "a.safetensors", net)
    with pytest.raises(ValueError, match="cannot be named"):
        save_multiview(tmp_path / "a.safetensors", Multiview(OURS), {"spec": "mine"})
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_not_installed_says_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiview_weights, "WEIGHTS", tmp_path)
    for name in ("fastar-micro", "", "../w"):
        with pytest.raises(InputError, match="none is installed.*Give the weights of your own"):
            shipped_multiview(name)
    save_multiview(tmp_path / "fastar-micro.safetensors", Multiview(OURS), {"mode": "target"})
    net, notes = shipped_multiview()
    assert net.spec == OURS and notes == {"mode": "target"}
    with pytest.raises(InputError, match="installed: fastar-micro"):
        shipped_multiview("fastar-nano64")
    with pytest.raises(InputError, match="folder without weights.safetensors"):
        load_multiview(tmp_path)
