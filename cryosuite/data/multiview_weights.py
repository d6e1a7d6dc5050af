"""Weights of multi-view pose networks on disk: ours, the released CryoFastAR checkpoint, and what ships with us.

Ours are safetensors in half precision that say in their metadata which network they are of. The released checkpoint is
a PyTorch file; it is read without running anything in it.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosuite.errors import InputError
from cryosuite.formats.checks import existing_file, printable
from cryosuite.formats.pickles import torch_source
from cryosuite.formats.safetensors import read_safetensors, read_safetensors_header, write_safetensors
from cryosuite.nets.multiview import SPECS, Multiview, MultiviewSpec, released, spec_name
from cryosuite.nets.multiview_weights import adapt_released, require_match

__all__ = ["half_state", "load_multiview", "load_released", "save_multiview", "shipped_multiview", "wide_state"]

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
ENDING = ".safetensors"
FOLDER_FILE = f"weights{ENDING}"  # what a training run leaves in its folder
KIND = "cryosuite multiview"
OURS = ("format", "kind", "spec")  # metadata that is not a note
MAX_NOTE = 20_000  # characters of a note
MAX_SIZE, MAX_DEPTH = 1 << 13, 128  # of the numbers in a spec: a file that claims more lies


def load_multiview(path: str | os.PathLike, spec: MultiviewSpec | None = None) -> tuple[Multiview, dict[str, str]]:
    """A network in eval mode on the CPU, float32, and its notes.

    Args:
        path: a file of ``save_multiview``, the folder of a training run, or the released checkpoint (its notes say
            ``mode`` "released").
        spec: the network that is wanted; None takes the file's.

    Raises InputError for a file that is missing, broken, of another network, or of another preset than ``spec``.
    """
    path = _find_file(Path(path))
    if not _is_safetensors(path) or read_safetensors_header(path).metadata.get("kind") != KIND:
        if spec is not None and spec.head != "dense":
            raise InputError(
                f"{path}: not a weights file of train-fastar, expected one of {spec_name(spec)}: give the "
                f"{FOLDER_FILE} of a run, or leave the preset out to load the released CryoFastAR checkpoint"
            )
        return load_released(path, spec)
    header = read_safetensors_header(path)
    stored = _read_spec(path, header.metadata.get("spec", ""))
    if spec is not None and stored != spec:
        what = "preset" if stored in SPECS.values() else "network"
        raise InputError(
            f"{path}: a checkpoint of another {what}: it is {spec_name(stored)}, not {spec_name(spec)}: give the "
            "preset it was trained with, or other weights"
        )
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in Multiview(stored).state_dict().items()}
    require_match({name: entry.shape for name, entry in header.entries.items()}, wanted, path, spec_name(stored))
    state = {name: torch.from_numpy(array) for name, array in read_safetensors(header).items()}
    notes = {key: printable(value, MAX_NOTE) for key, value in header.metadata.items() if key not in OURS}
    return _filled(stored, state, path), notes


def save_multiview(path: str | os.PathLike, model: Multiview, notes: Mapping[str, Any] | None = None) -> None:
    """Write a network in half precision, atomically, with its spec and notes (mode, images seen, command, seed, ...).

    Notes that are not text are written as JSON. Raises InputError for weights that are not finite or too large for half
    precision, or a file that cannot be written; ValueError for notes named like what the file says by itself.
    """
    said = {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in (notes or {}).items()}
    if said.keys() & set(OURS):
        raise ValueError(f"notes cannot be named {', '.join(OURS)}")
    own = {"format": "pt", "kind": KIND, "spec": json.dumps(asdict(model.spec))}
    write_safetensors(path, half_state(path, model), said | own)


def half_state(path: str | os.PathLike, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A network's state in half precision, to be written to ``path``; InputError for what is not finite in it."""
    tensors = {}
    for name, value in model.state_dict().items():
        half = value.detach().cpu().half()
        if not bool(torch.isfinite(half).all()):
            raise InputError(
                f"{path}: not written: {name} holds values that are not finite in half precision, the training failed"
            )
        tensors[name] = half.numpy()
    return tensors


def shipped_multiview(name: str = "fastar-micro") -> tuple[Multiview, dict[str, str]]:
    """The network of that name that is installed with cryosuite; InputError that says what there is when it is not."""
    path = WEIGHTS / f"{name}{ENDING}"
    if not name or Path(name).name != name or not path.is_file():
        names = sorted(entry.name.removesuffix(ENDING) for entry in WEIGHTS.glob(f"fastar-*{ENDING}"))
        have = f"installed: {', '.join(names)}" if names else f"none is installed in {WEIGHTS}"
        raise InputError(
            f"no pose network {printable(name)!r} comes with cryosuite ({have}). Give the weights of your own "
            "`cryosuite train-fastar` run, or reinstall cryosuite."
        )
    return load_multiview(path)


