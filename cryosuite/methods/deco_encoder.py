"""Which encoder `deco-classify` begins with: weights of the package, of a file, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from cryosuite.data.encoder_weights import load_encoder, shipped_encoder
from cryosuite.errors import InputError, notice
from cryosuite.methods.deco_options import RANDOM, DecoOptions
from cryosuite.nets.ief import SPECS, IefEncoder, IefSpec
from cryosuite.nets.ief_weights import LoadedEncoder

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet

SHIPPED = ("iev-tiny", "iev-small")
# a quarter of vit_tiny's tokens: enough for small boxes, and trained from nothing within minutes on a CPU
MICRO = IefSpec("micro", dim=128, depth=4, heads=4, patch=14, image_size=56, norm2="ln")
RANDOM_PREP = "robust"


def open_encoder(options: DecoOptions, particles: ParticleSet) -> LoadedEncoder:
    """The encoder of the options, in eval mode; a random one only where that is asked for, and said.

    Raises:
        InputError: weights that are missing or do not fit; a size that is not known.
    """
    if options.encoder == RANDOM:
        return random_encoder(options.encoder_size)
    if options.encoder in SHIPPED:
        return shipped_encoder(options.encoder)
    return load_encoder(Path(options.encoder))


def random_encoder(size: str) -> LoadedEncoder:
    """An untrained encoder. Its mean and std are placeholders: they are measured on the images."""
    specs = {"micro": MICRO} | SPECS
    if size not in specs:
        raise InputError(f"--encoder-size {size}: expected one of {', '.join(specs)}")
    spec = replace(specs[size], norm2="ln")  # no statistics of a batch norm exist yet
    notice(
        "--encoder random: the encoder begins untrained and learns from these particles alone (--encoder iev-tiny, or "
        "a file of weights, gives it a start; on a CPU that costs more time than it saves)"
    )
    return LoadedEncoder(IefEncoder(spec).eval(), spec, RANDOM_PREP, 0.5, 0.15, "random")


def encoder_of_state(state: Mapping[str, Tensor]) -> LoadedEncoder:
    """An encoder of the shape of the one in a model's state, to be filled from it."""
    names = {name.partition(".")[2]: value for name, value in state.items() if name.startswith("encoder.")}
    dim, tokens = names["cls_token"].shape[-1], names["pos_embed"].shape[1] - 1
    depth = len({name.split(".")[1] for name in names if name.startswith("blocks.")})
    norm2 = "bn" if "blocks.0.norm2.running_mean" in names else "ln"
    patch = names["patch_embed.proj.weight"].shape[-1]
    # the number of heads is in no tensor; all sizes that exist are told apart by width and depth
    known = {(spec.dim, spec.depth): spec for spec in (*SPECS.values(), MICRO)}
    heads = known[dim, depth].heads if (dim, depth) in known else max(1, dim // 32)
    spec = IefSpec("stored", dim, depth, heads, patch, patch * round(tokens**0.5), norm2)
    return LoadedEncoder(IefEncoder(spec), spec, RANDOM_PREP, 0.5, 0.15, "a run")
