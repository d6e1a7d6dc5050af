"""What lies in a file of encoder weights and how it becomes an ``IefEncoder``: names, shapes, values, strictly.

Released files differ in what they wrap around the encoder: a prefix, a momentum copy, heads. One prefix is stripped,
the rest is dropped and listed; then every tensor of the backbone must be there in its shape. Nothing is ever left at
its random start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cryosuite.errors import InputError
from cryosuite.nets.ief import SPECS, IefEncoder, IefSpec

# of several, the first that has a class token is taken
PREFIXES = ("base_encoder.", "module.base_encoder.", "vit_backbone.", "", "module.")
FINE_TUNED = "vit_backbone."  # CryoDECO: its final norm lies in its head
BESIDE = ("head", "projector", "predictor", "momentum_encoder")  # parts of the training that no feature needs
PATCH_OFFSET = 1  # the class token's row of the positions
MAX_BLOCKS, MAX_WIDTH = 1000, 1 << 16  # no encoder comes near; a file that claims more lies
V1_MEAN_STD = (0.53786290141223, 0.11803331075935841)
V15_MEAN_STD = (0.549995056189533, 0.11784453744259035)
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """How a file's tensors map to the encoder's: spec, state key -> name in the file, names that are not used."""

    spec: IefSpec
    prefix: str
    names: dict[str, str]
    dropped: list[str]
    head: tuple[str, str] | None = None  # weight and bias of a fine-tuned head


@dataclass
class LoadedEncoder:
    """An encoder in eval mode and how its images are prepared.

    prep: "ief" or "robust" (data.encoder_images). mean, std: of u8 / 255. source: in words, where it comes from.
    dropped: names in the file that were not used. head: weight (z, C) and bias (z,) of a fine-tuned CryoDECO head.
    notes: metadata of our own files: command, seed, ...
    """

    encoder: IefEncoder
    spec: IefSpec
    prep: str
    mean: float
    std: float
    source: str
    dropped: list[str] = field(default_factory=list)
    head: tuple[Tensor, Tensor] | None = None
    notes: dict[str, str] = field(default_factory=dict)


def find_layout(shapes: Shapes, notes: Mapping[str, str], path: Path | str) -> Layout:
    """Match the names and shapes of a file with an encoder.

    Raises InputError for a file without an encoder, of an unknown size, with a LayerNorm where Cryo-IEF has a batch
    norm, or with tensors missing, of the wrong shape, or unknown (the first five are named).
    """
    prefix = next((prefix for prefix in PREFIXES if prefix + "cls_token" in shapes), None)
    if prefix is None:
        raise InputError(
            f"{path}: holds no Cryo-IEF encoder: no cls_token under any of the prefixes "
            f"{', '.join(prefix or '(none)' for prefix in PREFIXES)}; it begins with {_few(list(shapes), 3)}"
        )
    inside = {name[len(prefix) :]: name for name in shapes if name.startswith(prefix)}
    head = None
    if prefix == FINE_TUNED:
        inside, head = _unwrap_head(inside)
    kept = {key: name for key, name in inside.items() if not key.startswith(BESIDE)}
    spec = _find_spec({key: tuple(shapes[name]) for key, name in kept.items()}, notes, path)
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in IefEncoder(spec).state_dict().items()}
    _require_match({key: tuple(shapes[name]) for key, name in kept.items()}, wanted, path)
    used = {kept[key] for key in wanted} | set(head or ())
    return Layout(spec, prefix, {key: kept[key] for key in wanted}, [name for name in shapes if name not in used], head)


def build_encoder(layout: Layout, tensors: Mapping[str, Tensor], path: Path | str) -> IefEncoder:
    """The encoder of a layout, filled from the file's tensors (float32), in eval mode.

    Raises InputError for numbers that are not finite, a negative variance, or whole numbers where weights belong.
    """
    state: dict[str, Tensor] = {}
    for key, name in layout.names.items():
        value = tensors[name]
        if key.endswith("num_batches_tracked"):
            if value.is_floating_point() or int(value) < 0:
                raise InputError(f"{path}: {name} must be a count")
            state[key] = value.to(torch.int64)
            continue
        if not value.is_floating_point():
            raise InputError(f"{path}: {name} holds {str(value.dtype)[6:]}, expected floating point numbers")
        value = value.to(torch.float32)
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{path}: {name} holds NaN or infinite values: damaged, or of a training that failed")
        if key.endswith("running_var") and bool((value < 0).any()):
            raise InputError(f"{path}: {name} holds negative variances: the file is damaged")
        state[key] = value
    with torch.device("meta"):
        encoder = IefEncoder(layout.spec)
    encoder.load_state_dict(state, strict=True, assign=True)
    encoder.pos_embed.requires_grad_(False)
    return encoder.eval()


def default_mean_std(spec: IefSpec) -> tuple[float, float]:
    """The published constants: of v1 for the base size (its ranker), of v1.5 for all others."""
    return V1_MEAN_STD if spec.dim == SPECS["vit_base"].dim else V15_MEAN_STD


def _unwrap_head(inside: dict[str, str]) -> tuple[dict[str, str], tuple[str, str] | None]:
    """A fine-tuned encoder of CryoDECO: the norm of its head is the final norm."""
    inside = dict(inside)
    for part in ("weight", "bias"):
        if f"head.norm.{part}" in inside and f"norm.{part}" not in inside:
            inside[f"norm.{part}"] = inside.pop(f"head.norm.{part}")
    linear = [inside.get(f"head.mlp_classifier.0.{part}") for part in ("weight", "bias")]
    return inside, (linear[0], linear[1]) if all(linear) else None


def _find_spec(shapes: Shapes, notes: Mapping[str, str], path: Path | str) -> IefSpec:
    """The encoder's spec from the shapes; heads and the name from our own metadata or the table of sizes."""
    try:
        _, _, dim = shapes["cls_token"]
        channels, patch = shapes["patch_embed.proj.weight"][1:3]
        tokens = shapes["pos_embed"][1]
    except (KeyError, ValueError, IndexError):
        raise InputError(
            f"{path}: holds no Cryo-IEF encoder: cls_token, pos_embed or patch_embed.proj.weight is missing or not of "
            "three, three and four dimensions"
        ) from None
    numbers = {int(parts[1]) for parts in (key.split(".") for key in shapes) if _is_block(parts)}
    depth, grid = max(numbers, default=-1) + 1, round(max(tokens - PATCH_OFFSET, 0) ** 0.5)
    known = next((spec for spec in SPECS.values() if spec.dim == dim), None)
    heads = _number(notes.get("heads"), known.heads if known else dim // 32)
    bounded = 0 < depth <= MAX_BLOCKS and dim <= MAX_WIDTH and patch <= MAX_WIDTH and heads >= 1
    if channels != 1 or grid**2 != tokens - PATCH_OFFSET or not bounded:
        raise InputError(
            f"{path}: no encoder of particle images: {channels} channels, {tokens} positions, {depth} blocks; "
            "Cryo-IEF has one channel, a square of positions and one for the class token"
        )
    norm2 = _find_norm(shapes, notes, depth, path)
    name = notes.get("size") or (known.size if known and known.depth == depth else f"vit_{dim}x{depth}")
    try:
        return IefSpec(name, dim, depth, heads, patch, grid * patch, norm2, channels)
    except (ValueError, ZeroDivisionError):
        raise InputError(
            f"{path}: an encoder of width {dim} and {heads} heads is of no known size; known are "
            + ", ".join(f"{spec.size} ({spec.dim})" for spec in SPECS.values())
        ) from None


def _is_block(parts: list[str]) -> bool:
    return len(parts) > 2 and parts[0] == "blocks" and parts[1].isascii() and parts[1].isdigit() and len(parts[1]) < 5


def _find_norm(shapes: Shapes, notes: Mapping[str, str], depth: int, path: Path | str) -> str:
    """The kind of norm2; a LayerNorm is only believed of a file that says so itself."""
    statistics = [f"blocks.{number}.norm2.running_mean" in shapes for number in range(depth)]
    if notes.get("norm2") == "ln" and not any(statistics):
        return "ln"
    if not any(statistics):
        raise InputError(
            f"{path}: this is a LayerNorm ViT, not Cryo-IEF: its blocks have no norm2.running_mean, the running "
            "statistics of a batch norm"
        )
    return "bn"


def _require_match(found: Shapes, wanted: Shapes, path: Path | str) -> None:
    """Raise InputError unless the same names come with the same shapes."""
    missing = [key for key in wanted if key not in found]
    unknown = [key for key in found if key not in wanted]
    wrong = [
        f"{key} is {tuple(found[key])}, expected {wanted[key]}"
        for key in wanted
        if key in found and tuple(found[key]) != wanted[key]
    ]
    problems = [f"missing {key}" for key in missing] + wrong + [f"unknown {key}" for key in unknown]
    if problems:
        matching = len(wanted) - len(missing) - len(wrong)
        raise InputError(
            f"{path}: does not fit the encoder: {matching} of {len(wanted)} tensors match; {_few(problems, 5, '; ')}"
        )


def _few(names: list[str], shown: int, between: str = ", ") -> str:
    text = "".join(c if c.isprintable() else "?" for c in between.join(name[:120] for name in names[:shown]))
    text = text or "nothing"
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"


def _number(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 6 else default
