"""The ground truth of a simulated set, found from anything that was made from it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryosuite.data.cryobench import NOT_SAID, find_published
from cryosuite.data.workdir import RunDir, WorkDir, resolve_link
from cryosuite.errors import InputError


@dataclass(frozen=True)
class Truth:
    """The ground truth of a simulated set; labels are rows of the ORIGINAL (simulated) stack, counted from 0.

    no_size: a voxel size (A) that says nothing in the headers of these maps; None: all are meant.
    """

    path: Path
    volumes: list[Path]
    labels: Path
    mask: Path | None
    dataset: dict[str, Any] = field(repr=False)
    no_size: float | None = None

    def labels_of(self, index: Any) -> Any:
        """True states (n,) int64 of particles given by their original ``index`` (n,)."""
        import numpy as np

        from cryosuite.formats.pickles import read_labels

        labels = np.asarray(read_labels(self.labels)).astype(np.int64)
        index = np.asarray(index)
        if len(index) and int(index.max()) >= len(labels):
            raise InputError(f"{self.labels}: has {len(labels)} labels, but a particle has the index {index.max()}.")
        if len(labels) and int(labels.max()) >= len(self.volumes) > 0:
            raise InputError(
                f"{self.labels}: has a state {labels.max()}, but there are {len(self.volumes)} true maps "
                f"({self.volumes[0].name} ...): states count from 0"
            )
        return labels[index]


def find_truth(path: Path | str) -> Truth | None:
    """The ground truth behind a simulated folder, a work directory or a run; None when there is none.

    Follows ``particles`` of a run's config.yaml (ours or cryoDRGN's) and ``source`` of a preprocessed dataset.yaml, to
    a simulated set of ours or one of CryoBench as it is published.
    """
    folder = Path(path)
    for _ in range(8):
        folder = folder if folder.is_dir() else folder.parent
        work, run = WorkDir(folder), RunDir(folder)
        if work.exists():
            dataset = work.read_dataset()
            if isinstance(dataset.get("truth"), dict):
                return _truth(folder, dataset)
            link = dataset.get("source")
        elif run.exists():
            config = run.read_config()
            nested = config.get("dataset_args")
            link = config.get("particles") or (nested.get("particles") if isinstance(nested, dict) else None)
        else:
            return _published(folder)
        if not link:
            return None
        folder = resolve_link(str(link), folder)
        if not os.path.exists(folder):
            return None
    return None


def _published(folder: Path) -> Truth | None:
    """The truth of a set of CryoBench; None where the folder belongs to none."""
    found = find_published(folder)
    if found is None:
        return None
    dataset = {"truth": {"poses": found.poses.name}}
    return Truth(found.path, found.volumes, found.labels, found.mask, dataset, NOT_SAID)


def _truth(folder: Path, dataset: dict[str, Any]) -> Truth:
    """The Truth described by the ``truth`` mapping of a dataset.yaml."""
    entry = dataset["truth"]
    work = WorkDir(folder)
    volumes = entry.get("volumes") or []
    if not isinstance(volumes, list) or not all(
        isinstance(name, str) for name in (*volumes, entry.get("mask") or "", entry.get("labels") or "")
    ):
        raise InputError(f"{work.dataset}: truth: mask and labels must be names of files, volumes a list of them")
    mask = folder / entry["mask"] if entry.get("mask") else work.mask
    return Truth(
        path=folder,
        volumes=[folder / name for name in volumes],
        labels=folder / entry["labels"] if entry.get("labels") else work.labels,
        mask=mask if mask.is_file() else None,
        dataset=dataset,
    )
