"""Volumes from the weights of a cryoDRGN run: its coordinate network evaluated from its published description.

A point k of the Fourier box (cycles per pixel, |k| <= 1/2) is encoded by sines and cosines, joined with the latent, and
passed through fully connected layers with residual connections. The Fourier decoder gives (re, im) and is defined on
half of the points of the ball only, the others being their conjugates; the Hartley decoder gives re - im at every point
of the box (Zhong et al., Nature Methods 18, 176, 2021; behaviour checked against version 4.3). That of abinit is a
Hartley decoder too, learnt on the ball without its mean; its eval_vol also leaves out the line x = y = 0 and the
outermost shells, which are kept here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosuite.errors import InputError

POINTS = 1 << 15  # evaluated at once
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "leaky_relu": torch.nn.functional.leaky_relu}
LAYER = re.compile(r"main\.(\d+)\.(linear\.)?weight")


class CryodrgnDecoder:
    """The decoder of a run.

    Args:
        state: model_state_dict of weights.N.pkl. config: the run's config. path: for messages.

    Raises:
        InputError: an architecture that is not known here, naming what was met.
    """

    def __init__(self, state: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> None:
        args = config.get("model_args") or {}
        self.path, self.args = path, args
        self.box = _box(config, path)
        self.fourier = args.get("domain", "fourier") == "fourier"
        self.kind = str(args.get("pe_type", "none"))
        self.activation = ACTIVATIONS.get(str(args.get("activation", "relu")))
        if self.activation is None:
            raise self._unknown(f"activation {args.get('activation')!r}")
        self.mean, self.sd = _norm(config, path)
        self.layers = self._layers(state)
        self.ab_initio = any(key.startswith("hypervolume.") for key in state)
        named = (state.get(f"{place}rand_freqs") for place in ("decoder.", "hypervolume.", ""))
        self.random = next((found for found in named if found is not None), None)
        self.zdim = self.layers[0][0].shape[1] - self._encode(torch.zeros(1, 3)).shape[1]
        outputs, wanted = self.layers[-1][0].shape[0], 2 if self.fourier else 1
        if self.zdim < 0 or outputs != wanted:
            raise self._unknown(f"{self.layers[0][0].shape[1]} inputs and {outputs} outputs with {self.kind} features")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.layers = [(weight.to(self.device), bias.to(self.device)) for weight, bias in self.layers]

    def _unknown(self, what: str) -> InputError:
        return InputError(f"{self.path}: a network of cryoDRGN that is not known here ({what})")

    def _layers(self, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each layer, the first and the last plain, those between residual."""
        for prefix in ("decoder.decoder.", "decoder.", "hypervolume.mlp."):
            found = {
                int(match.group(1)): key
                for key in state
                if key.startswith(prefix) and (match := LAYER.fullmatch(key[len(prefix) :]))
            }
            if found:
                break
        if len(found) < 2:
            raise self._unknown("no layers main.N.weight in its decoder")
        keys = [found[number] for number in sorted(found)]
        plain = [".linear." not in key for key in keys]
        layers = [(state[key].float(), state[key.replace("weight", "bias")].float()) for key in keys]
        widths = {weight.shape for weight, _ in layers[1:-1]}
        if not plain[0] or not plain[-1] or any(plain[1:-1]) or len(widths) > 1:
            raise self._unknown("layers that are not residual")
        return layers

    def _encode(self, points: Tensor) -> Tensor:  # (n, 3) cycles per pixel -> (n, e)
        """Sines and cosines of the points; in "gaussian" along random directions, else along x, y and z."""
        half = self.box // 2
        if self.kind == "gaussian":
            if self.random is None:
                raise self._unknown("gaussian features without rand_freqs")
            phase = points @ (self.random.float().to(points.device) * half).T
            return torch.cat([phase.sin(), phase.cos()], 1)
        phase = points[:, :, None] * self._frequencies(half).to(points.device)
        return torch.cat([phase.sin(), phase.cos()], 2).flatten(1)

    def _frequencies(self, half: int) -> Tensor:
        """Frequencies (n,) of the encodings in geometric or linear series."""
        count, whole = int(self.args.get("pe_dim") or half), float(self.box)
        step = torch.arange(count, dtype=torch.float32)
        at = step / max(count - 1, 1)
        series = {
            "geom_ft": lambda: whole * math.pi * (2.0 / whole) ** at,
            "geom_full": lambda: whole * math.pi * (1.0 / whole / math.pi) ** at,
            "geom_lowf": lambda: half * (1.0 / half) ** at,
            "geom_nohighf": lambda: half * (2.0 * math.pi / half) ** at,
            "linear_lowf": lambda: step + 1.0,
        }
        if self.kind not in series:
            raise self._unknown(f"pe_type {self.kind!r}")
        return series[self.kind]()

    @torch.no_grad()
    def volumes(self, z: np.ndarray) -> np.ndarray:
        """Maps (k, D, D, D) float32 at latents (k, zdim), in the grey values and orientation of its eval_vol."""
        z = torch.from_numpy(np.atleast_2d(np.asarray(z, np.float32))).to(self.device)
        if z.shape[1] != self.zdim:
            raise InputError(f"{self.path}: its network takes {self.zdim} latent numbers, not {z.shape[1]}")
        points, inside, other = self._points()
        values = torch.empty(len(z), len(points))
        for start in range(0, len(points), POINTS):
            part = slice(start, start + POINTS)
            values[:, part] = self._values(points[part].to(self.device), other[part].to(self.device), z).cpu()
        maps = []
        for row in values:
            hartley = torch.zeros(self.box**3)
            hartley[inside] = row
            hartley = (hartley * self.sd + self.mean).view((self.box,) * 3)
            transform = torch.fft.fftn(torch.fft.ifftshift(hartley))
            maps.append(torch.fft.fftshift(transform.real - transform.imag) / self.box**3)
        return torch.stack(maps).numpy()

    def _values(self, points: Tensor, other: Tensor, z: Tensor) -> Tensor:  # (n, 3), (n,), (k, zdim) -> (k, n)
        """Hartley values at points; ``other``: points whose conjugate the network is asked for."""
        (first, bias), *inner, (last, last_bias) = self.layers
        encoded = self._encode(points)
        width = encoded.shape[1]
        shared = torch.nn.functional.linear(encoded, first[:, :width], bias)
        found = []
        for shift in z @ first[:, width:].T:
            h = self.activation(shared + shift)
            for weight, own in inner:
                h = self.activation(torch.nn.functional.linear(h, weight, own) + h)
            out = torch.nn.functional.linear(h, last, last_bias)
            found.append(
                torch.where(other, out[:, 0] + out[:, 1], out[:, 0] - out[:, 1]) if self.fourier else out[:, 0]
            )
        return torch.stack(found)

    def _points(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points asked for (n, 3), their flat places in the box, and which are asked at their Friedel mate.

        The Fourier decoder is defined at z < 0, in the plane z = 0 at y < 0, on its line y = 0 at x <= 0.
        """
        axis = torch.arange(-(self.box // 2), self.box // 2, dtype=torch.float32) / self.box
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        points = torch.stack([x, y, z], -1).view(-1, 3)
        if not self.fourier:
            size = (points**2).sum(1)
            asked = (
                (size > 0) & (size <= 0.25) if self.ab_initio else size >= 0
            )  # abinit learns the ball without its mean
            inside = torch.nonzero(asked)[:, 0]
            return points[inside], inside, torch.zeros(len(inside), dtype=torch.bool)
        inside = torch.nonzero((points**2).sum(1) <= 0.25)[:, 0]  # in float32, as there
        points = points[inside]
        x, y, z = points.unbind(1)
        other = ~((z < 0) | ((z == 0) & ((y < 0) | ((y == 0) & (x <= 0)))))
        return torch.where(other[:, None], -points, points), inside, other


def _box(config: Mapping[str, Any], path: Path) -> int:
    """D: their lattice has one point more."""
    lattice = (config.get("lattice_args") or {}).get("D")
    if not isinstance(lattice, (int, np.integer)) or not 8 < lattice < 4097 or lattice % 2 == 0:
        raise InputError(f"{path}: the config's lattice_args.D is {lattice!r}, expected an odd number (box + 1)")
    return int(lattice) - 1


def _norm(config: Mapping[str, Any], path: Path) -> tuple[float, float]:
    """Mean and standard deviation that the network's values are scaled back by."""
    norm = (config.get("dataset_args") or {}).get("norm")
    if norm is None and "data_norm_std" in config:  # abinit
        norm = config.get("data_norm_mean"), config["data_norm_std"]
    try:
        mean, sd = (float(value) for value in norm)
    except (TypeError, ValueError):
        raise InputError(f"{path}: the config's dataset_args.norm is {norm!r}, expected mean and sd") from None
    if not (math.isfinite(mean) and math.isfinite(sd)):
        raise InputError(f"{path}: the config's dataset_args.norm is {norm!r}, expected finite numbers")
    return mean, sd
