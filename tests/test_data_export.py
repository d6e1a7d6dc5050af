"""Rows back to RELION and cryoSPARC: the original rows, all columns, and files that open again."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from cryosuite.analysis.class_files import write_classes
from cryosuite.data.export import _image_names, export_particles
from cryosuite.data.open import open_particles
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.data.star_tables import star_tables
from cryosuite.errors import InputError
from cryosuite.formats.cs import read_cs, write_cs
from cryosuite.formats.pickles import read_indices
from cryosuite.formats.star import read_star, write_star

ROWS = np.array([5, 1, 6])


def test_star_rows_come_back_unbinned_with_every_column(golden, tmp_path):
    source = golden / "adversarial/multiple_blocks.star"
    preprocess(open_particles(source), tmp_path / "w", PreprocessOptions(16))
    work = open_particles(tmp_path / "w").subset(ROWS)
    export_particles(work, tmp_path / "out.star")
    before, after = read_star(source), read_star(tmp_path / "out.star")
    assert list(before) == list(after)
    for name in ("general", "extra", "optics"):
        assert before[name].equals(after[name])
    wanted = before["particles"].iloc[ROWS].reset_index(drop=True)
    assert list(after["particles"].columns) == list(wanted.columns)
    assert wanted.drop(columns="rlnImageName").equals(after["particles"].drop(columns="rlnImageName"))


def test_an_exported_star_opens_as_the_same_rows(golden, tmp_path):
    source = open_particles(golden / "relion/particles.star")
    preprocess(source, tmp_path / "w", PreprocessOptions(32))
    export_particles(open_particles(tmp_path / "w").subset(ROWS), tmp_path / "elsewhere.star")
    again, wanted = open_particles(tmp_path / "elsewhere.star"), source.subset(ROWS)
    assert np.array_equal(again.read(slice(None)), wanted.read(slice(None)))
    for name in ("rotation", "shift", "ctf", "half", "pixel_size"):
        assert np.array_equal(getattr(again, name), getattr(wanted, name))


def test_names_that_work_from_the_new_place_stay_as_they_are(golden, tmp_path):
    project = tmp_path / "project"
    (project / "job").mkdir(parents=True)
    shutil.copy(golden / "adversarial/good.mrcs", project / "good.mrcs")
    shutil.copy(golden / "adversarial/good.star", project / "job/run.star")  # names are relative to the project
    preprocess(open_particles(project / "job/run.star"), tmp_path / "w", PreprocessOptions())
    export_particles(open_particles(tmp_path / "w"), project / "job/selected.star")
    assert list(read_star(project / "job/selected.star")["particles"]["rlnImageName"])[2] == "000003@good.mrcs"


def test_cs_rows_come_back_with_their_uid(golden, tmp_path):
    source = golden / "adversarial/good.cs"
    preprocess(open_particles(source), tmp_path / "w", PreprocessOptions(16))
    export_particles(open_particles(tmp_path / "w").subset(ROWS), tmp_path / "out.cs")
    assert np.array_equal(read_cs(tmp_path / "out.cs"), read_cs(source)[ROWS])
    again = open_particles(tmp_path / "out.cs", datadir=golden / "adversarial")
    assert np.array_equal(again.read(slice(None)), open_particles(source).read(ROWS))


def test_cs_particles_as_a_star_for_relion(golden, tmp_path):
    source = open_particles(golden / "adversarial/good.cs")
    preprocess(source, tmp_path / "w", PreprocessOptions(16))
    export_particles(open_particles(tmp_path / "w").subset(ROWS), tmp_path / "out.star")
    again, wanted = open_particles(tmp_path / "out.star"), source.subset(ROWS)
    assert np.abs(again.rotation - wanted.rotation).max() < 1e-6
    assert np.abs(again.shift - wanted.shift).max() < 1e-6
    assert np.allclose(again.ctf, wanted.ctf, rtol=1e-6)
    assert np.array_equal(np.abs(again.read(slice(None))), np.abs(wanted.read(slice(None))))


def test_a_cryodrgn_set_as_a_star(golden, tmp_path):
    how = {"poses": golden / "cryodrgn/pose.pkl", "ctf": golden / "cryodrgn/ctf.pkl"}
    preprocess(open_particles(golden / "relion/particles.mrcs", **how), tmp_path / "w", PreprocessOptions(32))
    export_particles(open_particles(tmp_path / "w").subset(ROWS), tmp_path / "out.star")
    again = open_particles(tmp_path / "out.star")
    star = open_particles(golden / "relion/particles.star").subset(ROWS)
    assert again.box_size == 64
    assert np.array_equal(again.read(slice(None)), star.read(slice(None)))
    assert np.abs(again.rotation - star.rotation).max() < 1e-6
    assert np.allclose(again.ctf, star.ctf, rtol=1e-5)


def test_binned_rows_of_the_work_directory(golden, tmp_path):
    preprocess(open_particles(golden / "relion/particles.star"), tmp_path / "w", PreprocessOptions(32))
    work = open_particles(tmp_path / "w")
    (tmp_path / "far").mkdir()
    export_particles(work.subset(ROWS), tmp_path / "far/out.star", binned=True)
    again = open_particles(tmp_path / "far/out.star")
    assert again.box_size == 32
    assert np.array_equal(again.read(slice(None)), work.read(ROWS))


def test_index_lists_hold_original_positions(golden, tmp_path):
    first = open_particles(golden / "relion/particles.star", ind=np.arange(100, 120))
    preprocess(first, tmp_path / "w", PreprocessOptions(32))
    export_particles(open_particles(tmp_path / "w").subset(ROWS), tmp_path / "ind.pkl")
    assert read_indices(tmp_path / "ind.pkl").tolist() == [105, 101, 106]


def test_what_cannot_be_exported_is_said(golden, tmp_path):
    source = tmp_path / "source.star"
    shutil.copy(golden / "relion/particles.star", source)
    preprocess(open_particles(source, datadir=golden / "relion"), tmp_path / "w", PreprocessOptions(32))
    work = open_particles(tmp_path / "w")
    with pytest.raises(InputError, match="no .cs file.*ends in .star"):
        export_particles(work, tmp_path / "out.cs")
    with pytest.raises(InputError, match="give a name that ends in"):
        export_particles(work, tmp_path / "out.csv")
    source.unlink()
    with pytest.raises(InputError, match="not there any more.*--binned"):
        export_particles(work, tmp_path / "out.star")
    assert not (tmp_path / "out.star").exists()


def test_the_source_is_never_written_over(golden, tmp_path):
    source = tmp_path / "source.star"
    shutil.copy(golden / "relion/particles.star", source)
    preprocess(open_particles(source, datadir=golden / "relion"), tmp_path / "w", PreprocessOptions(32))
    work = open_particles(tmp_path / "w").subset(ROWS)
    (tmp_path / "link.star").symlink_to(source)
    for out, binned in ((source, False), (tmp_path / "link.star", False), (tmp_path / "w/particles.star", True)):
        with pytest.raises(InputError, match="come from this very file"):
            export_particles(work, out, binned)
    assert len(open_particles(source, datadir=golden / "relion")) == 200


def test_cryosparcs_aberrations_reach_relion_as_zernike_terms(golden, tmp_path):
    """Trefoil and tetrafoil have no column in a star file; the Zernike coefficients must be the same phases."""
    torch = pytest.importorskip("torch")
    from cryosuite.kernels.ctf import ctf, odd_phase

    source = open_particles(golden / "adversarial/good.cs")
    rng = np.random.default_rng(0)
    group = (np.arange(8) % 2)[:, None]  # two groups that nothing but the aberrations tells apart
    for name, width, size in (("trefoil", 2, 1500), ("tetrafoil", 4, 2e4), ("odd_zernike", 6, 1)):
        source.extras[name] = np.where(group, *rng.normal(size=(2, width)) * size).astype(np.float32)
    write_star(tmp_path / "out.star", star_tables(source, _image_names(source, tmp_path), 32, source.pixel_size))
    again = open_particles(tmp_path / "out.star")
    assert set(again.extras) == {"odd_zernike", "even_zernike"}
    frequency = torch.from_numpy(rng.uniform(-0.5, 0.5, (50, 2)))
    for value in (ctf, odd_phase):
        ours, theirs = (value(frequency, particles.ctf_params()) for particles in (source, again))
        assert torch.abs(ours - theirs).max() < 2e-4


def test_a_namesake_beside_the_exported_star_is_not_meant(golden, tmp_path):
    """The cropped stack of a work folder is often called like the source's stack."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(golden / "relion/particles.star", source / "run.star")
    shutil.copy(golden / "relion/particles.mrcs", source / "particles.mrcs")
    preprocess(open_particles(source / "run.star"), tmp_path / "w", PreprocessOptions(32))
    export_particles(open_particles(tmp_path / "w").subset(ROWS), tmp_path / "w/selected.star")
    assert open_particles(tmp_path / "w/selected.star").box_size == 64


