"""``encode_to_run``: features on disk, the precision asked for, and what is said of sets of any size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_commands_pretrain_iev import make_stack
from test_methods_iev import SMALL

from cryosuite.data.encoder_weights import save_encoder
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.formats.config import read_yaml
from cryosuite.formats.pickle_rows import PickledRows
from cryosuite.formats.pickles import read_array, read_latent, write_pickle
from cryosuite.methods.iev_encode import _rows, encode_to_run
from cryosuite.metrics import features
from cryosuite.nets.ief import IefEncoder


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.manual_seed(0)
    save_encoder(tmp_path / "e.safetensors", IefEncoder(SMALL), "standard", 0.5, 0.12, {})
    return str(tmp_path / "e.safetensors")


def test_precision_is_the_one_asked_for(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture) -> None:
    stack, found = make_stack(tmp_path / "one.mrcs", 30), {}
    for precision in ("auto", "32", "bf16"):
        run = RunDir(tmp_path / precision)
        encode_to_run(stack, run.path, weights, accelerator="cpu", precision=precision, pixel_size=2.0)
        found[precision] = read_latent(run.z(1))[0]
        assert np.array_equal(read_array(run.index, (30,), "index"), np.arange(30))
        assert read_yaml(run.config)["training"]["precision"] == precision
    assert np.array_equal(found["auto"], found["32"])
    assert not np.array_equal(found["bf16"], found["32"])
    np.testing.assert_allclose(found["bf16"], found["32"], atol=0.05 * np.abs(found["32"]).max())
    assert "30 particles encoded" in capsys.readouterr().out
    with pytest.raises(InputError, match="--precision half: expected one of auto, 32, bf16"):
        encode_to_run(stack, tmp_path / "half", weights, precision="half", pixel_size=2.0)
    assert not (tmp_path / "half").exists()


def test_neighbours_in_a_large_set_are_looked_for_among_some_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two classes that point apart, 600 features; the whole set, then 100 of them, give the same but say otherwise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    z = (rng.standard_normal((600, 8)) * 0.1 + np.eye(8)[labels]).astype(np.float32)
    run = RunDir(tmp_path)
    write_pickle(run.z(1), z)
    write_pickle(tmp_path / "labels.pkl", labels)
    truth = SimpleNamespace(labels=tmp_path / "labels.pkl", labels_of=lambda index: labels[index])
    table = PickledRows(run.z(1), z.shape)

    def told() -> list[object]:
        return _rows(run, table, truth, np.arange(600))[-1]

    assert told() == ["right by 10 nearest neighbours (true labels)", "100.0 %"]
    monkeypatch.setattr(features, "SAMPLE", 100)
    name = "right by 10 nearest neighbours (true labels), among 100 particles drawn at random"
    assert told() == [name, "100.0 %"]
    some = features.neighbour_sample(600)
    assert np.array_equal(some, features.neighbour_sample(600)) and len(np.unique(some)) == 100
    assert len(_rows(run, table, None, np.arange(600))) == 4


def test_spread_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) + 2
    whole = features.feature_spread(z)
    for size in (1, 7, 499):
        np.testing.assert_allclose(features.feature_spread(z.split(size)), whole, rtol=1e-4)
