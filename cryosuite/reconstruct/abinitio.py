"""Poses, classes and maps of particles of which nothing but the CTF is known, in closed form, without a network.

1. Starts. From maps of random orientations, annealed expectation maximisation over a whole grid of orientations, at low
   frequency (`abinitio_em`); several times, and the start under which the images are most likely is kept.
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
from cryosuite.kernels.rotations import random_rotations
from cryosuite.kernels.slices import Accumulator
from cryosuite.reconstruct import abinitio_em as em
from cryosuite.reconstruct.backproject import reconstruct_classes

POOL = 10000  # images the starts are made from
JUDGED = 1000  # images by which starts are compared
CHUNK = 256  # images searched for at a time
ROOM = 8  # pixels that a map's box is larger than twice its radius
FIRST = 300  # images with random poses per first map


@dataclass(frozen=True)
class AbInitioOptions:
    """How the search from nothing proceeds. Radii in Fourier pixels.

    classes: maps. starts, iterations, batch: of the expectation maximisation; batch is per class. radius: its first
    and last. heat: first temperature as a fraction of an image's signal energy. rate: weight of a batch in the
    running sums. shift_extent: largest shift, fraction of the box. rounds: (radius, global search) of each round.
    keep: poses kept per image.
    """

    classes: int = 1
    starts: int = 3
    iterations: int = 50
    batch: int = 300
    radius: tuple[int, int] = (4, 7)
    heat: float = 0.03
    rate: float = 0.3
    cold_after: float = 0.9
    balance: float = 0.5
    shift_extent: float = 0.1
    rounds: tuple[tuple[int, bool], ...] = (
        (7, True), (12, True), (18, True), (24, True), (32, False), (32, False), (32, False),
    )  # fmt: skip
    keep: int = 4
    seed: int = 0


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
        low, high = (min(r, self.box // 2) for r in options.radius)
        self.low, self.high = low, high
        self.small = 2 * high + ROOM + (2 * high + ROOM) % 2
        rounds = [(min(r, self.box // 2), everywhere) for r, everywhere in options.rounds]
        self.rounds = [one for n, one in enumerate(rounds) if n == 0 or one != rounds[n - 1] or not one[1]]
        self.total = options.starts * options.iterations + len(self.rounds) * self._chunks
        self._pool: tuple[Tensor, Tensor] | None = None
        self._source: tuple[int, VolumeSource, pose_search.Prepared | None] | None = None
        self.state: dict[str, Any] = {"start": 0, "iteration": 0, "sums": None, "bias": torch.zeros(options.classes),
                                      "best": None, "evidence": [], "round": 0, "chunk": 0, "volumes": None,
                                      "poses": None, "history": []}  # fmt: skip

    # --- the sequence ------------------------------------------------------------------------------------------------

    @property
    def _chunks(self) -> int:
        return math.ceil(len(self.particles) / CHUNK)

    @property
    def position(self) -> int:
        """Units done, of ``total``."""
        s = self.state
        if s["start"] < self.options.starts:
            return s["start"] * self.options.iterations + s["iteration"]
        return self.options.starts * self.options.iterations + s["round"] * self._chunks + s["chunk"]

    @property
    def done(self) -> bool:
        """Whether everything is found."""
        return self.state["start"] >= self.options.starts and self.state["round"] >= len(self.rounds)

    def advance(self) -> None:
        """Do the next unit of work."""
        if self.state["start"] < self.options.starts:
            self._iterate()
        elif not self.done:
            self._search_chunk()

    def state_dict(self) -> dict[str, Any]:
        """Everything between two units, as tensors and plain values."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.state = dict(state)

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

    # --- starts ------------------------------------------------------------------------------------------------------

    def _white(self, rows: np.ndarray, r_max: int) -> tuple[Tensor, Tensor]:
        """Whitened coefficients and CTF (b, P) of some images, not shifted, on the device."""
        batch = replace(self.loader.batch(rows), shift=None)
        target = whitened(
            batch, fourier.half_disc(self.box, r_max), self.noise_amplitude, self.particles.ctf_premultiplied, self.mask
        )
        return target.values.to(self.device), target.ctf.to(self.device)

    @property
    def pool(self) -> tuple[Tensor, Tensor]:
        """Coefficients of the images that the starts are made from."""
        if self._pool is None:
            count = len(self.particles)
            chosen = np.random.default_rng([self.options.seed, 7]).permutation(count)[: min(count, POOL)]
            parts = [self._white(rows, self.high) for rows in np.array_split(chosen, math.ceil(len(chosen) / CHUNK))]
            self._pool = torch.cat([v for v, _ in parts]), torch.cat([c for _, c in parts])
        return self._pool

    def _first_sums(self, generator: np.random.Generator) -> list[Accumulator]:
        """Sums of some images at random orientations, as heavy as a batch."""
        o = self.options
        values, transfer = self.pool
        disc = fourier.half_disc(self.small, self.low)
        n = len(disc)
        chosen = generator.permutation(len(values))[: FIRST * o.classes]
        torch_generator = torch.Generator().manual_seed(int(generator.integers(2**31)))
        sums = []
        for rows in np.array_split(chosen, o.classes):
            rotation = random_rotations(len(rows), generator=torch_generator).to(self.device)
            acc = em.empty(self.small)
            em.insert_slices(acc, values[rows, :n] * transfer[rows, :n], transfer[rows, :n].square(), rotation, disc)
            acc.data *= o.batch / len(rows)
            sums.append(acc)
        return sums

    def _iterate(self) -> None:
        """One iteration of expectation maximisation of the present start."""
        o, s = self.options, self.state
        values, transfer = self.pool
        generator = np.random.default_rng([o.seed, 1, s["start"], s["iteration"]])
        if s["iteration"] == 0:
            s["bias"] = torch.zeros(o.classes)
            sums = self._first_sums(generator)
        else:
            sums = [Accumulator(data.clone(), self.small, 2) for data in s["sums"]]
        done = s["iteration"] / max(o.iterations - 1, 1)
        r = round(self.low + (self.high - self.low) * min(1.0, done / 0.8))
        disc = fourier.half_disc(self.small, r)
        n = len(disc)
        energy = float((transfer[:, :n].square() * self.signal.to(self.device)[disc.shell]).sum(1).mean())
        temperature = max(energy * o.heat, 1.0) ** (1 - min(1.0, done / o.cold_after))
        grid = em.make_grid(2, 0.8 * o.shift_extent, 3 if r <= 5 else 4, self.device)
        volumes = torch.stack([em.wiener(acc, self.signal[: self.small // 2 + 1]) for acc in sums])
        slices = em.grid_slices(volumes, grid, disc)
        rows = torch.from_numpy(generator.permutation(len(values))[: o.batch * o.classes])
        batch = em.expect(slices, values[rows, :n], transfer[rows, :n], grid, disc, temperature, s["bias"])
        share = batch.share.mean(0).cpu()
        for k, acc in enumerate(sums):
            acc.data *= 1 - o.rate
            em.add_sums(acc, batch.data[k] * o.rate, batch.weight[k] * o.rate, grid, disc)
        bias = s["bias"] - o.balance * (share * o.classes).clamp_min(1e-3).log()
        s["bias"] = bias - bias.mean()
        s["sums"] = torch.stack([acc.data for acc in sums])
        s["iteration"] += 1
        evidence = float(batch.evidence.mean()) * temperature
        record = {"stage": "start", "start": s["start"], "iteration": s["iteration"], "radius": r,
                  "temperature": temperature, "evidence": evidence, "usage": share.tolist()}  # fmt: skip
        s["history"].append(record)
        self.log(f"start {s['start'] + 1}: evidence {evidence:.1f}", record)
        if s["iteration"] == o.iterations:
            self._end_start(sums)

    def _end_start(self, sums: list[Accumulator]) -> None:
        """Judge the start that is complete, keep its maps if they are the best so far, and begin the next."""
        s = self.state
        volumes = torch.stack([em.wiener(acc, self.signal[: self.small // 2 + 1]) for acc in sums])
        grid = em.make_grid(2, 0.8 * self.options.shift_extent, 4, self.device)
        disc = fourier.half_disc(self.small, self.high)
        values, transfer = (part[:JUDGED] for part in self.pool)
        usage = torch.zeros(self.options.classes)
        judged = em.expect(em.grid_slices(volumes, grid, disc), values, transfer, grid, disc, 1.0, usage)
        evidence = float(judged.evidence.mean())
        if not s["evidence"] or evidence > max(s["evidence"]):
            s["best"] = volumes
        s["evidence"] = [*s["evidence"], evidence]
        s["start"], s["iteration"], s["sums"] = s["start"] + 1, 0, None
        self.log(
            f"start {s['start']}: log-likelihood per image {evidence:.2f}", {"stage": "judged", "evidence": evidence}
        )
        if s["start"] == self.options.starts:
            s["volumes"] = s["best"]

    # --- rounds ------------------------------------------------------------------------------------------------------

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
        s["history"].append(record)
        s["round"], s["chunk"] = s["round"] + 1, 0
        self.log(f"round {s['round']}: radius {radius}, {record['moved_deg']:.1f} degrees moved", record)


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between rotations (n, 3, 3)."""
    cosine = (((a * b).sum((-1, -2)) - 1) / 2).clamp(-1, 1)
    return torch.rad2deg(torch.acos(cosine))
