"""The layout of the released CryoFastAR checkpoint and how it becomes our ``Multiview(released())``, strictly.

The layout is generated from the published sizes: 896 tensors, 533,362,176 values. Nothing is guessed and nothing is
left at its random start: a file that lacks a tensor, has one more, or one of another shape is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cryosuite.errors import InputError
from cryosuite.nets.multiview_spec import NECK, VIEW_TABLE, MultiviewSpec, released

__all__ = ["adapt_released", "released_table"]

Shape = tuple[int, ...]
UNUSED = ("mask_token", "pos_patch_embed.proj.weight", "pos_patch_embed.proj.bias")  # in the file, never used
SHOWN = 5  # names of each list in an error


def released_table(spec: MultiviewSpec | None = None) -> dict[str, Shape]:
    """Names and shapes of the released file; ``spec`` gives other sizes of the same layout."""
    spec = released() if spec is None else spec
    e, d, p = spec.enc_dim, spec.dec_dim, spec.patch
    table: dict[str, Shape] = {"mask_token": (1, 1, d), "pos_patch_embed.proj.weight": (e, 3, p, p)}
    table |= {"pos_patch_embed.proj.bias": (e,), "patch_embed.proj.weight": (e, 1, p, p), "patch_embed.proj.bias": (e,)}
    for i in range(spec.enc_depth):
        table |= _norms(f"enc_blocks.{i}.", ("norm1", "norm2"), e) | _attention(f"enc_blocks.{i}.", e)
    table |= _norms("", ("enc_norm",), e) | _linear("decoder_embed", d, e) | _norms("", ("dec_norm",), d)
    for stem in ("dec_blocks.", "dec_blocks2."):
        for i in range(spec.dec_depth):
            table |= _norms(f"{stem}{i}.", ("norm1", "norm2", "norm3", "norm_y"), d) | _attention(f"{stem}{i}.", d)
            for name in ("projq", "projk", "projv", "proj"):
                table |= _linear(f"{stem}{i}.cross_attn.{name}", d, d)
    table["segment_embeddings.weight"] = (VIEW_TABLE, d)
    for stem in ("downstream_heads.0.", "downstream_heads.1."):
        table |= {f"{stem}neck.0.weight": (NECK, d, 1, 1), f"{stem}neck.2.weight": (NECK, NECK, 3, 3)}
        table |= _norms(stem, ("neck.1", "neck.3"), NECK)
        table |= _linear(f"{stem}proj", 4 * p * p, NECK) | _linear(f"{stem}proj_fvalue", p * p, NECK)
    return table


def adapt_released(
    state: Mapping[str, Tensor], source: object = "checkpoint", spec: MultiviewSpec | None = None
) -> dict[str, Tensor]:
    """The state of ``Multiview(spec)`` from a released state dict (the value under "model" of the file).

    A prefix "module." is stripped; View Update blocks that are absent altogether are copied from View Integration, as
    the release itself does when it loads. The three tensors that are never used are required, then dropped.

    Args:
        source: what the error message calls the state, a path for example.

    Raises InputError that counts missing, unexpected and mis-shaped tensors and names the first five of each.
    """
    found = {name.removeprefix("module."): value for name, value in state.items()}
    if not any(name.startswith("dec_blocks2.") for name in found):
        blocks = {name: value for name, value in found.items() if name.startswith("dec_blocks.")}
        found |= {name.replace("dec_blocks.", "dec_blocks2.", 1): value for name, value in blocks.items()}
    table = released_table(spec)
    require_match({name: tuple(value.shape) for name, value in found.items()}, table, source, "the released CryoFastAR")
    return {name: found[name] for name in table if name not in UNUSED}


def require_match(found: Mapping[str, Shape], wanted: Mapping[str, Shape], source: object, what: str) -> None:
    """Raise InputError unless the same names come with the same shapes."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    wrong = [
        f"{name} is {found[name]}, expected {wanted[name]}"
        for name in wanted
        if name in found and tuple(found[name]) != tuple(wanted[name])
    ]
    lists = [("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)]
    problems = [f"{len(names)} {kind}: {_few(names)}" for kind, names in lists if names]
    if problems:
        fitting = len(wanted) - len(missing) - len(wrong)
        raise InputError(
            f"{source}: these are not the weights of {what}: {fitting} of {len(wanted)} tensors fit; "
            + "; ".join(problems)
        )


def _few(names: list[str]) -> str:
    text = ", ".join("".join(c if c.isprintable() else "?" for c in name[:120]) for name in names[:SHOWN])
    return text if len(names) <= SHOWN else f"{text} and {len(names) - SHOWN} more"


def _linear(name: str, out: int, into: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norms(stem: str, names: tuple[str, ...], dim: int) -> dict[str, Shape]:
    return {f"{stem}{name}.{part}": (dim,) for name in names for part in ("weight", "bias")}


def _attention(stem: str, dim: int) -> dict[str, Shape]:
    table = _linear(f"{stem}attn.qkv", 3 * dim, dim) | _linear(f"{stem}attn.proj", dim, dim)
    return table | _linear(f"{stem}mlp.fc1", 4 * dim, dim) | _linear(f"{stem}mlp.fc2", dim, 4 * dim)
