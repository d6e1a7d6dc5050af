"""Checkpoints and weights on disk: written whole or not at all, read without running code."""

from __future__ import annotations

import errno
import resource
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cryosuite import __version__
from cryosuite.errors import InputError
from cryosuite.formats.atomic import atomic_path, require_space, write_error
from cryosuite.formats.checks import printable
from cryosuite.formats.pickles import torch_source
from cryosuite.kernels.memory import out_of_memory
from cryosuite.training.options import FREE_ON_RESUME, plain

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet

FORMAT = 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values with torch.save, atomically and flushed to disk.

    Raises InputError naming the file and the space needed where the disk is full; the old file then stays.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(state)) + (1 << 16)
    require_space(path, needed)
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch reports a failed write of its zip file, in various words
            if out_of_memory(error) or "CUDA error" in str(error):  # while it copied a tensor from the GPU
                raise
            full = OSError(errno.EFBIG if _limited(needed) else errno.ENOSPC, "")
            raise write_error(path, full, needed) from None


def _limited(needed: int) -> bool:
    """Whether `ulimit -f` forbids a file of so many bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return limit != resource.RLIM_INFINITY and needed > limit


def load_state(path: Path, what: str) -> dict[str, Any]:
    """Read what ``save_state`` wrote, onto the CPU, tensors and plain values only.

    Raises InputError for a missing, damaged or foreign file.
    """
    try:
        state = torch.load(torch_source(path), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {what}") from None
    except PermissionError:
        raise InputError(f"{path}: no permission to read this file; expected {what}") from None
    except MemoryError:  # of the machine, not of the file
        raise
    except Exception as error:  # torch raises a dozen types for damaged files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path}: damaged, or not {what} of cryosuite ({printable(lines[0])})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path}: not {what} of this cryosuite ({__version__})")
    return state


def save_weights(path: Path, epoch: int, model: nn.Module) -> None:
    """weights.N.pkl: the (averaged) weights after an epoch."""
    named = model.state_dict().items()
    if left_out := getattr(model, "not_in_weights", None):  # what only goes into the checkpoint
        named = [(name, tensor) for name, tensor in named if not name.startswith(left_out)]
    state = {name: tensor.detach().cpu() for name, tensor in named}
    save_state(path, {"format": FORMAT, "version": __version__, "epoch": epoch, "model_state_dict": state})


def load_into(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """``model.load_state_dict`` with a message for the user where names or shapes differ."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[1:2] or [str(error)]
        raise InputError(f"{path}: made for another model ({first[0].strip()[:200]})") from None


def fingerprint(particles: ParticleSet) -> dict[str, Any]:
    """What tells one particle set from another: size, box, pixel size, and checksums of indices and two images."""
    ends = np.array(sorted({0, len(particles) - 1}))
    images = np.ascontiguousarray(particles.read(ends), dtype=np.float32)
    return {
        "particles": len(particles),
        "box size": int(particles.box_size),
        "pixel size": round(float(particles.pixel_size[0]), 4),
        "choice of particles": zlib.crc32(np.ascontiguousarray(particles.index, dtype=np.int64).tobytes()),
        "images": zlib.crc32(images.tobytes()),
    }


def with_later_options(then: dict[str, Any], options: object) -> dict[str, Any]:
    """What a checkpoint was made with, and options of the method that came later as runs of then mean them now: as
    ``from_dict`` of the method's ``options`` reads a config.yaml without them."""
    read = getattr(options, "from_dict", None)
    if read is None:
        return then
    stored = then["method"]["options"]
    return then | {"method": then["method"] | {"options": plain(read(stored)) | stored}}


def refuse_differences(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare what a checkpoint was made with and what is asked for now; both hold method, options, particles.

    Raises InputError that names everything that differs, apart from what may differ (``FREE_ON_RESUME``).
    """
    if then["method"]["name"] != now["method"]["name"]:
        raise InputError(f"{path}: belongs to {then['method']['name']}, not to {now['method']['name']}")
    options = [
        f"--{name.replace('_', '-')} was {_shown(before.get(name))}, now {_shown(after.get(name))}"
        for before, after in (
            (then["options"], now["options"]),
            (then["method"]["options"], now["method"]["options"]),
        )
        for name in sorted(before.keys() | after.keys())
        if name not in FREE_ON_RESUME and not _same(before, after, name)
    ]
    before, after = then["particles"], now["particles"]
    sets = [
        f"the {name} {'differ' if name[-1] == 's' else 'differs'}"
        + (f" (was {before.get(name)}, now {after.get(name)})" if name not in ("images", "choice of particles") else "")
        for name in after
        if before.get(name) != after.get(name)
    ]
    if options or sets:
        raise InputError(
            f"{path}: cannot be continued: {'; '.join(options + sets)}. Resume with the options and particles it was "
            "started with, or start a new run in another folder."
        )


def _same(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    """Whether an option is what it was; off in one version is the same as not there in another."""
    return before.get(name) == after.get(name) or not (before.get(name) or after.get(name))


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
