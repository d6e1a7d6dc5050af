"""Where a map network's training starts: from a pre-trained encoder, from another task's network, or from nothing."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cryosuite.data.map_weights import TASKS, load_map_encoder, load_map_weights, shipped_map_weights
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.nets.scunet import Encoder, Scunet

SCRATCH = "scratch"
OFF_CENTRE = 0.1  # how gladly the first tail uses its outer taps, which see nothing at the faces of a crop


class Start(NamedTuple):
    """A file, whether only its encoder is taken, the network's kind and spec, the norm and spectrum of its training."""

    path: str
    pretrained: bool
    net: str
    spec: dict[str, Any]
    norm: str | None
    spectrum: str | None = None


def find_start(init: str | None, weights: str | None) -> Start | None:
    """What ``--init`` or ``--weights`` mean: a file, the folder of a run, "scratch", or (weights) a task's own name.

    Returns None for a start from nothing. Raises InputError for both at once, or a file that is no such thing.
    """
    if weights is not None:
        if init not in (None, SCRATCH):
            raise InputError("--init and --weights: give one of them, an encoder or a whole network to start from")
        path = (
            shipped_map_weights(weights) if weights in TASKS else _in_run(Path(weights), RunDir(Path(weights)).network)
        )
        found = load_map_weights(path)
        return Start(str(path.absolute()), False, _kind(found.net), asdict(found.net.spec), found.norm, found.spectrum)
    if init in (None, SCRATCH):
        return None
    path = _in_run(Path(init), RunDir(Path(init)).encoder)
    encoder, notes = load_map_encoder(path)
    return Start(str(path.absolute()), True, _kind(encoder), asdict(encoder.spec), notes.get("norm"))


def fill(net: nn.Module, path: str, pretrained: bool) -> None:
    """Put the weights of a file into a network of the same spec: its encoder, or all of it. Nothing may be left over.

    Raises InputError for a file that is missing or no longer fits.
    """
    part, other = (net.encoder, load_map_encoder(path)[0]) if pretrained else (net, load_map_weights(path).net)
    try:
        part.load_state_dict(other.state_dict(), strict=True)
    except RuntimeError:
        raise InputError(f"{path}: holds another network than the run was started with") from None


@torch.no_grad()
def start_as_identity(net: nn.Module, ridge: float = 1e-6) -> None:
    """Let a SCUNet with a new decoder begin by answering with the map it is given, whatever its encoder holds.

    The finest stage of the decoder begins at zero, so that what reaches the tail is the head's output x * H + b alone;
    the tail T is the least-squares solution of T * H = 1 (125 equations for 27 d numbers). All of it is trained from
    there on. A map ViT has no way around its tokens and stays as it is.
    """
    if not isinstance(net, Scunet):
        return
    decoder, head = net.decoder, net.encoder.head
    nn.init.zeros_(decoder.ups[0].weight)
    nn.init.zeros_(decoder.ups[0].bias)
    for block in decoder.stages[0]:
        nn.init.zeros_(block.mix.weight)
        nn.init.zeros_(block.mix.bias)
    kernel = head.weight[:, 0].double()  # (d, 3, 3, 3)
    rows = kernel.new_zeros(len(kernel), 3, 3, 3, 5, 5, 5)
    for j in itertools.product(range(3), repeat=3):
        rows[(slice(None), *j, *(slice(i, i + 3) for i in j))] = kernel
    near = torch.full((1, 3, 3, 3, 1), OFF_CENTRE, dtype=kernel.dtype)
    near[:, 1, 1, 1] = 1.0
    a = (rows.flatten(4) * near).flatten(0, 3)  # (27 d, 125)
    wanted = a.new_zeros(125)
    wanted[62] = 1  # the middle of 5^3
    gram = a.T @ a
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(125, dtype=a.dtype)
    taps = (a @ torch.linalg.solve(gram, wanted)).view(-1, 3, 3, 3, 1).mul(near).view(1, -1, 3, 3, 3)
    decoder.tail.weight.copy_(taps)
    decoder.tail.bias.fill_(-float((taps.sum((2, 3, 4)) * head.bias.double()).sum()))


def _in_run(path: Path, inside: Path) -> Path:
    """The file itself, or what a training left in a folder."""
    if path.is_dir():
        if not inside.is_file():
            raise InputError(f"{path}: holds no {inside.name}: expected a file, or the folder of a finished training")
        return inside
    return path


def _kind(net: nn.Module) -> str:
    return "scunet" if isinstance(net, Scunet | Encoder) else "vit"