def test_dark_stacks_are_told_when_they_go_to_relion(golden, tmp_path):
    preprocess(open_particles(golden / "adversarial/good.cs"), tmp_path / "w", PreprocessOptions(16))
    with pytest.warns(UserWarning, match="particles are dark in these stacks"):
        export_particles(open_particles(tmp_path / "w"), tmp_path / "out.star")


def test_mrc_stacks_are_named_as_relion_reads_them(golden, tmp_path):
    """RELION takes a plain .mrc for a map."""
    shutil.copy(golden / "relion/particles.mrcs", tmp_path / "p.mrc")
    particles = open_particles(tmp_path / "p.mrc", need_poses=False, need_ctf=False)
    assert _image_names(particles, tmp_path)[1] == f"000002@{tmp_path.resolve()}/p.mrc:mrcs"


def test_a_folder_made_from_itself_ends(golden, tmp_path):
    preprocess(open_particles(golden / "relion/particles.star"), tmp_path / "w", PreprocessOptions(32))
    text = (tmp_path / "w/dataset.yaml").read_text()
    source = next(line for line in text.splitlines() if line.startswith("source:"))
    (tmp_path / "w/dataset.yaml").write_text(text.replace(source, f"source: {tmp_path}/w"))
    with pytest.raises(InputError, match="made from itself"):
        export_particles(open_particles(tmp_path / "w"), tmp_path / "out.star")


