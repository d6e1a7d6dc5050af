"""What a metadata file says of each particle, in one form for star and cs.

Two steps, because shifts and CTF need the true box size, which only the stacks know: ``Rows`` says where the images
lie, ``Rows.details`` gives poses and CTF once box and pixel size are certain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from cryosuite.errors import notice


@dataclass(frozen=True)
class Given:
    """Values the user gave on the command line for what a file does not say (or says otherwise)."""

    pixel_size: float | None = None  # A
    voltage_kv: float | None = None
    cs_mm: float | None = None
    amplitude_contrast: float | None = None


@dataclass
class Details:
    """Poses and CTF of N rows; None where the file does not say them and they are not needed.

    rotation (N, 3, 3) float32; shift (N, 2) float32, fraction of the box; ctf (N, 9) float32; extras: aberrations.
    """

    rotation: np.ndarray | None = None
    shift: np.ndarray | None = None
    ctf: np.ndarray | None = None
    extras: dict[str, np.ndarray] = field(default_factory=dict)


# (box (N,), pixel size (N,) A, the same as the file measures it or None where that is no other) -> poses and CTF
DetailsOf = Callable[..., Details]


def no_details(box: np.ndarray, pixel_size: np.ndarray, in_file: np.ndarray | None = None) -> Details:
    """For bare stacks."""
    return Details()


@dataclass
class Rows:
    """N rows of a particle table.

    files, file_id (N,), slices (N,): where the image of each row lies (names as written in the file; slices from 0).
    box (N,) pixels: as the file says, or None. pixel_size (N,) A: the user's, else own_pixel_size, the file's, or None.
    signs (N,): +1 white, -1 dark, or None. image (N,): as ``StackImages`` takes it. row_key: as of ``ParticleSet``.
    found: the files are paths as they stand, not names to be looked for.
    tables: the star tables or cs array as read, in file order.
    """

    path: Path
    n: int
    files: list[str]
    file_id: np.ndarray
    slices: np.ndarray
    box: np.ndarray | None = None
    pixel_size: np.ndarray | None = None
    own_pixel_size: np.ndarray | None = None
    optics_group: np.ndarray | None = None
    uid: np.ndarray | None = None
    half: np.ndarray | None = None
    signs: np.ndarray | None = None
    image: np.ndarray | None = None
    row_key: np.ndarray | None = None
    found: bool = False
    ctf_premultiplied: bool = False
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    details: DetailsOf = no_details
    tables: object | None = None

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows, in the order given (``details`` stays that of the whole table)."""
        values: dict = {"n": len(rows), "extras": {name: value[rows] for name, value in self.extras.items()}}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, np.ndarray) and entry.name != "tables":
                values[entry.name] = value[rows]
        return replace(self, **values)


def chosen_pixel_size(path: Path, found: np.ndarray | None, given: Given, n: int) -> np.ndarray | None:
    """Pixel size (n,) A: the user's if given (with a notice when the file says otherwise), else the file's, or None."""
    if given.pixel_size is None:
        return found
    if found is not None and abs(found / given.pixel_size - 1).max() > 1e-3:
        notice(
            f"{path}: says {found[0]:.5g} A per pixel, your --Apix {given.pixel_size:g} is used instead; it moves no "
            "particle"
        )
    return np.full(n, float(given.pixel_size))


def pixel_size_in_file(rows: Rows, box: np.ndarray, pixel_size: np.ndarray) -> np.ndarray | None:
    """Pixel size (n,) A of the images in the Angstrom of the file, in which its shifts are; None where it says none.

    The user's size is another measure of the same pixels (a recalibrated microscope): it moves no particle. Images of
    another box than the file says were binned or cropped after it was written; of the two, what the user's size fits.
    """
    own = rows.own_pixel_size
    if own is None or rows.box is None:
        return own
    binned = own * rows.box / box
    return np.where(np.abs(np.log(pixel_size / binned)) < np.abs(np.log(pixel_size / own)), binned, own)


def halves_of_tubes(path: Path, tubes: Sequence[np.ndarray] | None) -> np.ndarray | None:
    """Half set (N,) int8 that never parts the segments of one helix; None without at least two helices.

    Segments overlap: in different halves they would raise the FSC with signal that is the same pixels.
    """
    tube = None if tubes is None else group_codes(tubes)
    if tube is None or tube.max(initial=0) < 1:
        return None
    notice(f"{path}: helical segments of {tube.max() + 1} tubes: half sets are made of whole tubes")
    return random_halves(tube)


def random_halves(keys: np.ndarray) -> np.ndarray:
    """Half set 0/1 (N,) int8 of whole numbers (N,) >= 0, the same for equal ones; the same numbers, the same halves.

    The different numbers are put in the order of a hash (SplitMix64 of Steele, Lea and Flood 2014) and cut in the
    middle: balanced to within one, unrelated to any order in which molecules, views or micrographs take turns, and a
    subset keeps nearly all of its halves, because the cut stays near the middle of all hashes.
    """
    distinct, number = np.unique(keys, return_inverse=True)
    with np.errstate(over="ignore"):
        mixed = (distinct.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    half = np.empty(len(distinct), np.int8)
    half[np.argsort(mixed, kind="stable")] = np.arange(len(distinct)) >= (len(distinct) + 1) // 2
    return half[number.reshape(-1)]


def rows_of_indices(index: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows (m,) whose original index (N,) is ``wanted`` (k,), in that order, and how many of them are nowhere.

    An index that several rows have (copies) stands for all of these, once however often it is named; one row that is
    named twice comes twice.
    """
    order = np.argsort(index, kind="stable")
    known = index[order]
    first, last = np.searchsorted(known, wanted, "left"), np.searchsorted(known, wanted, "right")
    number = last - first
    again = np.ones(len(wanted), bool)
    again[np.unique(wanted, return_index=True)[1]] = False
    number[again & (number > 1)] = 0
    place = np.repeat(first - np.concatenate([[0], number.cumsum()[:-1]]), number) + np.arange(number.sum())
    return order[place], int((first == last).sum())


def group_codes(columns: Sequence[np.ndarray]) -> np.ndarray:
    """A number (N,) int64 from 0 per row, the same for rows that agree in all columns (N,) or (N, k), in their order.

    One column after the other: a unique of whole rows of a million particles takes several times as long.
    """
    code = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        for values in column.reshape(len(code), -1).T:
            if len(values) and (values != values[0]).any():
                _, rank = np.unique(values, return_inverse=True)
                code = code * (rank.max() + 1) + rank.reshape(-1)
                code = np.unique(code, return_inverse=True)[1].reshape(-1)
    return code
