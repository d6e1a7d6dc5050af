"""``cryosuite lvm-sharpen``: files in, files out, headers as they were, and a clear word on bad days."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from map_toy import toy_atoms
from sharpen_toy import correlation, toy_map
from test_commands_eval_model import write_model
from test_data_map_grid import CASES, make
from test_kernels_map_spectrum import globule

from cryosuite.cli import main
from cryosuite.data.map_grid import read_grid, write_like
from cryosuite.data.map_weights import save_map_encoder, save_map_weights
from cryosuite.formats.mrc import write_map
from cryosuite.formats.safetensors import read_safetensors_header
from cryosuite.kernels.degrade import soft_lowpass
from cryosuite.kernels.map_norm import auto_mask
from cryosuite.kernels.wedge import wedge_mask
from cryosuite.nets.scunet import Encoder, Scunet, ScunetSpec

SPEC = ScunetSpec(d=2, bottleneck=2, mlp=1)


def passing(scale: float = 1.0) -> Scunet:
    """A SCUNet that gives back its input, scaled: all branches silent, head and tail the middle voxel."""
    net = Scunet(SPEC)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if not name.startswith(("encoder.head", "decoder.tail")):
                value.zero_()
        for layer, factor in ((net.encoder.head, 1.0), (net.decoder.tail, scale)):
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[0, 0, 1, 1, 1] = factor
    return net.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights that pass the map on, for working voxels of 1 A and, for wedges, 10 A."""
    folder = tmp_path_factory.mktemp("weights")
    for task, voxel in (("sharpen", 1.0), ("wedge", 10.0)):
        save_map_weights(folder / f"{task}.safetensors", passing(), task=task, voxel=voxel, norm="robust")
    net = passing()
    with torch.no_grad():  # blurs along no axis as along another
        kernel = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0))
        net.encoder.head.weight[0, 0] = kernel / kernel.sum()
    save_map_weights(folder / "uneven.safetensors", net, task="sharpen", voxel=1.0, norm="robust")
    net.decoder.tail.weight.requires_grad_(False).zero_()
    save_map_weights(
        folder / "matched.safetensors", passing(), task="sharpen", voxel=1.0, norm="robust", spectrum="matched"
    )
    save_map_weights(folder / "nothing.safetensors", net, task="sharpen", voxel=1.0, norm="robust")
    save_map_encoder(folder / "encoder.safetensors", Encoder(SPEC))
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command; exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cryosuite", "lvm-sharpen", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """map.mrc, half1.mrc, half2.mrc, mask.mrc and model.cif of the toy."""
    folder = tmp_path_factory.mktemp("maps")
    halves = [toy_map((60, 52, 66), (1.05,) * 3, noise=0.05, seed=seed) for seed in (1, 2)]
    for name, grid in (("half1", halves[0]), ("half2", halves[1])):
        write_map(folder / f"{name}.mrc", grid.data, 1.05, grid.origin)
    grid = halves[0]
    write_map(folder / "map.mrc", (halves[0].data + halves[1].data) / 2, 1.05, grid.origin)
    mask = (toy_map((60, 52, 66), (1.05,) * 3, noise=0.0, resolution=12).data > 0.1).astype(np.float32)
    write_map(folder / "mask.mrc", mask, 1.05, grid.origin)
    write_model(folder / "model.cif", toy_atoms(200))
    return folder


def test_a_network_that_does_nothing_gives_the_map(call, files, weights, tmp_path):
    out = tmp_path / "out.mrc"
    code, said, _ = call(files / "map.mrc", "-o", out, "--weights", weights / "sharpen.safetensors", "--match-scale")
    assert code == 0 and "lvm-sharpen, sharpen" in said
    before, after = read_grid(files / "map.mrc"), read_grid(out)
    assert after.origin == before.origin and after.voxel == before.voxel
    solid = before.data > 0.3 * before.data.max()
    assert correlation(after.data[solid], np.minimum(before.data, after.data.max())[solid]) > 0.98


@pytest.mark.parametrize("case", sorted(CASES))
def test_headers_come_back(call, weights, tmp_path, case):
    """Origin, nstart, axis order, number type, byte order: all as in the input, but for float32 and one label."""
    path, out = tmp_path / "in.mrc", tmp_path / "out.mrc"
    make(path, **CASES[case])
    code, _, err = call(path, "-o", out, "--weights", weights / "sharpen.safetensors", "--match-scale", "--no-skip")
    assert code == 0, err
    with mrcfile.open(path, permissive=True) as a, mrcfile.open(out) as b:
        for name in ("nx", "ny", "nz", "nxstart", "nystart", "nzstart", "mx", "my", "mz", "mapc", "mapr", "maps"):
            assert a.header[name] == b.header[name], name
        for name in ("cella", "cellb", "origin"):
            assert a.header[name].tolist() == b.header[name].tolist(), name
        assert b.header["mode"] == 2 and b.header["nlabl"] == a.header["nlabl"] + 1
        assert b"not a measurement" in bytes(b.header["label"][int(a.header["nlabl"])])
    before, after = read_grid(path), read_grid(out)
    assert before.origin == after.origin and correlation(before.data, after.data) > 0.9


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16])
def test_number_types(call, weights, tmp_path, dtype):
    path, out = tmp_path / "in.mrc", tmp_path / "out.mrc"
    data = make(path, dtype=np.float32)
    with mrcfile.new(
        path, (data + 100).astype(dtype) if dtype == np.uint16 else data.astype(dtype), overwrite=True
    ) as m:
        m.voxel_size = 1.2
    code, _, err = call(path, "-o", out, "--weights", weights / "sharpen.safetensors", "--no-skip")
    assert code == 0, err
    assert correlation(read_grid(path).data, read_grid(out).data) > 0.9


def test_half_maps_are_averaged(call, files, weights, tmp_path):
    how = ("--weights", weights / "sharpen.safetensors", "--batch", "3", "--precision", "32")
    assert call(files / "map.mrc", "-o", tmp_path / "one.mrc", *how)[0] == 0
    code, _, err = call(
        "--half1", files / "half1.mrc", "--half2", files / "half2.mrc", "-o", tmp_path / "two.mrc", *how, "--per-half"
    )
    assert code == 0 and "NOT a gold-standard" in err and "half maps: FSC .143" in err
    np.testing.assert_allclose(read_grid(tmp_path / "one.mrc").data, read_grid(tmp_path / "two.mrc").data, atol=1e-5)
    halves = [read_grid(tmp_path / f"two_half{h}.mrc").data for h in (1, 2)]
    assert 0.5 < correlation(*halves) < 0.9999


def test_everything_that_can_be_written(call, files, weights, tmp_path):
    names = {name: tmp_path / f"{name}.mrc.gz" for name in ("out", "std", "cc")}
    code, said, err = call(
        files / "map.mrc", "-o", names["out"], "--weights", weights / "uneven.safetensors", "--uncertainty",
        names["std"], "--tta", 2, "--local-cc", names["cc"], "--mask", files / "mask.mrc", "--model",
        files / "model.cif", "--stride", 20,
    )  # fmt: skip
    assert code == 0, err
    for word in ("standard deviation", "local correlation", "CC mask", "Q, sigma 0.4", "before", "after", "calculated"):
        assert word in said, word
    found = {name: read_grid(path) for name, path in names.items()}
    mask = read_grid(files / "mask.mrc").data
    assert (found["out"].data[mask == 0] == 0).all() and found["out"].data.max() <= 1
    assert found["std"].data.min() >= 0 and found["std"].data.max() > 0 and np.abs(found["cc"].data).max() <= 1


def test_an_empty_result_is_said(call, files, weights, tmp_path):
    how = ("--weights", weights / "nothing.safetensors", "--model", files / "model.cif")
    code, said, err = call(files / "map.mrc", "-o", tmp_path / "o.mrc", *how)
    assert code == 0 and "made nothing of this map" in err and "before" not in said
    assert (read_grid(tmp_path / "o.mrc").data == 0).all()


def test_scores_do_not_move_when_the_map_does_not(call, files, weights, tmp_path):
    how = ("--weights", weights / "sharpen.safetensors", "--no-skip", "--precision", "32")
    code, said, err = call(files / "map.mrc", "-o", tmp_path / "o.mrc", *how, "--model", files / "model.cif")
    assert code == 0, err
    row = next(line for line in said.splitlines() if "CC mask, 3 A" in line).replace("│", "|").split("|")
    before, after = (float(cell) for cell in row[2:4])
    assert before > 0.5 and abs(before - after) < 0.03


def test_wedges_keep_what_was_measured(call, weights, tmp_path):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(36, 40, 44)).astype(np.float32)
    write_map(tmp_path / "tomo.mrc", data, 9.0)
    code, _, err = call(
        tmp_path / "tomo.mrc", "-o", tmp_path / "o.mrc", "--weights", weights / "wedge.safetensors", "--tilt-range",
        -50, 40, "--tilt-axis", "x",
    )  # fmt: skip
    assert code == 0, err
    out = read_grid(tmp_path / "o.mrc").data
    kept = (wedge_mask(data.shape, (-50.0, 40.0), "x", 9.0) == 1).numpy()
    before, after = (np.fft.rfftn(one.astype(np.float64)) for one in (data, out))
    assert np.abs(before - after)[kept].max() < 1e-5 * np.abs(before).max()
    assert np.abs(before - after)[~kept].max() > 1e-2 * np.abs(before).max()


def test_weights_of_a_run_and_of_another_task(call, files, weights, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "weights.safetensors").write_bytes((weights / "sharpen.safetensors").read_bytes())
    assert call(files / "map.mrc", "-o", tmp_path / "o.mrc", "--weights", run)[0] == 0
    code, _, err = call(files / "map.mrc", "-o", tmp_path / "p.mrc", "--weights", run, "--task", "wedge")
    assert code == 2 and "trained for --task sharpen, not wedge" in err and not (tmp_path / "p.mrc").exists()
    code, _, err = call(files / "map.mrc", "-o", tmp_path / "p.mrc", "--weights", weights / "encoder.safetensors")
    assert code == 2 and "train-lvm --init" in err


def test_no_weights_installed(call, files, tmp_path, monkeypatch):
    monkeypatch.setattr("cryosuite.data.map_weights.WEIGHTS", tmp_path)
    code, _, err = call(files / "map.mrc", "-o", tmp_path / "o.mrc", "--task", "superres")
    assert code == 2 and "--weights" in err and "train-lvm --task superres" in err
    code, _, err = call(files / "map.mrc", "-o", tmp_path / "o.mrc", "--task", "../fastar-micro")
    assert code == 2 and "sharpen, superres, wedge" in err


def bad(folder: Path) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(0)
    nan = rng.normal(size=(20, 20, 20)).astype(np.float32)
    nan[3, 4, 5] = np.nan
    return {
        "zero": np.zeros((20, 20, 20), np.float32), "constant": np.full((20, 20, 20), 2.5, np.float32), "nan": nan,
        "image": rng.normal(size=(1, 40, 40)).astype(np.float32),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [("zero", "nothing to enhance"), ("constant", "2.5"), ("nan", "1 of 8000 values"), ("image", "no map of a volume")],
)
def test_maps_without_a_map(call, weights, tmp_path, name, words):
    write_map(tmp_path / "bad.mrc", bad(tmp_path)[name], 1.1)
    code, _, err = call(tmp_path / "bad.mrc", "-o", tmp_path / "o.mrc", "--weights", weights / "sharpen.safetensors")
    assert code == 2 and words in " ".join(err.split()) and "bad.mrc" in err
    assert not (tmp_path / "o.mrc").exists() and len(err.strip().splitlines()) < 8


def test_cells_that_are_not_rectangular(call, weights, tmp_path):
    make(tmp_path / "in.mrc")
    with mrcfile.open(tmp_path / "in.mrc", "r+") as mrc:
        mrc.header["cellb"]["beta"] = 94.3
    code, _, err = call(tmp_path / "in.mrc", "-o", tmp_path / "o.mrc", "--weights", weights / "sharpen.safetensors")
    assert code == 2 and "94.3" in err and "right angles" in err


def test_unset_voxel_sizes(call, weights, files, tmp_path):
    data = read_grid(files / "map.mrc").data
    write_map(tmp_path / "in.mrc", data, None)
    how = ("-o", tmp_path / "o.mrc", "--weights", weights / "sharpen.safetensors")
    code, _, err = call(tmp_path / "in.mrc", *how)
    assert code == 2 and "--apix" in err
    code, _, err = call(tmp_path / "in.mrc", *how, "--apix", 1.05)
    assert code == 0 and read_grid(tmp_path / "o.mrc").voxel == pytest.approx((1.05,) * 3)
    write_map(tmp_path / "one.mrc", data, 1.0)
    code, _, err = call(tmp_path / "one.mrc", *how)
    assert code == 0 and "exactly 1 A per voxel" in err


def test_thirty_angstrom_maps_are_told(call, weights, tmp_path):
    grid = toy_map((24, 24, 24), (6.0,) * 3, resolution=30.0, noise=0.0)
    write_map(tmp_path / "in.mrc", grid.data, 6.0)
    code, _, err = call(tmp_path / "in.mrc", "-o", tmp_path / "o.mrc", "--weights", weights / "sharpen.safetensors")
    assert code == 0 and "trust none of it" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name one map"),
        (("map.mrc", "--half1", "half1.mrc", "--half2", "half2.mrc"), "not both"),
        (("--half1", "half1.mrc"), "one half map alone"),
        (("--half1", "half1.mrc", "--half2", "half1.mrc"), "same values"),
        (("--half1", "half1.mrc", "--half2", "small.mrc"), "not on one grid"),
        (("map.mrc", "--mask", "small.mrc"), "not on one grid"),
        (("map.mrc", "--per-half"), "--half1"),
        (("map.mrc", "--tta", "1", "--uncertainty", "u.mrc"), "--tta 8"),
        (("map.mrc", "--tta", "99"), "1 to 24"),
        (("map.mrc", "--batch", "many"), "--batch many"),
        (("map.mrc", "--stride", "48"), "--stride 48"),
        (("map.mrc", "--resolution", "-1"), "--resolution"),
        (("map.mrc", "--uncertainty", "out.mrc"), "-o"),
        (("map.mrc", "--model", "far.cif"), "atoms lies in"),
        (("none.mrc",), "none.mrc"),
    ],
)
def test_arguments_that_cannot_be(call, files, weights, tmp_path, monkeypatch, arguments, words):
    folder = tmp_path / "work"
    folder.mkdir()
    for path in files.iterdir():
        (folder / path.name).symlink_to(path)
    write_map(folder / "small.mrc", np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32), 1.05)
    write_model(folder / "far.cif", toy_atoms(20, centre=(900.0, 900.0, 900.0)))
    monkeypatch.chdir(folder)
    code, _, err = call(*arguments, "-o", "out.mrc", "--weights", weights / "sharpen.safetensors")
    assert code == 2 and words in " ".join(err.split()) and not (folder / "out.mrc").exists()


def test_the_input_is_never_replaced(call, files, weights, tmp_path):
    copy = tmp_path / "map.mrc"
    copy.write_bytes((files / "map.mrc").read_bytes())
    code, _, err = call(copy, "-o", copy, "--weights", weights / "sharpen.safetensors")
    assert code == 2 and "give another name" in err and copy.read_bytes() == (files / "map.mrc").read_bytes()
    code, _, err = call(copy, "-o", tmp_path / "no" / "o.mrc", "--weights", weights / "sharpen.safetensors")
    assert code == 2 and "no folder" in err
    code, _, err = call(copy, "-o", tmp_path, "--weights", weights / "sharpen.safetensors")
    assert code == 2 and "is a folder" in err


def test_odd_maps_of_other_programs(call, shared, weights, tmp_path):
    """Each is done, or refused in one line; nothing is half written and nothing falls over."""
    paths = [path for path in sorted((shared / "data" / "odd_mrc").rglob("*.*")) if path.is_file()]
    assert len(paths) > 8
    for path in paths:
        if path.name in ("1oel_A_8.mrc", "test_unfixable_mask.map"):  # good maps, and large ones
            continue
        out = tmp_path / f"{path.stem}_out.mrc"
        code, _, err = call(path, "-o", out, "--weights", weights / "sharpen.safetensors", "--no-skip", "--stride", 24)
        assert code == 0 or code == 2 and not out.exists(), path
        if code == 0:
            assert read_grid(out).data.shape == read_grid(path).data.shape
        else:
            assert "error: " in err and len(err) < 2000, path


def test_the_file_says_what_it_is_for(weights):
    metadata = read_safetensors_header(weights / "wedge.safetensors").metadata
    assert metadata["task"] == "wedge" and json.loads(metadata["spec"])["d"] == 2


def test_the_resolution_is_given_or_of_the_half_maps_or_estimated_but_not_guessed_of_a_masked_map(
    call, files, weights, tmp_path
):
    network = ("--weights", weights / "matched.safetensors", "-o", tmp_path / "out.mrc")
    code, out, _ = call(files / "map.mrc", *network, "--resolution", "4.5")
    assert code == 0 and "4.50 A" in out and "as given" in out
    code, out, error = call("--half1", files / "half1.mrc", "--half2", files / "half2.mrc", *network)
    told = " ".join((error + out).split())
    limit = re.search(r"FSC .143 at ([0-9.]+) A", told).group(1)
    assert code == 0 and f"map at {limit} A" in told and "of the half maps" in told
    code, out, _ = call(files / "map.mrc", *network)
    assert code == 0 and "estimated from" in " ".join(out.split())
    grid = read_grid(files / "map.mrc")
    masked = np.where(grid.data > 0.3 * grid.data.max(), grid.data, 0).astype(np.float32)
    write_like(tmp_path / "masked.mrc", masked, grid, "masked")
    code, _, error = call(tmp_path / "masked.mrc", *network)
    assert code == 2 and "--resolution" in error and "masked" in error
    code, _, _ = call(tmp_path / "masked.mrc", *network, "--resolution", "4.5")
    assert code == 0


def test_a_masked_map_tells_its_resolution_where_a_filter_ended_it(call, files, weights, tmp_path):
    whole = globule(80)
    filtered = soft_lowpass(whole[None], 1.0, 5.5)[0] * auto_mask(whole, 1.0)
    write_map(tmp_path / "masked.mrc", filtered.numpy(), 1.0)
    code, out, error = call(
        tmp_path / "masked.mrc", "--weights", weights / "matched.safetensors", "-o", tmp_path / "out.mrc"
    )
    told = " ".join((error + out).split())
    assert code == 0, told
    assert float(re.search(r"a filter ends the map at about ([0-9.]+) A", told).group(1)) == pytest.approx(5.5, rel=0.1)
