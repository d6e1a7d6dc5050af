"""Poses, classes and maps of particles of which nothing but the CTF is known, in closed form, without a network.

1. Starts. From maps of random orientations, annealed expectation maximisation over a whole grid of orientations, at low
   frequency; several times, and of the maps of all starts those are kept that explain the images best
   (`abinitio_starts`, `abinitio_em`).
2. Rounds. Every image is searched for against every map (`kernels.pose_search`), the particles of each class are
   backprojected with their best poses, and the radius grows from round to round. In the last rounds a particle stays in
   its class and near its poses.

The work is cut into units of a second or so: ``advance`` does one, ``state_dict`` holds everything in between, so a
driver can save, stop and go on exactly (methods.deco_start).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.loader import BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import measure_spectra, whitened
from cryosuite.errors import InputError
from cryosuite.kernels import fourier, pose_search
from cryosuite.kernels.pose_search import Candidates, SearchOptions, VolumeSource
from cryosuite.reconstruct.abinitio_starts import AbInitioOptions, Starts
from cryosuite.reconstruct.backproject import reconstruct_classes

CHUNK = 256  # images searched for at a time
ROOM = 8  # pixels that a map's box is larger than twice its radius


@dataclass
class Found:
    """What was found: rotation (N, 3, 3), shift (N, 2) fraction of the box, label (N,), score and margin (N,).

    score: gain in log-likelihood over an empty image. margin: of the best pose over the best one elsewhere.
    """

    rotation: np.ndarray
    shift: np.ndarray
    label: np.ndarray
    score: np.ndarray
    margin: np.ndarray


class AbInitio:
    """The search; ``advance`` until ``done``, then ``found``.

    Args:
        particles: with CTF and noise; poses are not looked at.
        log: takes a line for people and a record of numbers per step.
    """

    def __init__(
        self,
        particles: ParticleSet,
        options: AbInitioOptions,
        device: torch.device | str = "cpu",
        log: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        if len(particles) < 50 * options.classes:
            raise InputError(
                f"{particles.path}: {len(particles)} particles are too few to find {options.classes} maps without "
                f"poses: at least {50 * options.classes} are needed"
            )
        self.particles, self.options, self.device = particles, options, torch.device(device)
        self.log = log or (lambda text, record: None)
        self.box = particles.box_size
        spectra = measure_spectra(particles, True)
        self.noise_amplitude, self.signal = spectra.noise.sqrt(), spectra.signal
        self.mask = fourier.window_mask(self.box)
        self.loader = BatchLoader(particles, CHUNK, shuffle=False, prefetch=0)
        self.starts = Starts(
            self._white, len(particles), self.signal, self.box, options, self.device, self._note
        )  # fmt: skip
        rounds = [(min(r, self.box // 2), everywhere) for r, everywhere in options.rounds]
        self.rounds = [one for n, one in enumerate(rounds) if n == 0 or one != rounds[n - 1] or not one[1]]
        self.total = self.starts.units + len(self.rounds) * self._chunks
        self._source: tuple[int, VolumeSource, list[pose_search.Prepared] | None] | None = None
        self.state: dict[str, Any] = {"round": 0, "chunk": 0, "volumes": None, "poses": None, "history": []}

    def _note(self, text: str, record: dict[str, Any]) -> None:
        self.state["history"].append(record)
        self.log(text, record)

    # --- the sequence ------------------------------------------------------------------------------------------------

    @property
    def _chunks(self) -> int:
        return math.ceil(len(self.particles) / CHUNK)

    @property
    def position(self) -> int:
        """Units done, of ``total``."""
        return self.starts.position + self.state["round"] * self._chunks + self.state["chunk"]

    @property
    def done(self) -> bool:
        """Whether everything is found."""
        return self.starts.done and self.state["round"] >= len(self.rounds)

    def advance(self) -> None:
        """Do the next unit of work."""
        if not self.starts.done:
            self.starts.advance()
            if self.starts.done:
                self.state["volumes"] = self.starts.state["volumes"]
        elif not self.done:
            self._search_chunk()

    def state_dict(self) -> dict[str, Any]:
        """Everything between two units, as tensors and plain values."""
        return {**self.state, "starts": dict(self.starts.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.state = {name: value for name, value in state.items() if name != "starts"}
        self.starts.state = dict(state["starts"])
        self._source = None

    @property
    def found(self) -> Found:
        """The poses and classes of all particles."""
        poses = self.state["poses"]
        rows = torch.arange(len(self.particles))
        best = Candidates(poses["rotation"], poses["shift"], poses["score"])
        return Found(
            best.rotation[rows, 0].numpy(), best.shift[rows, 0].numpy(), poses["label"].numpy(),
            best.score[:, 0].numpy(), pose_search.margin(best).numpy(),
        )  # fmt: skip

    # --- rounds ------------------------------------------------------------------------------------------------------

    def _white(self, rows: np.ndarray, r_max: int) -> tuple[Tensor, Tensor]:
        """Whitened coefficients and CTF (b, P) of some images, not shifted, on the device."""
        batch = replace(self.loader.batch(rows), shift=None)
        target = whitened(
            batch, fourier.half_disc(self.box, r_max), self.noise_amplitude, self.particles.ctf_premultiplied, self.mask
        )
        return target.values.to(self.device), target.ctf.to(self.device)

    def _search_options(self, radius: int, everywhere: bool) -> SearchOptions:
        o = self.options
        base = {"shift_extent": o.shift_extent, "keep": o.keep, "r_max": radius}
        if everywhere:
            return SearchOptions(r_min=min(8, max(4, radius - 2)), levels=2 if radius < 16 else 3, shift_grid=8, **base)
        return SearchOptions(r_min=min(radius, max(8, radius // 2)), levels=4, base="none", **base)

    def _sources(self, options: SearchOptions) -> tuple[VolumeSource, list[pose_search.Prepared | None]]:
        """The maps of this round as sources of slices, made once per round."""
        number = self.state["round"]
        if self._source is None or self._source[0] != number:
            volumes = self.state["volumes"].to(self.device)
            source = VolumeSource(volumes, r_max=options.r_max)
            prepared = None if options.base == "none" else [
                pose_search.prepare(source, options, torch.tensor([k], device=self.device))
                for k in range(len(volumes))
            ]  # fmt: skip
            self._source = number, source, prepared
        return self._source[1], self._source[2]

    def _search_chunk(self) -> None:
        """Search for the next images; after the last one make the maps of the next round."""
        s, radius, everywhere = self.state, *self.rounds[self.state["round"]]
        if s["poses"] is None:
            s["poses"] = self._no_poses()
        options = self._search_options(radius, everywhere)
        source, prepared = self._sources(options)
        scale = source.box_size
        rows = np.arange(s["chunk"] * CHUNK, min((s["chunk"] + 1) * CHUNK, len(self.particles)))
        values, transfer = self._white(rows, radius)
        at = torch.from_numpy(rows)
        p = s["poses"]
        if everywhere:
            found, label = self._best_class(source, prepared, values, transfer, options)
        else:
            label = p["label"][at]
            carried = Candidates(p["rotation"][at], p["shift"][at] * scale, p["score"][at])
            index = label.to(self.device)
            found = pose_search.search(source, values, transfer, index, options, carried)
        p["moved"][at] = _angle(p["rotation"][at, 0], found.rotation[:, 0].cpu())
        p["rotation"][at], p["score"][at] = found.rotation.cpu(), found.score.cpu()
        p["shift"][at], p["label"][at] = found.shift.cpu() / scale, label.cpu()
        s["chunk"] += 1
        if s["chunk"] == self._chunks:
            self._end_round(radius)

    def _best_class(
        self, source: VolumeSource, prepared: list, values: Tensor, transfer: Tensor, options: SearchOptions
    ) -> tuple[Candidates, Tensor]:
        """Poses in the class that explains each image best, and that class."""
        best, label = None, torch.zeros(len(values), dtype=torch.int64, device=self.device)
        for k, ready in enumerate(prepared):
            index = torch.full((len(values),), k, dtype=torch.int64, device=self.device)
            found = pose_search.search(source, values, transfer, index, options, prepared=ready)
            if best is None:
                best = found
                continue
            better = found.score[:, 0] > best.score[:, 0]
            label = torch.where(better, k, label)
            best = Candidates(*(
                torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(vars(found).values(), vars(best).values(), strict=True)
            ))  # fmt: skip
        return best, label

    def _no_poses(self) -> dict[str, Tensor]:
        n, keep = len(self.particles), self.options.keep
        eye = torch.eye(3).expand(n, keep, 3, 3).clone()
        return {"rotation": eye, "shift": torch.zeros(n, keep, 2), "score": torch.zeros(n, keep),
                "label": torch.zeros(n, dtype=torch.int64), "moved": torch.zeros(n)}  # fmt: skip

    def _end_round(self, radius: int) -> None:
        """Backproject every class with the poses of this round."""
        s, o = self.state, self.options
        p = s["poses"]
        following = self.rounds[s["round"] + 1][0] if s["round"] + 1 < len(self.rounds) else radius
        reach = min(self.box // 2, max(radius, following))
        size = min(self.box, 2 * reach + ROOM)
        posed = replace(self.particles, rotation=p["rotation"][:, 0].numpy(), shift=p["shift"][:, 0].numpy())
        label = p["label"].numpy()
        maps = reconstruct_classes(posed, label, regularise="fsc", r_max=reach, map_box=size)
        empty = torch.zeros(size, size, size)
        scale = (self.box / size) ** 3  # coefficients, not grey values, are those of the particles
        s["volumes"] = torch.stack([maps[k].map * scale if k in maps else empty for k in range(o.classes)])
        record = {
            "stage": "round",
            "round": s["round"] + 1,
            "radius": radius,
            "score": float(p["score"][:, 0].mean()),
            "moved_deg": float(p["moved"].median()),
            "sizes": np.bincount(label, minlength=o.classes).tolist(),
        }
        s["round"], s["chunk"] = s["round"] + 1, 0
        self._note(f"round {s['round']}: radius {radius}, {record['moved_deg']:.1f} degrees moved", record)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between rotations (n, 3, 3)."""
    cosine = (((a * b).sum((-1, -2)) - 1) / 2).clamp(-1, 1)
    return torch.rad2deg(torch.acos(cosine))
