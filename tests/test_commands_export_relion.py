"""What ``export`` writes, as RELION and cryoSPARC and our own ``preprocess`` take it back."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from select_toy import Toy, make_run
from typer.testing import CliRunner

from cryosuite.cli import app
from cryosuite.data.export import export_particles
from cryosuite.data.open import open_particles
from cryosuite.data.orientations import from_euler
from cryosuite.data.particles import ParticleSet
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.errors import InputError
from cryosuite.formats.cs import read_cs, write_cs
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_indices, read_labels, write_pickle
from cryosuite.formats.star import particle_tables, read_star, write_star
from cryosuite.kernels.shells import fsc

SAME = ("rotation", "shift", "ctf", "half", "pixel_size")


def export(*arguments: object) -> str:
    """Run the command; its output. InputError as it is."""
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def toy(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A run on all particles of RELION's own star file, cropped to 32 pixels."""
    folder = tmp_path_factory.mktemp("export")
    preprocess(open_particles(golden / "relion/particles.star"), folder / "work", PreprocessOptions(32))
    return make_run(folder / "run", folder / "work", 200)


def assert_same_particles(found: ParticleSet, wanted: ParticleSet, tolerance: float = 2e-5) -> None:
    """The same images in the same order, with the same poses, CTF, half sets and pixel sizes."""
    assert len(found) == len(wanted) and np.allclose(found.read(slice(None)), wanted.read(slice(None)), atol=1e-5)
    for name in SAME:
        mine, theirs = getattr(found, name), getattr(wanted, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or np.allclose(mine, theirs, rtol=1e-5, atol=tolerance), name


def relion(star: Path, *options: str) -> np.ndarray:
    """The map that RELION's own program makes of a star file, (D, D, D)."""
    program = shutil.which("relion_reconstruct")
    if program is None:
        pytest.skip("relion_reconstruct is not installed: that RELION reads our star files is not tested here")
    done = subprocess.run(
        [program, "--i", star.name, "--o", "relion.mrc", "--ctf", *options], cwd=star.parent, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return read_map(star.parent / "relion.mrc").data


@pytest.mark.slow
def test_relion_makes_the_map_of_an_exported_cluster(tmp_path: Path) -> None:
    """Of a mixture of two, from cropped images back to whole ones: RELION's map is ours, and that of the state."""
    from cryosuite.reconstruct.backproject import reconstruct

    simulate = [
        "simulate",
        "-o",
        tmp_path / "sim",
        "--structures",
        "phantom:2",
        "-n",
        1600,
        "-D",
        32,
        "--snr",
        1,
        "--seed",
        3,
    ]
    assert CliRunner().invoke(app, list(map(str, simulate))).exit_code == 0
    preprocess(open_particles(tmp_path / "sim"), tmp_path / "work", PreprocessOptions(24))
    toy = make_run(tmp_path / "run", tmp_path / "work", 1600)
    truth = read_labels(tmp_path / "sim/labels.pkl")
    write_pickle(toy.analysis.labels, truth)
    export(toy.run.path, "--cluster", 1, "-o", tmp_path / "cluster.star")
    theirs = torch.from_numpy(relion(tmp_path / "cluster.star").copy())
    ours = reconstruct(open_particles(tmp_path / "sim").subset(np.flatnonzero(truth == 1)), halves=False).map
    states = [torch.from_numpy(read_map(tmp_path / f"sim/volumes/vol_{k:03d}.mrc").data.copy()) for k in (0, 1)]
    curve = fsc(ours, theirs)
    assert (curve[1:13] > 0.99).all()
    export(toy.run.path, "--cluster", 1, "--relion", "3.0", "-o", tmp_path / "old.star")
    older = torch.from_numpy(relion(tmp_path / "old.star").copy())
    assert (older - theirs).abs().max() < 1e-3 * theirs.std()
    other, own = (fsc(theirs, state)[2:9].mean() for state in states)
    assert own > 0.95 > 0.6 > other


@pytest.mark.parametrize("version", ["3.0", "3.1", "4", "5"])
def test_every_version_of_the_star_says_the_same(golden: Path, toy: Toy, tmp_path: Path, version: str) -> None:
    export(toy.run.path, "--cluster", 0, 2, "--relion", version, "-o", tmp_path / "a.star")
    tables = particle_tables(tmp_path / "a.star")
    assert tables.version == ("3.0" if version == "3.0" else "3.1")
    wanted = open_particles(golden / "relion/particles.star").subset(np.flatnonzero(toy.labels != 1))
    assert_same_particles(open_particles(tmp_path / "a.star"), wanted)


def test_the_optics_of_two_groups_survive_both_forms(golden: Path, tmp_path: Path) -> None:
    """3.1 to 3.0 and back: each particle keeps its voltage, pixel size, beam tilt and origin."""
    source = golden / "adversarial/good.star"
    tables = particle_tables(source)
    optics = tables.optics.loc[[0, 0]].reset_index(drop=True).assign(
        rlnOpticsGroup=[1, 2], rlnOpticsGroupName=["a", "b"], rlnVoltage=[300.0, 200.0], rlnBeamTiltX=[0.1, -0.2],
        rlnBeamTiltY=[0.0, 0.3],
    )  # fmt: skip
    particles = tables.particles.assign(rlnOpticsGroup=np.arange(8) % 2 + 1)
    write_star(tmp_path / "two.star", {"optics": optics, "particles": particles})
    shutil.copy(golden / "adversarial/good.mrcs", tmp_path / "good.mrcs")
    wanted = open_particles(tmp_path / "two.star")
    export(tmp_path / "two.star", "--all", "--relion", "3.0", "-o", tmp_path / "old.star")
    assert list(read_star(tmp_path / "old.star")) == ["particles"]
    export(tmp_path / "old.star", "--all", "--relion", "5", "-o", tmp_path / "new.star")
    for name in ("old.star", "new.star"):
        found = open_particles(tmp_path / name)
        assert_same_particles(found, wanted)
        assert np.allclose(found.extras["beam_tilt"], wanted.extras["beam_tilt"])
    new = read_star(tmp_path / "new.star")
    assert sorted(new["optics"]["rlnVoltage"]) == [200.0, 300.0]
    assert "rlnMagnification" not in new["particles"] and "rlnOriginXAngst" in new["particles"]


def test_relion_30_reads_and_writes(golden: Path, tmp_path: Path) -> None:
    """A file of RELION 3.0 stays one, and its columns that we do not know come along into the form of 3.1."""
    source = golden / "adversarial/no_optics_v30.star"
    ind = tmp_path / "ind.pkl"
    write_pickle(ind, np.array([5, 1, 6]))
    wanted = open_particles(source).subset(np.array([5, 1, 6]))
    for version in (None, "3.0", "3.1"):
        out = tmp_path / f"{version}.star"
        export(source, "--ind", ind, *([] if version is None else ["--relion", version]), "-o", out)
        assert particle_tables(out).version == ("3.1" if version == "3.1" else "3.0")
        assert_same_particles(open_particles(out), wanted)
        assert list(particle_tables(out).particles["rlnMicrographName"]) == ["mic1.mrc", "mic0.mrc", "mic1.mrc"]


def test_an_unknown_version_is_refused(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--relion 2.1: expected 3.0, 3.1, 4 or 5"):
        export(toy.run.path, "--cluster", 1, "--relion", "2.1", "-o", tmp_path / "a.star")


def test_the_way_through_preprocess_and_back_again(golden: Path, toy: Toy, tmp_path: Path) -> None:
    """star -> cropped -> exported un-binned -> cropped again: the same images in the same order, twice round."""
    export(toy.run.path, "--cluster", 2, 0, "-o", tmp_path / "a.star", "-o", tmp_path / "a.pkl")
    rows = read_indices(tmp_path / "a.pkl")
    first = open_particles(toy.run.path).subset(rows)
    preprocess(open_particles(tmp_path / "a.star"), tmp_path / "again", PreprocessOptions(32))
    assert_same_particles(open_particles(tmp_path / "again"), first)
    export(tmp_path / "again", "--all", "-o", tmp_path / "b.star")
    before, after = read_star(tmp_path / "a.star"), read_star(tmp_path / "b.star")
    assert all(before[name].equals(after[name]) for name in before)


def test_the_way_of_cryosparc_and_back_again(golden: Path, tmp_path: Path) -> None:
    source = golden / "adversarial/good.cs"
    preprocess(open_particles(source), tmp_path / "work", PreprocessOptions(16))
    write_pickle(tmp_path / "ind.pkl", np.array([6, 2, 3]))
    export(tmp_path / "work", "--ind", tmp_path / "ind.pkl", "-o", tmp_path / "a.cs")
    assert np.array_equal(read_cs(tmp_path / "a.cs"), read_cs(source)[[6, 2, 3]])
    preprocess(
        open_particles(tmp_path / "a.cs", datadir=golden / "adversarial"), tmp_path / "again", PreprocessOptions(16)
    )
    assert_same_particles(open_particles(tmp_path / "again"), open_particles(tmp_path / "work").subset([6, 2, 3]))


def test_micrographs_and_coordinates_of_cryosparc_reach_relion(golden: Path, tmp_path: Path) -> None:
    table = read_cs(golden / "adversarial/good.cs")
    places = [("location/micrograph_path", "S30"), ("location/micrograph_shape", "<u4", (2,)),
              ("location/center_x_frac", "<f4"), ("location/center_y_frac", "<f4")]  # fmt: skip
    more = np.zeros(len(table), table.dtype.descr + places)
    for name in table.dtype.names:
        more[name] = table[name]
    more["location/micrograph_path"] = [f">mics/m{i % 2}.mrc" for i in range(8)]
    more["location/micrograph_shape"] = (3000, 4000)  # rows, columns
    more["location/center_x_frac"], more["location/center_y_frac"] = 0.25, np.arange(8) / 10
    write_cs(tmp_path / "s.cs", more)
    shutil.copy(golden / "adversarial/good.mrcs", tmp_path / "good.mrcs")
    for version in ("3.0", "3.1"):
        export(tmp_path / "s.cs", "--all", "--relion", version, "-o", tmp_path / "a.star")
        found = particle_tables(tmp_path / "a.star").particles
        assert found["rlnMicrographName"].tolist() == [f"mics/m{i % 2}.mrc" for i in range(8)]
        assert np.allclose(found["rlnCoordinateX"], 1000)
        assert np.allclose(found["rlnCoordinateY"], 300 * np.arange(8))
        half = open_particles(tmp_path / "s.cs").half
        assert found["rlnRandomSubset"].tolist() == (half + 1).tolist()


def test_poses_that_a_run_found_are_exported(golden: Path, toy: Toy, tmp_path: Path) -> None:
    """Poses of the run's last epoch at its small box, written in Angstrom for the whole images."""
    work = Path(toy.run.read_config()["particles"])
    run = make_run(tmp_path / "run", work, 200, poses_found=True).run
    rng = np.random.default_rng(1)
    rotation = from_euler(rng.uniform(-180, 180, (200, 3))).astype(np.float32)
    shift = rng.uniform(-0.1, 0.1, (200, 2)).astype(np.float32)
    write_pickle(run.index, np.arange(200))
    write_pickle(run.poses(2), (rotation, shift))
    export(run.path, "--cluster", 1, "-o", tmp_path / "a.star")
    found, rows = open_particles(tmp_path / "a.star"), np.arange(1, 200, 3)
    assert found.box_size == 64
    assert np.allclose(found.rotation, rotation[rows], atol=1e-5)
    assert np.allclose(found.shift, shift[rows], atol=1e-6)
    write_pickle(run.poses(1), (rotation[::-1].copy(), shift))  # an older epoch has its own
    export(run.path, "--all", "--epoch", 1, "-o", tmp_path / "old.star")
    assert np.allclose(open_particles(tmp_path / "old.star").rotation, rotation[::-1], atol=1e-5)


def test_every_cluster_to_its_own_file(toy: Toy, tmp_path: Path) -> None:
    output = export(toy.run.path, "--all-clusters", "-o", tmp_path / "clusters")
    assert "67" in output
    for label in range(3):
        rows = np.flatnonzero(toy.labels == label)
        assert np.array_equal(read_indices(tmp_path / f"clusters/cluster_{label:03d}.ind.pkl"), rows)
        assert len(open_particles(tmp_path / f"clusters/cluster_{label:03d}.star")) == len(rows)
    own = (np.arange(200) >= 150).astype(int)
    write_pickle(tmp_path / "own.pkl", own)
    export(
        toy.run.path, "--all-clusters", "--labels", tmp_path / "own.pkl", "--relion", "3.0", "-o", tmp_path / "clusters"
    )
    assert sorted(path.name for path in (tmp_path / "clusters").glob("*.star")) == [
        "cluster_000.star", "cluster_001.star",
    ]  # fmt: skip
    assert particle_tables(tmp_path / "clusters/cluster_001.star").version == "3.0"
    export(toy.run.path, "--all-clusters", "--binned", "-o", tmp_path / "binned")
    assert open_particles(tmp_path / "binned/cluster_001.star").box_size == 32


def test_a_folder_with_other_files_is_left_alone(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "cluster_000.star").write_text("mine")
    with pytest.raises(InputError, match="not from an export"):
        export(toy.run.path, "--all-clusters", "-o", tmp_path)
    assert (tmp_path / "cluster_000.star").read_text() == "mine"
    with pytest.raises(InputError, match="one folder"):
        export(toy.run.path, "--all-clusters", "-o", tmp_path / "a.star")


def test_columns_added_by_a_program_stand_in_every_form(golden: Path, tmp_path: Path) -> None:
    source = open_particles(golden / "adversarial/good.star")
    for form in ("3.0", "3.1"):
        export_particles(source, tmp_path / "a.star", columns={"rlnClassNumber": np.arange(8)}, relion=form)
        assert particle_tables(tmp_path / "a.star").particles["rlnClassNumber"].tolist() == list(range(8))
