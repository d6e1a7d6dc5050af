"""A pixel size that contradicts the file measures the same pixels anew: no particle moves, there and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cryosuite.data.export import export_particles
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.errors import InputError
from cryosuite.formats.cs import read_cs
from cryosuite.formats.mrc import StackWriter
from cryosuite.formats.star import read_star, write_star

SOURCES = ("relion/particles.star", "adversarial/no_optics_v30.star", "adversarial/good.cs")
STAR_31, STAR_30, CS = SOURCES
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def _shifts(path: Path) -> np.ndarray:
    """Shifts (N, 2) as the file itself writes them."""
    if path.suffix == ".cs":
        return read_cs(path)["alignments3D/shift"]
    table = next(frame for frame in read_star(path).values() if "rlnAngleRot" in frame)
    names = ("rlnOriginXAngst", "rlnOriginYAngst") if "rlnOriginXAngst" in table else ("rlnOriginX", "rlnOriginY")
    return table[list(names)].to_numpy(np.float64)


def _smaller(source: Path, folder: Path) -> Path:
    """The file beside a stack of half the box; it still says the old one."""
    whole = open_particles(source)
    half = whole.box_size // 2
    stack = folder / ("particles.mrcs" if "relion" in str(source) else "good.mrcs")
    with StackWriter(stack, len(whole), half, None) as writer:
        writer.write(whole.read(slice(None))[:, half // 2 : half // 2 + half, half // 2 : half // 2 + half])
    path = folder / source.name
    shutil.copy(source, path)
    if source.name == "no_optics_v30.star":  # this form has no column for the box, but files of others have it
        (name, table), *_ = read_star(source).items()
        write_star(path, {name: table.assign(rlnImageSize=whole.box_size)})
    return path


def _there_and_back(particles: ParticleSet, out: Path, folder: Path) -> ParticleSet:
    preprocess(particles, folder / "w", PreprocessOptions(16))
    preprocess(open_particles(folder / "w"), folder / "w2", PreprocessOptions(8))
    for number, each in enumerate((particles, open_particles(folder / "w"), open_particles(folder / "w2"))):
        export_particles(each, out, poses=True)
        wanted = _shifts(particles.path)
        assert np.abs(_shifts(out) - wanted).max() < 2e-5 * max(1, np.abs(wanted).max()), number
    return open_particles(folder / "w2")


@pytest.mark.parametrize("name", SOURCES)
def test_a_recalibrated_pixel_size_moves_no_particle(golden, tmp_path, name):
    source = golden / name
    plain = open_particles(source)
    particles = open_particles(source, pixel_size=1.03 * float(plain.pixel_size[0]))
    assert np.allclose(particles.pixel_size, 1.03 * plain.pixel_size)
    assert np.allclose(particles.ctf[:, 1], 1.03 * plain.pixel_size)
    assert np.abs(particles.shift - plain.shift).max() < 1e-7
    out = tmp_path / f"out{source.suffix}"
    export_particles(particles, out, poses=True, binned=True)  # as predicted poses are written
    assert np.abs(_shifts(out) - _shifts(source)).max() < 1e-4
    work = _there_and_back(particles, out, tmp_path)
    assert np.abs(work.shift - plain.shift).max() < 1e-7


@pytest.mark.parametrize("name", SOURCES)
def test_a_stack_binned_after_the_file_was_written_keeps_its_field_of_view(golden, tmp_path, name):
    plain = open_particles(golden / name)
    source = _smaller(golden / name, tmp_path)
    with pytest.raises(InputError, match="says box.*--Apix"):
        open_particles(source)
    with pytest.raises(InputError, match="says box"):
        open_particles(source, pixel_size=1.5 * float(plain.pixel_size[0]))  # neither binned nor cropped
    for factor in (2.0, 2.06):  # and recalibrated at that
        particles = open_particles(source, pixel_size=factor * float(plain.pixel_size[0]))
        assert np.abs(particles.shift - plain.shift).max() < 1e-7
        _there_and_back(particles, tmp_path / f"out{source.suffix}", tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_a_stack_cropped_after_the_file_was_written_keeps_its_pixels(golden, tmp_path, name):
    plain = open_particles(golden / name)
    source = _smaller(golden / name, tmp_path)
    particles = open_particles(source, pixel_size=0.98 * float(plain.pixel_size[0]))
    assert np.abs(particles.shift - 2 * plain.shift).max() < 1e-6
    _there_and_back(particles, tmp_path / f"out{source.suffix}", tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_other_forms_are_in_the_users_angstrom(golden, tmp_path, name):
    """Tables that we make say the user's pixel size, and their shifts are in its Angstrom: the same pixels again."""
    plain = open_particles(golden / name)
    preprocess(open_particles(golden / name, pixel_size=1.03 * float(plain.pixel_size[0])), tmp_path / "w",
               PreprocessOptions(16))  # fmt: skip
    work = open_particles(tmp_path / "w")
    forms = [{"binned": True}] if name == STAR_31 else [{"binned": True}, {"relion": "3.1"}]
    for poses in (False, True):
        for form in forms:
            export_particles(work, tmp_path / "out.star", poses=poses, **form)
            again = open_particles(tmp_path / "out.star")
            assert np.allclose(again.pixel_size * again.box_size, work.pixel_size * work.box_size, rtol=1e-5)
            assert np.abs(again.shift - plain.shift).max() < 1e-6


