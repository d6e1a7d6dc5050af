"""Encoder weights on disk: the released Cryo-IEF files unmodified, ours, and the small encoder that ships with us."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from cryosuite.data.encoder_pixels import PREPS
from cryosuite.errors import InputError
from cryosuite.formats.checks import printable
from cryosuite.formats.safetensors import read_safetensors, read_safetensors_header, write_safetensors
from cryosuite.nets.ief import IefEncoder
from cryosuite.nets.ief_weights import LoadedEncoder, build_encoder, default_mean_std, find_layout

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
SHIPPED = WEIGHTS / "iev-tiny.safetensors"
ENDING = ".safetensors"

__all__ = ["SHIPPED", "LoadedEncoder", "load_encoder", "save_encoder", "shipped_encoder"]


def load_encoder(path: str | os.PathLike, *, prep: str | None = None) -> LoadedEncoder:
    """Read an encoder from a safetensors file, or from a folder that holds one (model.safetensors, or the only one).

    Released Cryo-IEF files, whole MoCo wrappers, fine-tuned CryoDECO encoders and files of ``save_encoder`` are taken;
    the size and the kind of file are told from the tensors. Strict: every tensor of the backbone must fit.

    Args:
        prep: how the images will be prepared; None takes what the file was trained with. Files without a word of it
            are released ones: "ief".

    Raises InputError for a file that is missing, broken, of another network or of another ``prep``.
    """
    path = _find_file(Path(path))
    header = read_safetensors_header(path)
    notes = {key: printable(value, 2000) for key, value in header.metadata.items()}
    layout = find_layout({name: entry.shape for name, entry in header.entries.items()}, notes, path)
    stored = notes.get("prep", "ief")
    if stored not in PREPS:
        raise InputError(f"{path}: says prep {printable(stored)}; known are {', '.join(PREPS)}")
    if prep is not None and prep != stored:
        raise InputError(
            f"{path}: this encoder was trained on images prepared as {stored!r}, not {prep!r}: leave --prep out, or "
            "give other weights"
        )
    wanted = [*layout.names.values(), *(layout.head or ())]
    tensors = {name: torch.from_numpy(array) for name, array in read_safetensors(header, wanted).items()}
    mean, std = _mean_std(path, notes, default_mean_std(layout.spec))
    return LoadedEncoder(
        encoder=build_encoder(layout, tensors, path),
        spec=layout.spec,
        prep=stored,
        mean=mean,
        std=std,
        source=f"{path} ({layout.spec.size}, {f'prefix {layout.prefix}' if layout.prefix else 'no prefix'})",
        dropped=layout.dropped,
        head=None if layout.head is None else tuple(tensors[name].float() for name in layout.head),
        notes=notes,
    )


def save_encoder(
    path: str | os.PathLike,
    encoder: IefEncoder,
    prep: str,
    mean: float,
    std: float,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Write an encoder under the bare keys of the released files (186 tensors at depth 12), float32, atomically.

    The file says its spec, ``prep``, ``mean`` and ``std`` in its metadata, and whatever ``notes`` add (command, seed).
    Raises InputError for weights that are not finite or a file that cannot be written, ValueError for an unknown prep.
    """
    if prep not in PREPS:
        raise ValueError(f"prep must be one of {', '.join(PREPS)}, not {prep}")
    spec, tensors = encoder.spec, {}
    for key, value in encoder.state_dict().items():
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.float()
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"{path}: not written: {key} holds NaN or infinite values, the training has failed")
        tensors[key] = value.numpy()
    said = {
        "format": "pt",
        "size": spec.size,
        "norm2": spec.norm2,
        "heads": str(spec.heads),
        "prep": prep,
        "mean": repr(float(mean)),
        "std": repr(float(std)),
    }
    extra = {str(key): str(value) for key, value in (notes or {}).items()}
    write_safetensors(path, tensors, extra | said)


def shipped_encoder(name: str = "iev-tiny", *, prep: str | None = None) -> LoadedEncoder:
    """The encoder of that name that is installed with cryosuite; InputError that says how to get it when it is not."""
    path = WEIGHTS / f"{name}{ENDING}"
    names = sorted(entry.name.removesuffix(ENDING) for entry in WEIGHTS.glob(f"*{ENDING}")) if WEIGHTS.is_dir() else []
    if not name or Path(name).name != name or not path.is_file():
        have = f"installed: {', '.join(names)}" if names else f"none is installed in {WEIGHTS}"
        raise InputError(
            f"no encoder {printable(name)!r} comes with cryosuite ({have}). Give the path of a .safetensors file (the "
            "released Cryo-IEF weights, or your own of `cryosuite pretrain-iev`), or reinstall cryosuite."
        )
    return load_encoder(path, prep=prep)


def _find_file(path: Path) -> Path:
    """The file itself, or the one in a folder."""
    if not path.is_dir():
        return path
    if (path / f"model{ENDING}").is_file():
        return path / f"model{ENDING}"
    found = sorted(path.glob(f"*{ENDING}"))
    if len(found) == 1:
        return found[0]
    raise InputError(
        f"{path}: is a folder with {len(found)} {ENDING} files and no model{ENDING} among them: give the file itself"
    )


def _mean_std(path: Path, notes: Mapping[str, str], default: tuple[float, float]) -> tuple[float, float]:
    """Mean and standard deviation of u8 / 255 that the file was trained with."""
    if "mean" not in notes and "std" not in notes:
        return default
    try:
        mean, std = float(notes["mean"]), float(notes["std"])
    except (KeyError, ValueError):
        raise InputError(f"{path}: its metadata must give both mean and std as numbers") from None
    if not (0 <= mean <= 1 and 1e-4 < std <= 1):
        raise InputError(f"{path}: its metadata says mean {mean:g}, std {std:g}; expected grey values between 0 and 1")
    return mean, std