def load_released(path: str | os.PathLike, spec: MultiviewSpec | None = None) -> tuple[Multiview, dict[str, str]]:
    """The released CryoFastAR checkpoint as our network, in eval mode on the CPU, float32, and notes on it.

    Takes the authors' file (``{"model": state}``), a bare state dict, or safetensors; ``spec`` gives other sizes of the
    same layout. A PyTorch file may hold tensors, plain values and an ``argparse.Namespace`` and nothing else.

    Raises InputError for a file that is missing, broken, holds anything else, or does not fit (adapt_released).
    """
    path, spec = existing_file(path, "weights file"), released() if spec is None else spec
    if _is_safetensors(path):
        said = {name: torch.from_numpy(array) for name, array in read_safetensors(path).items()}
    else:
        said = _read_torch(path)
    state = adapt_released(said, path, spec)
    return _filled(spec, state, path), {"mode": "released", "source": str(path)}


def _filled(spec: MultiviewSpec, state: Mapping[str, Tensor], path: Path) -> Multiview:
    """The network with these weights, made without random ones; InputError for what is no finite number."""
    with torch.device("meta"):
        model = Multiview(spec)
    model.load_state_dict(wide_state(path, state), strict=True, assign=True)
    model.make_tables()
    return model.requires_grad_(True).eval()


def wide_state(path: str | os.PathLike, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state that was read from ``path`` as float32; InputError for what is no finite number."""
    wide = {}
    for name, value in state.items():
        if not value.is_floating_point():
            raise InputError(f"{path}: {name} holds {str(value.dtype)[6:]}, expected floating point numbers")
        wide[name] = value.float()
        if not bool(torch.isfinite(wide[name]).all()):
            raise InputError(f"{path}: {name} holds NaN or infinite values: damaged, or of a training that failed")
    return wide


def _find_file(path: Path) -> Path:
    """The file itself, or the weights in the folder of a run."""
    if path.is_dir():
        if not (path / FOLDER_FILE).is_file():
            raise InputError(f"{path}: is a folder without {FOLDER_FILE}: give the weights file of a train-fastar run")
        path = path / FOLDER_FILE
    return existing_file(path, "weights file")


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ENDING:
        return True
    with open(path, "rb") as stream:
        start = stream.read(9)
    return start[8:] == b"{" and not start.startswith(b"PK")


def _read_spec(path: Path, text: str) -> MultiviewSpec:
    try:
        values = json.loads(text)
        if not isinstance(values, dict) or values.keys() != asdict(released()).keys():
            raise ValueError("other fields than a network of this version has")
        if any(type(value) is not type(getattr(released(), name)) for name, value in values.items()):
            raise ValueError("values of other kinds than a network has")
        large = [n for n, v in values.items() if isinstance(v, int) and v > (MAX_DEPTH if "depth" in n else MAX_SIZE)]
        if large:
            raise ValueError("sizes that no network has")
        return MultiviewSpec(**values)
    except (ValueError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise InputError(
            f"{path}: broken weights file, its metadata describe no network ({printable(error)})"
        ) from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    """The state dict in a PyTorch file, under "model" or bare."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            source = torch_source(path)
            said = torch.load(source, map_location="cpu", weights_only=True, mmap=isinstance(source, Path))
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"holds {refused.group(1)}, which could run as code" if refused else "is no plain PyTorch file"
        raise InputError(
            f"{path}: refused: it {why}; expected tensors and plain values only, as the released CryoFastAR checkpoint"
        ) from None
    except Exception as error:  # torch raises a dozen types for damaged files
        raise InputError(f"{path}: damaged, or not a PyTorch file ({printable(error)})") from None
    if isinstance(said, dict) and isinstance(said.get("model"), dict):
        said = said["model"]
    if not isinstance(said, dict) or not said:
        raise InputError(f"{path}: holds no weights: expected a dictionary of tensors, or one under 'model'")
    foreign = [name for name, value in said.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if foreign:
        raise InputError(
            f"{path}: holds no weights: {printable(foreign[0])} is no tensor ({len(foreign)} such entries); expected a "
            "dictionary of tensors, or one under 'model'"
        )
    return said
