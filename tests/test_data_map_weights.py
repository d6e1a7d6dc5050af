"""Weights of map networks on disk: what is written comes back, and nothing else is taken for it."""

import json

import numpy as np
import pytest
import torch

from cryosuite.data.map_weights import (
    load_map_encoder,
    load_map_weights,
    save_map_encoder,
    save_map_weights,
    shipped_map_weights,
)
from cryosuite.errors import InputError
from cryosuite.formats.safetensors import read_safetensors, read_safetensors_header, write_safetensors
from cryosuite.nets.map_vit import MapVit, MapVitSpec
from cryosuite.nets.scunet import Encoder, Scunet, ScunetSpec

SMALL = ScunetSpec(d=8, bottleneck=2)


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    net = Scunet(SMALL).eval()
    path = tmp_path / "w.safetensors"
    save_map_weights(path, net, task="wedge", voxel=10.0, norm="robust", notes={"crop": 32, "seed": [1, 2]})
    return path, net


def rewritten(path, tmp_path, change_tensors=None, **metadata):
    """A copy of the file with other metadata or tensors."""
    header = read_safetensors_header(path)
    tensors = read_safetensors(header)
    if change_tensors:
        change_tensors(tensors)
    out = tmp_path / "changed.safetensors"
    said = {k: v for k, v in (header.metadata | metadata).items() if v is not None}
    write_safetensors(out, tensors, said)
    return out


def test_what_is_written_comes_back(file):
    path, net = file
    found = load_map_weights(path)
    assert (found.task, found.voxel, found.norm) == ("wedge", 10.0, "robust")
    assert found.notes == {"crop": 32, "seed": [1, 2]} and not found.net.training
    crops = torch.rand(2, 1, 16, 16, 16)
    with torch.no_grad():
        np.testing.assert_allclose(found.net(crops), net(crops), atol=2e-2)
    half = {name: value.half().float() for name, value in net.state_dict().items()}
    for name, value in found.net.state_dict().items():
        assert torch.equal(value, half[name]), name
    assert path.stat().st_size < 2.5 * sum(p.numel() for p in net.parameters()) + 60_000


def test_the_fall_of_amplitudes_is_kept_and_files_that_do_not_name_it_are_of_maps_as_they_are(file, tmp_path):
    path, net = file
    assert load_map_weights(path).spectrum == "as-is"
    assert load_map_weights(rewritten(path, tmp_path, spectrum=None)).spectrum == "as-is"
    save_map_weights(tmp_path / "m.safetensors", net, task="sharpen", voxel=1.0, norm="robust", spectrum="matched")
    assert load_map_weights(tmp_path / "m.safetensors").spectrum == "matched"
    with pytest.raises(InputError, match="rainbow"):
        load_map_weights(rewritten(path, tmp_path, spectrum="rainbow"))
    with pytest.raises(ValueError, match="rainbow"):
        save_map_weights(tmp_path / "x.safetensors", net, task="sharpen", voxel=1.0, norm="robust", spectrum="rainbow")


def test_vit_comes_back(tmp_path):
    net = MapVit(MapVitSpec(dim=12, depth=1, decoder_depth=1, heads=2)).eval()
    save_map_weights(tmp_path / "v.safetensors", net, task="sharpen", voxel=1.0, norm="paper")
    assert isinstance(load_map_weights(tmp_path / "v.safetensors").net, MapVit)


def test_encoder_alone_and_out_of_a_network(file, tmp_path):
    path, net = file
    encoder = Encoder(SMALL)
    save_map_encoder(tmp_path / "e.safetensors", encoder, {"objective": "jepa"})
    found, notes = load_map_encoder(tmp_path / "e.safetensors")
    assert notes == {"objective": "jepa"}
    assert torch.equal(found.head.weight, encoder.head.weight.half().float())
    inside, _ = load_map_encoder(path)
    assert torch.equal(inside.head.weight, net.encoder.head.weight.half().float())
    with pytest.raises(InputError, match="map encoder.*train-lvm --init"):
        load_map_weights(tmp_path / "e.safetensors")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"kind": None}, "no word of what it is"),
        ({"kind": "cryosuite multiview"}, "it is a cryosuite multiview"),
        ({"spec": "[]"}, "describe no network"),
        ({"spec": "{"}, "describe no network"),
        ({"spec": json.dumps({**SMALL.__dict__, "d": 1 << 20})}, "sizes that no network has"),
        ({"spec": json.dumps({**SMALL.__dict__, "d": 16})}, "tensors fit"),
        ({"spec": json.dumps({**SMALL.__dict__, "n": 9})}, "too few for the network"),
        ({"spec": json.dumps({**SMALL.__dict__, "extra": 1})}, "other fields"),
        ({"net": "mamba"}, "describe no network"),
        ({"task": "paint"}, "task"),
        ({"voxel": "nan"}, "voxel"),
        ({"norm": None}, "norm"),
        ({"notes": "7"}, "notes are no JSON object"),
    ],
)
def test_other_metadata_are_refused(file, tmp_path, metadata, words):
    with pytest.raises(InputError, match=words):
        load_map_weights(rewritten(file[0], tmp_path, **metadata))


def test_other_tensors_are_refused(file, tmp_path):
    name = "encoder.head.weight"
    with pytest.raises(InputError, match=f"missing: {name}"):
        load_map_weights(rewritten(file[0], tmp_path, lambda t: t.pop(name)))
    with pytest.raises(InputError, match="another shape"):
        load_map_weights(rewritten(file[0], tmp_path, lambda t: t.update({name: t[name][:4]})))
    with pytest.raises(InputError, match="NaN"):
        load_map_weights(rewritten(file[0], tmp_path, lambda t: t.update({name: t[name] * np.float16(np.nan)})))


def test_missing_files_and_failed_trainings(file, tmp_path):
    with pytest.raises(InputError, match="none.safetensors"):
        load_map_weights(tmp_path / "none.safetensors")
    net = file[1]
    net.decoder.tail.bias.data.fill_(1e6)
    with pytest.raises(InputError, match="not finite in half precision"):
        save_map_weights(tmp_path / "x.safetensors", net, task="sharpen", voxel=1.0, norm="robust")
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ValueError, match="paint"):
        save_map_weights(tmp_path / "x.safetensors", net, task="paint", voxel=1.0, norm="robust")


def test_shipped_weights_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr("cryosuite.data.map_weights.WEIGHTS", tmp_path)
    with pytest.raises(InputError, match="train-lvm --task superres"):
        shipped_map_weights("superres")
    with pytest.raises(InputError, match="one of sharpen, superres, wedge"):
        shipped_map_weights("../x")
    (tmp_path / "lvm-wedge.safetensors").touch()
    assert shipped_map_weights("wedge").name == "lvm-wedge.safetensors"
