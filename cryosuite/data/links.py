"""Paths that a config.yaml or dataset.yaml names, after its folder was moved together with what it names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

OPENED_WITH = ("particles", "poses", "ctf", "ind", "datadir")


def moved(path: Path, written: Path, relative: str, folder: Path) -> Path:
    """Where ``path`` lies now.

    A project that moves as a whole keeps the way from one of its folders to another. One such way is on record: from
    ``folder`` (where it lies now) by ``relative`` to what was once ``written``; whatever lay under the folder they have
    in common is looked for under the one they have in common now. Paths that exist, and those that cannot be found that
    way, are returned as they are.
    """
    if os.path.exists(path) or not path.is_absolute():  # False also for folders that may not be looked into
        return path
    parts = Path(relative).parts
    up = len([part for part in parts if part == ".."])
    tail = parts[up:]
    if Path(relative).is_absolute() or ".." in tail or (tail and written.parts[-len(tail) :] != tail):
        return path
    before = Path(*written.parts[: len(written.parts) - len(tail)])
    now = Path(os.path.normpath(folder.absolute().joinpath(*[".."] * up)))
    if not path.is_relative_to(before):
        return path
    found = now / path.relative_to(before)
    return found if os.path.exists(found) else path


def follow_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run's config with its paths where the files lie now (``particles`` and ``particles_relative`` tell the way)."""
    written, relative = config.get("particles"), config.get("particles_relative")
    if not isinstance(written, str) or not isinstance(relative, str):
        return config
    links = {
        name: str(moved(Path(config[name]), Path(written), relative, folder))
        for name in OPENED_WITH
        if isinstance(config.get(name), str)
    }
    return {**config, **links}


def follow_dataset(dataset: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same for dataset.yaml of a work directory (``source`` and ``source_relative``)."""
    written, relative = dataset.get("source"), dataset.get("source_relative")
    if not isinstance(written, str) or not isinstance(relative, str):
        return dataset

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(item) for item in value]
        return str(moved(Path(value), Path(written), relative, folder)) if isinstance(value, str) else value

    names = ("source", "datadir", "passthrough", "poses", "ctf")
    return {**dataset, **{name: found(dataset[name]) for name in names if dataset.get(name)}}
