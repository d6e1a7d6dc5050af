"""The sparse table of class shares."""

from __future__ import annotations

import numpy as np
import pytest

from cryosuite.errors import InputError
from cryosuite.reconstruct.weights import ClassWeights


def shares(rows: int = 50, classes: int = 7) -> np.ndarray:
    p = np.random.default_rng(3).dirichlet(np.full(classes, 0.3), rows).astype(np.float32)
    return p


def test_dense_round_trip_keeps_row_sums_and_drops_small_shares():
    p = shares()
    table = ClassWeights.from_dense(p, cut=0.05)
    back = table.dense()
    np.testing.assert_allclose(back.sum(1), 1, rtol=1e-5)
    assert ((back == 0) == (p < 0.05)).all()
    kept = back > 0  # shares of a row keep their ratios
    ratio = np.where(kept, back / np.maximum(p, 1e-9), np.nan)
    np.testing.assert_allclose(np.nanmin(ratio, 1), np.nanmax(ratio, 1), rtol=1e-4)


def test_labels_are_argmax_and_left_out_rows_minus_one():
    p = shares()
    np.testing.assert_array_equal(ClassWeights.from_dense(p).labels(), p.argmax(1))
    hard = np.array([2, -1, 0, 2])
    table = ClassWeights.from_labels(hard, 4)
    np.testing.assert_array_equal(table.labels(), hard)
    np.testing.assert_array_equal(table.usage(), [1, 0, 2, 0])
    assert table.entropy().max() == 0


def test_ties_go_to_the_first_class():
    assert ClassWeights.from_dense(np.array([[0.5, 0.5, 0.0]])).labels()[0] == 0


def test_entropy_usage_rows_columns_merged_agree_with_dense():
    p = shares()
    table = ClassWeights.from_dense(p, cut=0)
    np.testing.assert_allclose(table.entropy(), -(p * np.log(np.maximum(p, 1e-30))).sum(1), atol=1e-5)
    np.testing.assert_allclose(table.usage(), p.sum(0), rtol=1e-5)
    index = np.array([4, 4, 0, 49])
    np.testing.assert_array_equal(table.rows(index).dense(), p[index])
    np.testing.assert_array_equal(table.columns(np.array([5, 1])).dense(), p[:, [5, 1]])
    groups = np.array([0, 1, 0, 2, 1, 1, 2])
    expected = np.stack([p[:, groups == g].sum(1) for g in range(3)], 1)
    np.testing.assert_allclose(table.merged(groups).dense(), expected, rtol=1e-5)


def test_arrays_round_trip_and_foreign_arrays_are_refused():
    table = ClassWeights.from_dense(shares())
    back = ClassWeights.from_arrays(table.to_arrays())
    np.testing.assert_array_equal(back.dense(), table.dense())
    for bad in (np.zeros(3), (np.zeros(3),) * 4, "text", (*table.to_arrays()[:3], np.array([7, 7]))):
        with pytest.raises(InputError, match="p.3.pkl"):
            ClassWeights.from_arrays(bad, "p.3.pkl")
    data, indices, indptr, shape = table.to_arrays()
    with pytest.raises(InputError, match="between 0 and 6"):
        ClassWeights.from_arrays((data, indices + 1000, indptr, shape), "p.3.pkl")
