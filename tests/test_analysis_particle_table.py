"""The table of particles behind a report: text and names that are read back right, confidence of clusters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from report_toy import particle_set

from cryosuite.analysis.particle_table import Column, particle_columns, round_confidence, write_particle_table
from cryosuite.formats.csv_text import unguarded


def test_table_is_read_back_whatever_the_text(tmp_path: Path) -> None:
    names = ("plain", 'with "quotes"', "a, comma", "a\nline", "", "=1+1", "'=1", "'60s")
    codes = np.array([0, 1, 2, 3, 4, 5, 6, 7, -1])
    columns = [
        Column("row", np.arange(9), from_0=True),
        Column("x", np.array([1.5, np.nan, -np.inf, 1e-9, 123456.7, 0.0, -1, -2, 3])),
        Column("name", codes, names=names),
        Column("big", np.array([2**40 + 1] * 9)),
    ]
    write_particle_table(tmp_path / "t.csv", columns)
    table = pd.read_csv(tmp_path / "t.csv", keep_default_na=False, na_values={"x": [""]})
    assert list(table.columns) == ["row_from_0", "x", "name", "big"]
    assert list(map(unguarded, table["name"])) == [*names, ""]
    assert list(table["name"][5:8]) == ["'=1+1", "''=1", "'60s"], "a spreadsheet shows text and calculates nothing"
    np.testing.assert_allclose(table["x"], [1.5, np.nan, np.nan, 1e-9, 123457, 0.0, -1, -2, 3], rtol=1e-5)
    assert set(table["big"]) == {2**40 + 1}


def test_columns_of_cryosparc_get_names_that_can_be_typed() -> None:
    rows = np.zeros(4, [("uid", "<u8"), ("location/micrograph_path", "S20"), ("ctf/exp_group_id", "<u4"),
                        ("alignments3D/class_posterior", "<f4"), ("alignments3D/pose", "<f4", (3,)), ("class", "<i4"),
                        ("blob/path", "S5")])  # fmt: skip
    rows["location/micrograph_path"] = [b"m2.mrc", b">m1.mrc", b">m2.mrc", b"\xff.mrc"]  # > marks an exported path
    rows["alignments3D/class_posterior"] = [0.1, 0.2, 0.3, 0.4]
    particles = particle_set(4)
    particles.tables, particles.source = rows, Path("p.cs")
    columns = {c.name: c for c in particle_columns(np.zeros((4, 2)), np.zeros(4, int), particles)}
    assert [columns["micrograph"].names[i] for i in columns["micrograph"].values] == [
        "m2.mrc", "m1.mrc", "m2.mrc", "\ufffd.mrc",
    ]  # fmt: skip
    np.testing.assert_allclose(columns["alignments3D_class_posterior"].values, [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    assert len(columns["micrograph"].names) == 3
    assert "c_class" in columns, "a word of Python's grammar cannot be a column"
    assert not {"uid", "blob_path", "alignments3D_pose"} & set(columns)


def test_confidence_is_that_of_equal_round_clouds() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, -1], [4000, 4000, 1])
    z = np.concatenate([rng.normal(-2, 1, (4000, 1)), rng.normal(2, 1, (4000, 1)), [[np.nan]]])
    found = round_confidence(z, labels)
    expected = 1 / (1 + np.exp(-4 * np.abs(z[:, 0])) ** np.sign(z[:, 0] * (labels * 2 - 1)))
    np.testing.assert_allclose(found[:-1], expected[:-1], atol=0.03)
    assert np.isnan(found[-1])
    np.testing.assert_array_equal(round_confidence(np.ones((5, 2)), np.zeros(5, int)), np.ones(5))
    lost = round_confidence(np.r_[z[:-1], [[np.nan]]], np.r_[labels[:-1], 0])  # labels from elsewhere
    np.testing.assert_array_equal(lost, found)
    # directions in which the clusters do not differ say nothing, however narrow or wide
    wider = np.concatenate([z, rng.normal(0, 0.01, (8001, 20))], axis=1)
    np.testing.assert_allclose(round_confidence(wider, labels)[:-1], found[:-1], atol=0.02)
    own = np.abs(z[:-1, 0]) * np.sign(z[:-1, 0] * (labels[:-1] * 2 - 1))
    assert (np.diff(found[:-1][np.argsort(own)]) > -0.02).all(), "the farther on its own side, the surer"
