"""Which maps show which cluster: the decoded volumes, polished maps and backprojections, with FSC and resolution."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cryosuite.data.results import MapsDir, PolishDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_array, read_labels
from cryosuite.kernels import shells

SAME = 0.8  # shared particles over all particles of either (Jaccard): from here on a class is called this cluster
LEVELS = (0.143, 0.5)


@dataclass(frozen=True)
class ClusterMap:
    """One map of one cluster.

    Attributes:
        label: the cluster. kind: "polished" or "backprojected". path: of the map. pixel_size: A.
        resolution: A where the FSC of the plain half maps falls below 0.143 and 0.5; NaN where unknown.
        curve: (shells,) spatial frequencies in 1/A and FSC, or None. note: what was compared, in words.
    """

    label: int
    kind: str
    path: Path
    pixel_size: float
    resolution: tuple[float, float] = (float("nan"), float("nan"))
    curve: tuple[np.ndarray, np.ndarray] | None = None
    note: str = ""


def find_maps(folders: Sequence[Path], labels: np.ndarray, index: np.ndarray) -> list[ClusterMap]:
    """Maps of the clusters in folders of ``polish`` and ``backproject``; a folder that cannot be read is named.

    Args:
        labels: (N,) cluster of each particle of the run, -1 for none. index: (N,) their original indices.
    """
    found: dict[tuple[int, str], ClusterMap] = {}
    for folder in folders:
        try:
            maps = list(_polished(PolishDir(folder), labels, index))
            maps += _backprojected(MapsDir(folder), labels, index)
        except (InputError, OSError, ValueError, KeyError) as error:
            notice(f"{folder}: its maps are not in the report: {error}")
            continue
        for one in maps:
            found.setdefault((one.label, one.kind), one)
    return [found[key] for key in sorted(found)]


def _polished(folder: PolishDir, labels: np.ndarray, index: np.ndarray) -> Iterator[ClusterMap]:
    """Maps of a folder of ``polish`` whose classes are the clusters, or nearly."""
    if not folder.summary.is_file():
        return
    classes = _of_run(folder, index)
    curves = _curves(folder.fsc)
    table = _rows(folder.classes)
    for label in range(int(labels.max(initial=-1)) + 1):
        number, shared = _partner(labels == label, classes)
        path = folder.map(number)
        if shared < SAME or not path.is_file():
            continue
        row = next((row for row in table if _class(row) == str(number)), {})
        at = tuple(_number(row.get(f"resolution_{level:g}_A")) for level in LEVELS)
        note = "plain half maps inside the mask" + _nearly(f"polished class {number}", shared)
        yield ClusterMap(
            label, "polished", path, read_map(path).pixel_size, at, curves.get(f"class_{number:03d}"), note
        )


def _class(row: Mapping[str, str]) -> str | None:
    """The class of a row of ``classes.csv``; older tables call it ``class``."""
    return row.get("class_from_0", row.get("class"))


def _nearly(name: str, shared: float) -> str:
    """What to add to the note of a class that is not quite the cluster."""
    return f"; {name}, which shares {100 * shared:.0f} % of its particles with this cluster" if shared < 0.995 else ""


def _of_run(folder: PolishDir | MapsDir, index: np.ndarray) -> np.ndarray:
    """Class of each particle of the run, -1 where it was in no class."""
    classes = read_labels(folder.labels, unlabelled=True)
    if not folder.index.is_file():
        if len(classes) != len(index):
            raise InputError(f"{folder.labels}: {len(classes)} classes for {len(index)} particles")
        return classes
    rows = read_array(folder.index, (None,), "original indices", "iu")
    if len(rows) != len(classes):
        raise InputError(f"{folder.labels}: {len(classes)} classes for {len(rows)} particles of {folder.index.name}")
    if np.array_equal(rows, index):
        return classes
    order = np.argsort(rows, kind="stable")
    at = np.clip(np.searchsorted(rows[order], index), 0, max(len(rows) - 1, 0))
    same = rows[order][at] == index if len(rows) else np.zeros(len(index), bool)
    return np.where(same, classes[order][at] if len(rows) else -1, -1)


def _partner(own: np.ndarray, classes: np.ndarray) -> tuple[int, float]:
    """The class that shares most with a cluster (N,) bool, and the share: common particles over those of either."""
    inside = classes[own]
    inside = inside[inside >= 0]
    if not len(inside):
        return 0, 0.0
    number = int(np.bincount(inside).argmax())
    there = classes == number
    return number, float((own & there).sum() / (own | there).sum())


def _backprojected(folder: MapsDir, labels: np.ndarray, index: np.ndarray) -> Iterator[ClusterMap]:
    """Maps of a folder of ``backproject --labels`` whose classes are the clusters, or nearly."""
    if not folder.labels.is_file():
        if any(folder.path.glob("class_[0-9]*")):
            notice(f"{folder.path}: its maps are not in the report: no note of their particles; run backproject again")
        return
    classes = _of_run(folder, index)
    alone = len(np.unique(classes[classes >= 0])) == 1 and folder.map.is_file()  # --cluster N
    for label in range(int(labels.max(initial=-1)) + 1):
        number, shared = _partner(labels == label, classes)
        one = folder if alone else folder.of_class(number)
        if shared < SAME or not one.map.is_file():
            continue
        pixel = read_map(one.map).pixel_size
        at, curve, note = (float("nan"),) * 2, None, ""
        if one.fsc.is_file():
            values = np.genfromtxt(one.fsc, names=True, encoding="utf-8", ndmin=1)
            name = next(n for n in ("corrected", "masked", "unmasked") if n in values.dtype.names)
            curve = (values["pixres"] / pixel, values[name])
            fsc = torch.from_numpy(np.ascontiguousarray(values[name]))
            at = tuple(shells.resolution(fsc, level, 2 * len(fsc), pixel) for level in LEVELS)
            note = f"half maps, {name} FSC"
        note = (note + _nearly(f"class {number}", shared)).removeprefix("; ")
        yield ClusterMap(label, "backprojected", one.map, pixel, at, curve, note)


def _curves(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Frequencies in 1/A and FSC per class of a polish's fsc.csv."""
    rows = _rows(path)
    if not rows:
        return {}
    frequency = 1 / np.array([_number(row["resolution_A"]) for row in rows])
    names = [name for name in rows[0] if name.startswith("class_")]
    return {name: (frequency, np.array([_number(row[name]) for row in rows])) for name in names}


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _number(text: str | None) -> float:
    try:
        return float(text) if text else float("nan")
    except ValueError:
        return float("nan")
