"""Classes as star and cs files: original rows, the run's poses in the program's own convention, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryosuite.analysis.class_files import write_classes
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.cs import read_cs
from cryosuite.formats.star import read_star


def reposed(work: ParticleSet) -> ParticleSet:
    """The set with other rotations and shifts."""
    count = len(work)
    rotation = Rotation.random(count, random_state=3).as_matrix().astype(np.float32)
    shift = np.random.default_rng(4).uniform(-0.1, 0.1, (count, 2)).astype(np.float32)
    return replace(work, rotation=rotation, shift=shift)


def alternating(count: int) -> np.ndarray:
    return np.arange(count) % 2


@pytest.mark.parametrize("name", ["relion/particles.star", "adversarial/good.cs"])
def test_classes_open_again_with_the_poses_of_the_run(golden, tmp_path, name):
    source = open_particles(golden / name)
    preprocess(source, tmp_path / "w", PreprocessOptions(16))
    work = reposed(open_particles(tmp_path / "w"))
    rows = write_classes(tmp_path / "classes", work, alternating(len(work)))
    assert [row.particles for row in rows] == [(len(work) + 1) // 2, len(work) // 2]
    for row in rows:
        own = np.flatnonzero(alternating(len(work)) == row.label)
        for path in [row.star] + ([row.cs] if name.endswith(".cs") else []):
            again = open_particles(path, datadir=(golden / name).parent)
            assert again.box_size == source.box_size, "un-binned"
            sign = 1 if path.suffix == ".cs" else source.sign  # RELION takes particles as white
            assert np.array_equal(again.read([0, 1]), sign * source.read(own[:2]))
            assert np.abs(again.rotation - work.rotation[own]).max() < 1e-5
            assert np.abs(again.shift - work.shift[own]).max() < 1e-5
            assert np.allclose(again.ctf, source.ctf[own], rtol=1e-6)


def test_other_columns_and_optics_stay(golden, tmp_path):
    source = golden / "adversarial/multiple_blocks.star"
    preprocess(open_particles(source), tmp_path / "w", PreprocessOptions(16))
    work = reposed(open_particles(tmp_path / "w"))
    rows = write_classes(tmp_path / "classes", work, alternating(len(work)))
    before, after = read_star(source), read_star(rows[1].star)
    assert after["optics"].equals(before["optics"])
    poses = {"rlnImageName", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginX", "rlnOriginY"}
    poses |= {"rlnOriginXAngst", "rlnOriginYAngst"}
    kept = [column for column in before["particles"].columns if column not in poses]
    wanted = before["particles"].iloc[1::2].reset_index(drop=True)
    assert kept and after["particles"][kept].equals(wanted[kept])


def test_uids_stay_and_poses_may_be_the_sources(golden, tmp_path):
    source = golden / "adversarial/good.cs"
    particles = open_particles(source)
    rows = write_classes(tmp_path, particles, alternating(len(particles)), poses=False)
    assert np.array_equal(read_cs(rows[0].cs), read_cs(source)[::2])


def test_particles_in_no_class_and_empty_classes(golden, tmp_path):
    particles = open_particles(golden / "relion/particles.star")
    labels = np.full(len(particles), -1)
    labels[[3, 4]] = 2
    (tmp_path / "cluster_007.star").write_text("of an earlier run")
    rows = write_classes(tmp_path, particles, labels)
    assert [row.particles for row in rows] == [0, 0, 2]
    assert rows[0].star is None and not (tmp_path / "cluster_007.star").exists()
    assert np.array_equal(open_particles(rows[2].star).rotation, particles.rotation[[3, 4]])
    assert (tmp_path / "cluster_files.csv").read_text().count("\n") == 4


def test_what_cannot_be_written_is_said(tmp_path):
    in_memory = ParticleSet.from_array(np.zeros((4, 8, 8), np.float32), 1.0)
    with pytest.warns(UserNotice, match="no star"):
        rows = write_classes(tmp_path, in_memory, np.array([0, 0, 1, 1]))
    assert [row.star for row in rows] == [None, None]
    with pytest.raises(InputError, match="3 labels for 4"):
        write_classes(tmp_path, in_memory, np.zeros(3, int))
