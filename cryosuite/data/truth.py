"""The ground truth of a simulated set, found from anything that was made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryosuite.data.workdir import RunDir, WorkDir, resolve_link
from cryosuite.errors import InputError


@dataclass(frozen=True)
class Truth:
    """The ground truth of a simulated set; labels are rows of the ORIGINAL (simulated) stack, counted from 0."""

    path: Path
    volumes: list[Path]
    labels: Path
    mask: Path | None
    dataset: dict[str, Any] = field(repr=False)

    def labels_of(self, index: Any) -> Any:
        """True states (n,) int64 of particles given by their original ``index`` (n,)."""
        import numpy as np

        from cryosuite.formats.pickles import read_labels

        labels = np.asarray(read_labels(self.labels)).astype(np.int64)
        index = np.asarray(index)
        if len(index) and int(index.max()) >= len(labels):
            raise InputError(f"{self.labels}: has {len(labels)} labels, but a particle has the index {index.max()}.")
        return labels[index]


def find_truth(path: Path | str) -> Truth | None:
    """The ground truth behind a simulated folder, a work directory or a run; None when there is none.

    Follows ``particles`` of a run's config.yaml and ``source`` of a preprocessed dataset.yaml.
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
            link = run.read_config().get("particles")
        else:
            return None
        if not link:
            return None
        folder = resolve_link(str(link), folder)
        if not folder.exists():
            return None
    return None


def _truth(folder: Path, dataset: dict[str, Any]) -> Truth:
    """The Truth described by the ``truth`` mapping of a dataset.yaml."""
    entry = dataset["truth"]
    work = WorkDir(folder)
    mask = folder / entry["mask"] if entry.get("mask") else work.mask
    return Truth(
        path=folder,
        volumes=[folder / name for name in entry.get("volumes", [])],
        labels=folder / entry["labels"] if entry.get("labels") else work.labels,
        mask=mask if mask.is_file() else None,
        dataset=dataset,
    )