def test_a_work_folder_opened_with_another_pixel_size_goes_back_to_its_source(golden, tmp_path):
    """As a run does that was trained with --Apix."""
    preprocess(open_particles(golden / STAR_31, pixel_size=3.05), tmp_path / "w", PreprocessOptions(16))
    work = open_particles(tmp_path / "w", pixel_size=12.5)
    export_particles(work, tmp_path / "out.star", poses=True)
    assert np.abs(_shifts(tmp_path / "out.star") - _shifts(golden / STAR_31)).max() < 2e-5
    export_particles(work, tmp_path / "binned.star", poses=True, binned=True)
    assert np.abs(_shifts(tmp_path / "binned.star") - _shifts(tmp_path / "w/particles.star")).max() < 2e-5


def test_a_subset_of_rows_keeps_the_measure_of_its_file(golden, tmp_path):
    source, rows = golden / STAR_31, np.array([17, 3, 50])
    particles = open_particles(source, pixel_size=3.09, ind=rows)
    export_particles(particles.subset(np.array([2, 0])), tmp_path / "out.star", poses=True)
    assert np.abs(_shifts(tmp_path / "out.star") - _shifts(source)[rows[[2, 0]]]).max() < 2e-5


def test_shifts_of_a_bare_stack_are_fractions_whatever_its_pixel_size(golden, tmp_path):
    how = {"poses": golden / "cryodrgn/pose.pkl", "ctf": golden / "cryodrgn/ctf.pkl"}
    plain = open_particles(golden / "relion/particles.mrcs", **how)
    particles = open_particles(golden / "relion/particles.mrcs", pixel_size=3.09, **how)
    assert np.array_equal(particles.shift, plain.shift) and particles.file_pixel_size is None
    preprocess(particles, tmp_path / "w", PreprocessOptions(16))
    export_particles(open_particles(tmp_path / "w"), tmp_path / "out.star", poses=True)
    again = open_particles(tmp_path / "out.star")
    assert np.allclose(again.pixel_size, 3.09) and np.abs(again.shift - plain.shift).max() < 1e-6


@pytest.mark.parametrize("size", [0.0, -1.0, np.nan, np.inf])
def test_a_pixel_size_is_a_positive_number(golden, size):
    with pytest.raises(InputError, match="--Apix.*positive number of Angstrom"):
        open_particles(golden / "relion/particles.mrcs", pixel_size=size, need_poses=False, need_ctf=False)
