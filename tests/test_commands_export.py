"""``cryosuite export`` as a user meets it."""

from __future__ import annotations

import numpy as np
import pytest
from test_commands_preprocess import run

from cryosuite.data.open import open_particles
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.formats.pickles import write_pickle


@pytest.fixture
def work(golden, tmp_path):
    preprocess(open_particles(golden / "relion/particles.star"), tmp_path / "w", PreprocessOptions(32))
    write_pickle(tmp_path / "labels.pkl", np.arange(200) % 4)
    write_pickle(tmp_path / "ind.pkl", np.array([8, 3]))
    return tmp_path / "w"


def test_a_cluster_to_relion(golden, work, tmp_path):
    done = run("export", work, "--labels", tmp_path / "labels.pkl", "--cluster", 3, "-o", tmp_path / "c.star")
    assert done.returncode == 0, done.stderr
    assert "50 particles" in done.stderr
    exported, rows = open_particles(tmp_path / "c.star"), np.arange(3, 200, 4)
    assert exported.box_size == 64
    assert np.array_equal(exported.rotation, open_particles(golden / "relion/particles.star").rotation[rows])


def test_a_selection_by_original_index(work, tmp_path):
    done = run("export", work, "--ind", tmp_path / "ind.pkl", "-o", tmp_path / "two.star", "--binned")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(
        open_particles(tmp_path / "two.star").read(slice(None)), open_particles(work).read(np.array([8, 3]))
    )


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        ((), "which particles"),
        (("--labels", "labels.pkl"), "--cluster N"),
        (("--labels", "labels.pkl", "--cluster", 9), "no particle in cluster 9"),
        (("--labels", "ind.pkl", "--cluster", 3), "2 labels, but"),
    ],
)
def test_unclear_selections_are_refused(work, tmp_path, options, mention):
    options = [tmp_path / option if str(option).endswith(".pkl") else option for option in options]
    done = run("export", work, *options, "-o", tmp_path / "out.star")
    assert done.returncode == 2
    assert mention in done.stderr
    assert not (tmp_path / "out.star").exists()


def test_help(tmp_path):
    done = run("export", "--help")
    assert done.returncode == 0
    assert "cluster3.star" in done.stdout
