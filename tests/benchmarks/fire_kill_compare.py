"""Are two folders of results the same, and is every file in one whole?"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path

import yaml
from common import RESULTS

TIMES = {"seconds", "images_per_s"}  # in metrics.jsonl
FREE = re.compile(r"(run\.log|timing\.json|.*\.lock)$")  # files that hold times only
MOMENT = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?")
TIMED = re.compile(r"started|command|seconds|date|time|timing|particles_relative|source|run\b|written|outdir|folder")


def files(folder: Path) -> dict[str, Path]:
    """The files that a reader would take: all but hidden ones."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path for name, path in found.items() if not any(part[0] == "." for part in Path(name).parts)}


def hidden(folder: Path) -> list[str]:
    """Temporary files that were left."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.is_file()]


def differences(whole: Path, other: Path) -> list[str]:
    """Everything that tells two folders apart, times left out; one text each."""
    a, b = files(whole), files(other)
    found = [f"{name} is missing" for name in a.keys() - b.keys()]
    found += [f"{name} is left over" for name in b.keys() - a.keys()]
    found += [f"{name} differs" for name in sorted(a.keys() & b.keys()) if not equal(a[name], b[name])]
    return found + [f"{name} is a forgotten temporary file" for name in hidden(other)]


def equal(one: Path, other: Path) -> bool:
    """Same contents, times and the names of the two folders left out."""
    if FREE.search(one.name):
        return True
    if one.read_bytes() == other.read_bytes():
        return True
    if one.name == "metrics.jsonl":
        return _metrics(one) == _metrics(other)
    if one.suffix == ".yaml":
        return _timeless(yaml.safe_load(one.read_text())) == _timeless(yaml.safe_load(other.read_text()))
    if one.suffix in (".json", ".txt", ".html", ".csv", ".md", ".cxc", ".star"):
        return _lines(one) == _lines(other)
    if one.suffix == ".mrc":
        return _map(one) == _map(other)
    if one.suffix == ".safetensors":
        return _tensors(one) == _tensors(other)
    if zipfile.is_zipfile(one) and zipfile.is_zipfile(other):
        return _state(one) == _state(other)
    return False


def _timeless(value: object) -> object:
    """A parsed file without what may differ from run to run."""
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not TIMED.search(str(key))}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _metrics(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def _lines(path: Path) -> list[str]:
    """Lines without times, and without those that hold one or the run's own folder."""
    lines = MOMENT.sub("", path.read_text(errors="replace")).splitlines()
    return [line for line in lines if not TIMED.search(line) and str(path.parent) not in line]


def _map(path: Path) -> bytes:
    """A map without the labels of its header, which hold the time."""
    data = path.read_bytes()
    return data[:220] + data[1024:]


def _tensors(path: Path) -> bytes:
    """The numbers of a safetensors file, without the header, whose notes hold the command."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def _state(path: Path) -> object:
    """A checkpoint or weights as plain values, tensors as bytes, without times."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError):  # an .npz
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    return _plain(state)


def _plain(value: object) -> object:
    import torch

    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return (str(value.dtype), tuple(value.shape), data)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in TIMES | {"reported", "began"}}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def broken(folder: Path, whole: Path | None) -> list[str]:
    """Files of a killed run that a reader would take for whole and that are not.

    ``whole``: the undisturbed folder, where every file there is must already be as in the end; None: files change on
    the way, so they only have to be readable.
    """
    if not folder.exists():
        return []
    found = []
    for name, path in files(folder).items():
        if whole is not None:
            there = whole / name
            if not there.is_file() or not equal(there, path):
                found.append(f"after a kill {name} is there and is not the finished one")
        elif not _readable(path):
            found.append(f"after a kill {name} cannot be read")
    return found


def _readable(path: Path) -> bool:
    try:
        if path.suffix == ".pt" or zipfile.is_zipfile(path):
            _state(path)
        elif path.suffix == ".pkl":
            from cryosuite.formats.pickles import safe_load

            safe_load(path)
        elif path.suffix == ".mrc":
            from cryosuite.formats.mrc import read_map

            read_map(path)
        elif path.suffix == ".safetensors":
            from cryosuite.formats.safetensors import read_safetensors

            read_safetensors(path)
        elif path.suffix in (".json", ".yaml"):
            yaml.safe_load(path.read_text())
        elif path.name == "metrics.jsonl":
            [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    except Exception as error:  # whatever it is, it is what this program looks for
        print(f"  {path}: {type(error).__name__}: {str(error)[:200]}")
        return False
    return True


def rows_but(name: str, rows: list[dict]) -> list[dict]:
    """Rows of an earlier result of this name that are not made anew, so that commands can be tried one by one."""
    path = RESULTS / f"{name}.json"
    made = {row["what"] for row in rows}
    return [row for row in json.loads(path.read_text())["rows"] if row["what"] not in made] if path.is_file() else []