def test_what_the_user_said_of_a_bare_stack_reaches_relion(golden, tmp_path):
    """Pixel size and contrast stand in no file of a bare stack; poses of a run are those of its true pixel size."""
    from cryosuite.formats.mrc import StackWriter

    star = open_particles(golden / "relion/particles.star")
    with StackWriter(tmp_path / "p.mrcs", len(star), 64, None) as writer:
        writer.write(-star.read(slice(None)))
    how = {"poses": golden / "cryodrgn/pose.pkl", "need_ctf": False}
    preprocess(open_particles(tmp_path / "p.mrcs", pixel_size=3.0, **how), tmp_path / "w", PreprocessOptions(32))
    work = open_particles(tmp_path / "w", need_ctf=False)
    for poses in (False, True):
        with pytest.warns(UserWarning, match="particles are dark in these stacks"):
            export_particles(work, tmp_path / "out.star", poses=poses)
        again = open_particles(tmp_path / "out.star", need_ctf=False)
        assert np.allclose(again.pixel_size, 3.0)
        assert np.abs(again.shift - star.shift).max() < 1e-5


def test_a_voltage_that_the_user_gave_reaches_the_other_form(golden, tmp_path):
    blocks = read_star(golden / "adversarial/no_optics_v30.star")
    name, table = next(iter(blocks.items()))
    write_star(tmp_path / "s.star", {name: table.drop(columns="rlnVoltage")})
    shutil.copy(golden / "adversarial/good.mrcs", tmp_path / "good.mrcs")
    source = open_particles(tmp_path / "s.star", voltage_kv=200.0)
    preprocess(source, tmp_path / "w", PreprocessOptions(16))
    export_particles(open_particles(tmp_path / "w"), tmp_path / "out.star", relion="3.1")
    assert np.allclose(open_particles(tmp_path / "out.star").ctf, source.ctf, rtol=1e-5)


def test_origins_of_a_table_without_optics_are_in_one_unit(golden, tmp_path):
    """One table that says its origins in Angstrom: those of before must not stand beside the new ones in pixels."""
    from dataclasses import replace

    blocks = read_star(golden / "relion/particles.star")
    optics = {name: blocks["optics"][name][0] for name in ("rlnImagePixelSize", "rlnVoltage")}
    optics |= {name: blocks["optics"][name][0] for name in ("rlnSphericalAberration", "rlnAmplitudeContrast")}
    write_star(tmp_path / "one.star", {"": blocks["particles"].drop(columns="rlnOpticsGroup").assign(**optics)})
    shutil.copy(golden / "relion/particles.mrcs", tmp_path / "particles.mrcs")
    source = open_particles(tmp_path / "one.star")
    moved = replace(source, shift=source.shift + np.float32(0.05))
    export_particles(moved, tmp_path / "out.star", poses=True)
    assert np.abs(open_particles(tmp_path / "out.star").shift - moved.shift).max() < 1e-6


def test_origins_in_pixels_do_not_change_with_the_pixel_size_of_the_user(golden, tmp_path):
    source = open_particles(golden / "adversarial/no_optics_v30.star", pixel_size=3.3)
    preprocess(source, tmp_path / "w", PreprocessOptions(16))
    export_particles(open_particles(tmp_path / "w"), tmp_path / "out.star", poses=True)
    assert np.abs(open_particles(tmp_path / "out.star").shift - source.shift).max() < 1e-5


