"""Which class a particle belongs to, in shares: a sparse table of responsibilities, one row per particle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from cryosuite.errors import InputError
from cryosuite.formats.checks import printable

CUT = 1e-3  # shares below are dropped and the rest of the row scaled up


@dataclass(frozen=True)
class ClassWeights:
    """Shares p_ik of N particles in K classes, compressed sparse rows. A row sums to 1, or to 0 (left out).

    Attributes:
        data: (nnz,) float32 shares.
        indices: (nnz,) int32 class of each share.
        indptr: (N + 1,) int64 where the rows begin.
        n_classes: K.
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    n_classes: int

    def __post_init__(self) -> None:
        rows_fit = len(self.indptr) >= 1 and self.indptr[0] == 0 and self.indptr[-1] == len(self.data)
        if not (rows_fit and len(self.data) == len(self.indices) and bool((np.diff(self.indptr) >= 0).all())):
            raise InputError("class shares: the parts of the sparse table do not fit each other")
        if len(self.indices) and not (self.indices.min() >= 0 and self.indices.max() < self.n_classes):
            raise InputError(f"class shares: classes must lie between 0 and {self.n_classes - 1}")
        if not (np.isfinite(self.data).all() and bool((self.data >= 0).all())):
            raise InputError("class shares: negative or not finite")

    def __len__(self) -> int:
        """N, the number of particles."""
        return len(self.indptr) - 1

    @classmethod
    def from_labels(cls, labels: np.ndarray, n_classes: int | None = None) -> ClassWeights:
        """Hard classes (N,); a negative label leaves the particle out. K defaults to the largest label + 1."""
        labels = np.asarray(labels).astype(np.int64)
        used = labels >= 0
        count = int(labels.max(initial=-1)) + 1 if n_classes is None else n_classes
        indptr = np.concatenate([[0], np.cumsum(used)]).astype(np.int64)
        return cls(np.ones(int(used.sum()), np.float32), labels[used].astype(np.int32), indptr, count)

    @classmethod
    def from_dense(cls, p: np.ndarray, cut: float = CUT) -> ClassWeights:
        """Shares (N, K); those below ``cut`` are dropped and what stays of a row is scaled to its former sum."""
        p = np.asarray(p, np.float32)
        kept = np.where(p >= cut, p, 0)
        before, after = p.sum(1, keepdims=True), kept.sum(1, keepdims=True)
        kept = kept * np.divide(before, after, out=np.ones_like(before), where=after > 0)
        return cls._from_matrix(sparse.csr_array(kept))

    @classmethod
    def _from_matrix(cls, matrix: sparse.csr_array) -> ClassWeights:
        matrix.sort_indices()
        return cls(
            np.asarray(matrix.data, np.float32),
            np.asarray(matrix.indices, np.int32),
            np.asarray(matrix.indptr, np.int64),
            int(matrix.shape[1]),
        )

    @property
    def matrix(self) -> sparse.csr_array:
        """The table as (N, K) sparse array of scipy; shares its memory."""
        return sparse.csr_array((self.data, self.indices, self.indptr), shape=(len(self), self.n_classes))

    def dense(self) -> np.ndarray:
        """(N, K) float32."""
        return self.matrix.toarray()

    def labels(self) -> np.ndarray:
        """(N,) int64 class with the largest share, -1 for particles that were left out."""
        best = np.full(len(self), -1, np.int64)
        row = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        order = np.lexsort((-self.indices, self.data, row))  # last of a row: the largest share, ties to the first class
        best[row[order]] = self.indices[order]
        return best

    def entropy(self) -> np.ndarray:
        """(N,) float32 entropy of each row in nats: 0 where the class is certain."""
        row = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        terms = -self.data * np.log(np.maximum(self.data, 1e-30))
        return np.bincount(row, weights=terms, minlength=len(self)).astype(np.float32)

    def usage(self) -> np.ndarray:
        """(K,) float64 sum of the shares of each class: how many particles it stands for."""
        return np.bincount(self.indices, weights=self.data, minlength=self.n_classes)

    def rows(self, index: np.ndarray) -> ClassWeights:
        """The table of some particles."""
        return self._from_matrix(self.matrix[np.asarray(index)])

    def columns(self, classes: np.ndarray) -> ClassWeights:
        """Only some classes, numbered anew in the given order; rows are not scaled."""
        return self._from_matrix(sparse.csr_array(self.matrix[:, np.asarray(classes)]))

    def merged(self, groups: np.ndarray) -> ClassWeights:
        """Classes added together: ``groups`` (K,) gives the new number of each class."""
        groups = np.asarray(groups)
        shape = (self.n_classes, int(groups.max(initial=-1)) + 1)
        onto = sparse.csr_array((np.ones(len(groups), np.float32), (np.arange(len(groups)), groups)), shape=shape)
        return self._from_matrix(sparse.csr_array(self.matrix @ onto))

    def to_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What p.N.pkl holds: shares (float32), classes (int32), row starts (int64), shape (N, K) (int64)."""
        return self.data, self.indices, self.indptr, np.array([len(self), self.n_classes], np.int64)

    @classmethod
    def from_arrays(cls, arrays: object, source: str = "class shares") -> ClassWeights:
        """The inverse of `to_arrays`; InputError naming ``source`` when the arrays are not such a table."""
        parts = list(arrays) if isinstance(arrays, (tuple, list)) else []
        if len(parts) != 4 or not all(isinstance(part, np.ndarray) for part in parts) or parts[3].shape != (2,):
            raise InputError(f"{source}: not a table of class shares (p.N.pkl of train-kraqen)")
        data, indices, indptr, shape = parts
        if any(part.ndim != 1 or part.dtype.kind not in "iuf" for part in (data, indices, indptr)):
            raise InputError(f"{source}: not a table of class shares: expected three rows of numbers and a shape")
        if shape.dtype.kind not in "iu" or not (0 <= shape[0] < 2**53 and 0 <= shape[1] < 2**31):
            raise InputError(f"{source}: not a table of class shares: its shape is {printable(shape)}")
        if len(indptr) != int(shape[0]) + 1:
            raise InputError(f"{source}: {len(indptr) - 1} rows where {int(shape[0])} are said")
        return cls(data.astype(np.float32), indices.astype(np.int32), indptr.astype(np.int64), int(shape[1]))


def stacked(parts: list[ClassWeights], n_classes: int) -> ClassWeights:
    """Tables of the same K classes below each other; an empty one where there are none."""
    starts = np.cumsum([0, *(len(part.data) for part in parts)])
    rows = [part.indptr[1:] + start for part, start in zip(parts, starts, strict=False)]
    return ClassWeights(
        np.concatenate([np.zeros(0, np.float32), *(part.data for part in parts)]),
        np.concatenate([np.zeros(0, np.int32), *(part.indices for part in parts)]),
        np.concatenate([np.zeros(1, np.int64), *rows]),
        n_classes,
    )
