"""Weights of the map networks on disk: sharpening, super-resolution and missing wedges, and pre-trained encoders.

Safetensors in half precision. The metadata say which network it is, for which task, at which voxel size and on which
scale of grey values it was trained, so that it cannot be used on anything else by mistake.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cryosuite.data.multiview_weights import WEIGHTS, half_state, wide_state
from cryosuite.errors import InputError
from cryosuite.formats.checks import existing_file, printable
from cryosuite.formats.safetensors import (
    SafetensorsHeader,
    read_safetensors,
    read_safetensors_header,
    write_safetensors,
)
from cryosuite.kernels.map_norm import NORMS
from cryosuite.kernels.map_spectrum import SPECTRA
from cryosuite.nets.map_vit import MapVit, MapVitSpec, VitEncoder
from cryosuite.nets.multiview_weights import require_match
from cryosuite.nets.scunet import Encoder, Scunet, ScunetSpec

__all__ = [
    "TASKS",
    "VOXELS",
    "MapWeights",
    "load_map_encoder",
    "load_map_weights",
    "save_map_encoder",
    "save_map_weights",
    "shipped_map_weights",
]

TASKS = ("sharpen", "superres", "wedge")
VOXELS = {"sharpen": 1.0, "superres": 1.0, "wedge": 10.0}  # A per voxel that each task is trained at
KINDS = {"network": "cryosuite map network", "encoder": "cryosuite map encoder"}
NETS = {"scunet": (ScunetSpec, Scunet, Encoder), "vit": (MapVitSpec, MapVit, VitEncoder)}
LARGEST = {"d": 256, "n": 16, "window": 16, "bottleneck": 16, "head_dim": 256, "mlp": 16}  # of a file to be believed
LARGEST |= {"dim": 2048, "depth": 64, "decoder_depth": 64, "heads": 64}
PER_BLOCK = {"n": 100, "depth": 11, "decoder_depth": 11}  # tensors that a file has at least for each block it speaks of
MAX_NOTES = 100_000  # characters


@dataclass(frozen=True)
class MapWeights:
    """A network and what it was trained for.

    Attributes:
        net: in eval mode, float32, (b, 1, z, y, x) -> the same, grey values 0 .. 1.
        task: one of ``TASKS``.
        voxel: A, edge of the voxels it works on.
        norm: one of ``kernels.map_norm.NORMS``, the scale of its grey values.
        notes: what else the file says (crop, seed, command, data, ...).
        spectrum: one of ``kernels.map_spectrum.SPECTRA``, the fall of amplitudes that it was shown.
    """

    net: nn.Module
    task: str
    voxel: float
    norm: str
    notes: dict[str, Any]
    spectrum: str = "as-is"


def save_map_weights(
    path: str | os.PathLike,
    net: Scunet | MapVit,
    *,
    task: str,
    voxel: float,
    norm: str,
    notes: Mapping[str, Any] | None = None,
    spectrum: str = "as-is",
) -> None:
    """Write a network in half precision, atomically, with what it is for.

    Args:
        notes: anything that JSON can hold.

    Raises InputError for weights that are not finite in half precision or a file that cannot be written, ValueError for
    an unknown task or norm.
    """
    if task not in TASKS or norm not in NORMS or spectrum not in SPECTRA or not voxel > 0:
        raise ValueError(f"no weights are for task {task!r}, norm {norm!r}, spectrum {spectrum!r}, voxels of {voxel} A")
    said = {"task": task, "voxel": repr(float(voxel)), "norm": norm, "spectrum": spectrum}
    _save(path, net, "network", said, notes)


def load_map_weights(path: str | os.PathLike) -> MapWeights:
    """Read what ``save_map_weights`` wrote; on the CPU, in eval mode, float32.

    Raises InputError for a file that is missing, broken, of another layout, or whose tensors do not fit its network.
    """
    header = _open(path, "network")
    said = header.metadata
    try:
        task, norm, voxel = said["task"], said["norm"], float(said["voxel"])
        spectrum = said.get("spectrum", "as-is")  # not named by files of the first version
        if task not in TASKS or norm not in NORMS or spectrum not in SPECTRA or not 0.01 <= voxel <= 1000:
            raise ValueError(f"task {task}, norm {norm}, spectrum {spectrum}, voxel {voxel}")
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{header.path}: broken weights file, its metadata name no task, norm and voxel ({printable(error)})"
        ) from None
    return MapWeights(_net(header, False), task, voxel, norm, _notes(header), spectrum)


def save_map_encoder(
    path: str | os.PathLike, encoder: Encoder | VitEncoder, notes: Mapping[str, Any] | None = None
) -> None:
    """Write a pre-trained encoder (what train-lvm --init takes); errors as ``save_map_weights``."""
    _save(path, encoder, "encoder", {}, notes)


def load_map_encoder(path: str | os.PathLike) -> tuple[Encoder | VitEncoder, dict[str, Any]]:
    """Read what ``save_map_encoder`` wrote: the encoder in eval mode, float32, and its notes.

    The encoder inside a file of ``save_map_weights`` is taken too. Errors as ``load_map_weights``.
    """
    header = _open(path, "encoder", "network")
    if header.metadata["kind"] == KINDS["network"]:
        return _net(header, False).encoder, _notes(header)
    return _net(header, True), _notes(header)


def shipped_map_weights(task: str) -> Path:
    """The weights of a task that are installed with cryosuite; InputError that says what to do when they are not."""
    if task not in TASKS:
        raise InputError(f"no task {printable(task)!r}: it is one of {', '.join(TASKS)}")
    path = WEIGHTS / f"lvm-{task}.safetensors"
    if not path.is_file():
        raise InputError(
            f"no weights for {task} come with this installation ({path} is missing). Give weights of your own with "
            f"--weights (`cryosuite train-lvm --task {task}` makes them), or reinstall cryosuite."
        )
    return path


def _save(
    path: str | os.PathLike, net: nn.Module, kind: str, said: dict[str, str], notes: Mapping[str, Any] | None
) -> None:
    name = next((name for name, (spec, *_) in NETS.items() if isinstance(net.spec, spec)), None)
    if name is None:
        raise ValueError(f"{type(net).__name__} is no map network")
    own = {"format": "pt", "kind": KINDS[kind], "net": name, "spec": json.dumps(asdict(net.spec))}
    own["notes"] = json.dumps(dict(notes or {}))
    write_safetensors(path, half_state(path, net), own | said)


def _open(path: str | os.PathLike, *kinds: str) -> SafetensorsHeader:
    """The header of a file that is of one of these kinds."""
    path = existing_file(path, "weights file")
    header = read_safetensors_header(path)
    kind = header.metadata.get("kind")
    if kind not in [KINDS[name] for name in kinds]:
        what = "no word of what it is" if kind is None else f"it is a {printable(kind)}"
        other = " Fine-tune it first: cryosuite train-lvm --init" if kind == KINDS["encoder"] else ""
        raise InputError(f"{path}: not a {KINDS[kinds[0]]} of train-lvm or pretrain-lvm ({what}).{other}")
    return header


def _net(header: SafetensorsHeader, encoder: bool) -> nn.Module:
    """The network of a file with its weights."""
    spec, make = _spec(header, encoder)
    built = asdict(spec) | ({"decoder_depth": 0} if encoder else {})
    for name, least in PER_BLOCK.items():  # a network of many blocks takes memory before its tensors are missed
        if built.get(name, 0) * least > len(header.entries):
            raise InputError(
                f"{header.path}: broken weights file: {len(header.entries)} tensors are too few for the network that "
                f"its metadata describe, {spec}"
            )
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in make(spec).state_dict().items()}
    found = {name: entry.shape for name, entry in header.entries.items()}
    require_match(found, wanted, header.path, f"the network that its metadata describe, {spec}")
    state = {name: torch.from_numpy(array) for name, array in read_safetensors(header).items()}
    net = make(spec)
    net.load_state_dict(wide_state(header.path, state), strict=True)
    return net.eval()


def _spec(header: SafetensorsHeader, encoder: bool) -> tuple[ScunetSpec | MapVitSpec, type[nn.Module]]:
    try:
        kind, network, part = NETS[header.metadata["net"]]
        values = json.loads(header.metadata["spec"])
        if not isinstance(values, dict) or values.keys() != {field.name for field in fields(kind)}:
            raise ValueError("other fields than a network of this version has")
        if any(type(value) not in (type(getattr(kind(), name)), int) for name, value in values.items()):
            raise ValueError("values of other kinds than a network has")
        if any(name in LARGEST and not 0 < value <= LARGEST[name] for name, value in values.items()):
            raise ValueError("sizes that no network has")
        return kind(**values), part if encoder else network
    except (KeyError, ValueError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise InputError(
            f"{header.path}: broken weights file, its metadata describe no network ({printable(error)})"
        ) from None


def _notes(header: SafetensorsHeader) -> dict[str, Any]:
    text = header.metadata.get("notes", "{}")
    try:
        notes = json.loads(text) if len(text) <= MAX_NOTES else None
    except (ValueError, RecursionError):
        notes = None
    if not isinstance(notes, dict):
        raise InputError(f"{header.path}: broken weights file, its notes are no JSON object")
    return notes