def test_stacks_of_two_boxes_reach_relion(golden, tmp_path):
    from cryosuite.data.crop import fourier_crop
    from cryosuite.formats.cs import write_cs
    from cryosuite.formats.mrc import StackWriter

    whole, table = open_particles(golden / "adversarial/good.cs"), read_cs(golden / "adversarial/good.cs")
    size = whole.box_size * float(whole.pixel_size[0])
    table["blob/path"][4:] = b"b.mrcs"
    table["blob/shape"][4:], table["blob/psize_A"][4:] = 16, size / 16
    write_cs(tmp_path / "two.cs", table)
    shutil.copy(golden / "adversarial/good.mrcs", tmp_path / "good.mrcs")
    with StackWriter(tmp_path / "b.mrcs", 8, 16, size / 16) as writer:
        writer.write(fourier_crop(whole.read(slice(None)), 16))
    mixed = open_particles(tmp_path / "two.cs", mixed_boxes=True)
    export_particles(mixed, tmp_path / "out.cs", poses=True)
    assert np.abs(read_cs(tmp_path / "out.cs")["alignments3D/shift"] - table["alignments3D/shift"]).max() < 1e-4
    preprocess(mixed, tmp_path / "w", PreprocessOptions(16))
    for poses in (False, True):
        export_particles(open_particles(tmp_path / "w"), tmp_path / "out.star", poses=poses)
        again = open_particles(tmp_path / "out.star", mixed_boxes=True)
        assert again.box_sizes.tolist() == [whole.box_size] * 4 + [16] * 4
        assert np.abs(again.shift - whole.shift).max() < 1e-6
        assert np.allclose(again.pixel_size * again.box_sizes, size)


def test_a_forced_file_type_stays_when_a_name_becomes_absolute(golden, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(golden / "relion/particles.mrcs", source / "p.mrc")
    blocks = read_star(golden / "relion/particles.star")
    blocks["particles"]["rlnImageName"] = [f"{row + 1:06d}@p.mrc:mrcs" for row in range(200)]
    write_star(source / "run.star", blocks)
    (tmp_path / "far").mkdir()
    export_particles(open_particles(source / "run.star"), tmp_path / "far/out.star")
    assert read_star(tmp_path / "far/out.star")["particles"]["rlnImageName"][0] == f"000001@{source}/p.mrc:mrcs"


@pytest.mark.parametrize("kind", ["star", "cs"])
def test_a_source_that_has_changed_since_preprocess_is_refused(golden, tmp_path, kind):
    """Rows are joined by their number: of another file they would be other particles, and nobody would see it."""
    source = tmp_path / f"p.{kind}"
    shutil.copy(golden / f"adversarial/good.{kind}", source)
    preprocess(open_particles(source, datadir=golden / "adversarial"), tmp_path / "w", PreprocessOptions(16))
    work = open_particles(tmp_path / "w")
    export_particles(work, tmp_path / f"same.{kind}")
    _keep(source, slice(None, None, -1))
    with pytest.raises(InputError, match=r"particle 0 \(from 0\) is not the one that preprocess read.*changed since"):
        export_particles(work, tmp_path / f"turned.{kind}")
    _keep(source, slice(0, 4))
    with pytest.raises(InputError, match="has 4 particles, but particle 7 of it"):
        export_particles(work, tmp_path / f"short.{kind}")
    assert not list(tmp_path.glob("turned.*")) and not list(tmp_path.glob("short.*"))
    export_particles(work, tmp_path / "own.star", binned=True)
    with pytest.warns(UserWarning, match="changed since"):
        write_classes(tmp_path / "classes", work, np.zeros(len(work), int))


def _keep(source, rows):
    if source.suffix == ".cs":
        write_cs(source, read_cs(source)[rows])
        return
    blocks = read_star(source)
    write_star(source, {**blocks, "particles": blocks["particles"].iloc[rows].reset_index(drop=True)})


def test_rows_added_to_the_source_after_preprocess_change_nothing(golden, tmp_path):
    source = tmp_path / "p.star"
    shutil.copy(golden / "adversarial/good.star", source)
    preprocess(open_particles(source, datadir=golden / "adversarial"), tmp_path / "w", PreprocessOptions(16))
    _keep(source, [0, 1, 2, 3, 4, 5, 6, 7, 3])
    assert len(read_star(export_particles(open_particles(tmp_path / "w"), tmp_path / "out.star"))["particles"]) == 8
