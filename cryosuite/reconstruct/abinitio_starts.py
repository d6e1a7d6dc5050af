"""The starts of a search from nothing: annealed expectation maximisation from random maps, and the choice among them.

Each start ends with K maps. Some are right, others are stuck; for a mixture hardly any start has all of them right. So
the maps of all starts are pooled and the K are chosen under which the images are most likely, each image counting under
its best map; some more iterations let the chosen ones divide the images anew.

Several maps are sought at radii up to 7, where a few shifts for all images will do. One map is sought up to 13, where
small molecules show their features; shifts must lie closer together there, so each image tries those about its own,
which it first has from the mean of all images and then from the last time it was compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.processes import ALONE, Processes
from cryosuite.kernels import fourier
from cryosuite.kernels.memory import Portions
from cryosuite.kernels.rotations import random_rotations
from cryosuite.kernels.slices import Accumulator
from cryosuite.reconstruct import abinitio_em as em

POOL = 10000  # images the starts are made from
JUDGED = 1000  # images by which maps are compared
ROOM = 8  # pixels that a map's box is larger than twice its radius
FIRST = 300  # images with random poses per first map
RARE = 0.02  # least share of the images a map is credited with
PART = 256  # images read at a time
PIECES = 16  # of a batch that processes share
COARSE = 7  # a radius up to which all shifts can be tried at once
GAP = 0.25  # between shifts beyond it, in periods of the finest waves: at a half a map that is right fits no more
MIDDLE = 4  # radius at which images are held against their mean
WALK = 3  # times that images follow a map before it is judged by them


@dataclass(frozen=True)
class AbInitioOptions:
    """How the search from nothing proceeds. Radii in Fourier pixels.

    Those written below are for several maps at once; ``options_for`` knows those for one.

    classes: maps. starts, iterations, batch: of the expectation maximisation; batch is per class. settle: iterations
    after the choice. radius: its first and last. heat: first temperatures of the starts in turn, as a fraction of an
    image's signal energy. rate: weight of a batch in the running sums. cold_after: share of a start after which the
    temperature is 1. balance: how fast maps that few images choose are favoured. shift_extent: largest shift, fraction
    of the box. rounds: (radius, global search) of each round. keep: poses kept per image.
    """

    classes: int = 1
    starts: int = 4
    iterations: int = 50
    batch: int = 300
    settle: int = 10
    radius: tuple[int, int] = (4, 7)
    heat: tuple[float, ...] = (0.03,)
    rate: float = 0.3
    cold_after: float = 0.9
    balance: float = 0.5
    shift_extent: float = 0.1
    rounds: tuple[tuple[int, bool], ...] = (
        (7, True), (12, True), (18, True), (24, True), (32, False), (32, False), (32, False),
    )  # fmt: skip
    keep: int = 4
    seed: int = 0


# Of a single map, tuned on molecules of the group `train` (1,000 images of 32 pixels of 10 A, SNR 0.1). As for several
# maps, two of nine ended right: in a box three times as large as the molecule its true map poses nothing at a radius of
# 7. Starts of small molecules (3sfd, 3e0c, 4r0v, 2isk) end right from the higher temperature, those of a large one
# (1qvr) from the lower one.
ONE: dict[str, Any] = {
    "iterations": 20, "batch": 1000, "rate": 0.7, "radius": (4, 13), "heat": (0.05, 0.1), "settle": 2,
    "rounds": ((13, True), (18, True), (24, True), (32, False), (32, False), (32, False)),
}  # fmt: skip


def options_for(classes: int, **more: Any) -> AbInitioOptions:
    """Those for so many maps, and whatever else is given."""
    return AbInitioOptions(classes=classes, **((ONE if classes == 1 else {}) | more))


class Starts:
    """All starts, the choice, and what follows it, in units of one iteration; ``state`` is all that changes.

    Args:
        white: (rows, r_max) -> whitened coefficients and CTF of images. count: of images. signal: power per shell.
        box: D of the particles. log: takes a line for people and a record.
        processes: that share the images of every iteration; all of them hold the same state.
    """

    def __init__(
        self,
        white: Callable[[np.ndarray, int], tuple[Tensor, Tensor]],
        count: int,
        signal: Tensor,
        box: int,
        options: AbInitioOptions,
        device: torch.device,
        log: Callable[[str, dict[str, Any]], None],
        processes: Processes = ALONE,
    ) -> None:
        self.white, self.count, self.signal, self.options = white, count, signal, options
        self.device, self.log, self.processes = device, log, processes
        self.portions = Portions("images")
        self.low, self.high = (min(r, box // 2) for r in options.radius)
        self.small = min(2 * self.high + ROOM, box)
        self.units = options.starts * options.iterations + options.settle
        self.tracked = self.high > COARSE  # each image tries shifts about the one it had when last seen
        self._pool: tuple[Tensor, Tensor] | None = None
        self._middles: Tensor | None = None
        self.state: dict[str, Any] = {"start": 0, "iteration": 0, "sums": None, "bias": torch.zeros(options.classes),
                                      "maps": None, "evidence": None, "settled": 0, "volumes": None,
                                      "shift": None}  # fmt: skip

    @property
    def position(self) -> int:
        """Units done."""
        s = self.state
        return s["start"] * self.options.iterations + s["iteration"] + s["settled"]

    @property
    def done(self) -> bool:
        """Whether ``state["volumes"]`` holds the maps to go on with."""
        return self.position >= self.units

    def advance(self) -> None:
        """The next iteration."""
        if self.state["start"] < self.options.starts:
            self._iterate()
        else:
            self._settle()

    # --- images ------------------------------------------------------------------------------------------------------

    @property
    def pool(self) -> tuple[Tensor, Tensor]:
        """Coefficients of the images that the starts are made from."""
        if self._pool is None:
            chosen = np.random.default_rng([self.options.seed, 7]).permutation(self.count)[: min(self.count, POOL)]
            mine = self.processes.mine(chosen, PART)
            parts = self.processes.each(lambda: [self.white(rows, self.high) for rows in _cut(mine)])
            own = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
            self._pool = tuple(torch.from_numpy(self.processes.joined(part)).to(self.device) for part in own)
        return self._pool

    @property
    def middles(self) -> Tensor:
        """Shifts (n, 2) of the pool's images before there is a map."""
        if self._middles is None:
            values, transfer = self.pool
            disc = fourier.half_disc(self.small, min(MIDDLE, self.high), self.device)
            some = (part[:, : len(disc)] for part in (values, transfer))
            self._middles = em.middles(*some, self.signal, disc, 0.8 * self.options.shift_extent).cpu()
        return self._middles

    def _placed(self, rows: Tensor, shift: Tensor | None) -> Tensor:
        """Coefficients of some images of the pool, moved by their shifts where these are tracked."""
        values = self.pool[0][rows.to(self.device)]
        if shift is None:
            return values
        return fourier.phase_shift(values, fourier.half_disc(self.small, self.high, self.device), shift.to(self.device))

    def _followed(self, shift: Tensor, found: em.Expected, radius: int) -> Tensor:
        """Shifts after an E-step, none larger than may be."""
        most = 0.8 * self.options.shift_extent
        return (shift + self._grid(radius).shift[found.shift]).clamp(-most, most)

    def likelihood(self, volume: Tensor, fitted: bool = False) -> Tensor:
        """Log-likelihood (n,) of the first images of the pool under a map, over all orientations and shifts.

        fitted: the map becomes that of these images before it is judged, as one of the starts already is.
        """
        transfer, none = self.pool[1][:JUDGED], torch.zeros(1)
        rows = torch.arange(len(transfer))
        shift = self.middles[rows] if self.tracked else None
        found = None
        for _ in range(WALK if self.tracked else 1 + fitted):
            if found is not None and fitted:
                sums = [em.empty(self.small)]
                self._add(sums, found, self.high, 1.0)
                volume = self._volumes(sums)[0]
            found = self.expect(volume[None], self._placed(rows, shift), transfer, self.high, 1.0, none)
            shift = self._followed(shift, found, self.high) if self.tracked else None
        return found.evidence

    def expect(
        self, volumes: Tensor, values: Tensor, transfer: Tensor, radius: int, temperature: float, bias: Tensor
    ) -> em.Expected:
        """E-step of some images under maps (K, d, d, d), each process its part of them; what all of them say.

        On the device; the sums come back to the processor, where maps are made of them.
        """
        disc, grid = fourier.half_disc(self.small, radius, self.device), self._grid(radius, self.device)
        slices = em.grid_slices(volumes.to(self.device), grid, disc)

        def expected(begin: int, end: int) -> em.Expected:
            some = slice(begin, end), slice(len(disc))
            return em.expect(slices, values[some], transfer[some], grid, disc, temperature, bias)

        # the same pieces whoever has them
        edges = np.linspace(0, len(values), PIECES + 1).astype(int).tolist()
        parts = []
        for piece in self.processes.mine(np.arange(PIECES)).tolist():
            first, last = edges[piece], edges[piece + 1]
            work = self.portions.over(lambda rows, at=first: expected(at + rows.start, at + rows.stop), last - first)
            parts += [found for _, found in work]
        return em.together(parts or [expected(0, 0)], self.processes)

    def _grid(self, radius: int, device: torch.device | str = "cpu") -> em.Grid:
        if self.tracked:
            return em.make_grid(2, 2 * GAP / radius, 5, device, corners=False)
        return em.make_grid(2, 0.8 * self.options.shift_extent, 3 if radius <= 5 else 4, device)

    def _volumes(self, sums: list[Accumulator]) -> Tensor:
        return torch.stack([em.wiener(acc, self.signal[: self.small // 2 + 1]) for acc in sums])

    def _step(self, volumes: Tensor, radius: int, temperature: float, bias: Tensor, generator: np.random.Generator):
        """E-step of a random batch under some maps."""
        transfer, s = self.pool[1], self.state
        rows = torch.from_numpy(generator.permutation(len(transfer))[: self.options.batch * self.options.classes])
        shift = s["shift"][rows] if self.tracked else None
        placed = self._placed(rows, shift)
        found = self.expect(volumes, placed, transfer[rows.to(self.device)], radius, temperature, bias)
        if self.tracked:
            s["shift"] = s["shift"].index_copy(0, rows, self._followed(shift, found, radius))
        return found

    # --- one start ---------------------------------------------------------------------------------------------------

    def _first_sums(self, generator: np.random.Generator) -> list[Accumulator]:
        """Sums of some images at random orientations, as heavy as a batch."""
        o = self.options
        transfer = self.pool[1]
        disc = fourier.half_disc(self.small, self.low)
        n = len(disc)
        chosen = generator.permutation(len(transfer))[: FIRST * o.classes]
        torch_generator = torch.Generator().manual_seed(int(generator.integers(2**31)))
        sums = []
        for rows in np.array_split(chosen, o.classes):
            rotation = random_rotations(len(rows), generator=torch_generator)
            at = torch.from_numpy(rows)
            shift = self.state["shift"][at] if self.tracked else None
            acc, y, c = em.empty(self.small), self._placed(at, shift)[:, :n].cpu(), transfer[rows, :n].cpu()
            em.insert_slices(acc, y * c, c.square(), rotation, disc)
            acc.data *= o.batch / len(rows)
            sums.append(acc)
        return sums

    def _accumulators(self) -> list[Accumulator]:
        return [Accumulator(data.clone(), self.small, 2) for data in self.state["sums"]]

    def _iterate(self) -> None:
        """One iteration of the present start."""
        o, s = self.options, self.state
        generator = np.random.default_rng([o.seed, 1, s["start"], s["iteration"]])
        if s["iteration"] == 0:
            s["bias"] = torch.zeros(o.classes)
            self._forget_shifts()
        sums = self._first_sums(generator) if s["iteration"] == 0 else self._accumulators()
        done = s["iteration"] / max(o.iterations - 1, 1)
        radius = round(self.low + (self.high - self.low) * min(1.0, done / 0.8))
        temperature = self._heat(radius) ** (1 - min(1.0, done / o.cold_after))
        batch = self._step(self._volumes(sums), radius, temperature, s["bias"], generator)
        share = batch.share.mean(0)
        self._add(sums, batch, radius, o.rate)
        bias = s["bias"] - o.balance * (share * o.classes).clamp_min(1e-3).log()
        s["bias"] = bias - bias.mean()
        s["sums"] = torch.stack([acc.data for acc in sums])
        s["iteration"] += 1
        evidence = float(batch.evidence.mean()) * temperature
        record = {"stage": "start", "start": s["start"], "iteration": s["iteration"], "radius": radius,
                  "temperature": temperature, "evidence": evidence, "usage": share.tolist()}  # fmt: skip
        self.log(f"start {s['start'] + 1}: evidence {evidence:.1f}", record)
        if s["iteration"] == o.iterations:
            self._end_start(sums)

    def _forget_shifts(self) -> None:
        if self.tracked:
            self.state["shift"] = self.middles.clone()

    def _heat(self, radius: int) -> float:
        """The temperature at which a start begins, for images up to a radius."""
        disc = fourier.half_disc(self.small, radius)
        transfer = self.pool[1][:, : len(disc)]
        energy = float((transfer.square() * self.signal[disc.shell].to(self.device)).sum(1).mean())
        heat = self.options.heat
        return max(energy * heat[self.state["start"] % len(heat)], 1.0)

    def _add(self, sums: list[Accumulator], batch: em.Expected, radius: int, rate: float) -> None:
        disc, grid = fourier.half_disc(self.small, radius), self._grid(radius)
        for k, acc in enumerate(sums):
            acc.data *= 1 - rate
            em.add_sums(acc, batch.data[k] * rate, batch.weight[k] * rate, grid, disc)

    def _end_start(self, sums: list[Accumulator]) -> None:
        """Judge the maps of the start that is complete, put them into the pool, and begin the next."""
        s = self.state
        volumes = self._volumes(sums)
        evidence = torch.stack([self.likelihood(one) for one in volumes], 1)  # (images, K)
        s["maps"] = volumes if s["maps"] is None else torch.cat([s["maps"], volumes])
        s["evidence"] = evidence if s["evidence"] is None else torch.cat([s["evidence"], evidence], 1)
        s["start"], s["iteration"], s["sums"] = s["start"] + 1, 0, None
        likely = float(evidence.amax(1).mean())
        self.log(f"start {s['start']}: log-likelihood per image {likely:.2f}", {"stage": "judged", "evidence": likely})
        if s["start"] == self.options.starts:
            chosen = self.processes.first_does(lambda: choose_maps(s["evidence"], self.options.classes))
            s["volumes"], s["bias"] = s["maps"][chosen], torch.zeros(self.options.classes)
            likely = float(s["evidence"][:, chosen].amax(1).mean())
            self.log(f"maps {chosen} of all starts: {likely:.2f}", {"stage": "chosen", "evidence": likely})

    # --- after the choice --------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """One iteration of the chosen maps at temperature 1, each credited with the share of images it has."""
        o, s = self.options, self.state
        generator = np.random.default_rng([o.seed, 2, s["settled"]])
        if s["settled"] == 0:
            self._forget_shifts()
        batch = self._step(s["volumes"], self.high, 1.0, s["bias"], generator)
        first = s["sums"] is None
        sums = [em.empty(self.small) for _ in range(o.classes)] if first else self._accumulators()
        self._add(sums, batch, self.high, 1.0 if first else o.rate)
        share = batch.share.mean(0)
        s["bias"] = share.clamp_min(RARE / o.classes).log()
        s["sums"], s["volumes"] = torch.stack([acc.data for acc in sums]), self._volumes(sums)
        s["settled"] += 1
        evidence = float(batch.evidence.mean())
        record = {"stage": "settle", "iteration": s["settled"], "evidence": evidence, "usage": share.tolist()}
        self.log(f"settling: evidence {evidence:.1f}", record)


def _cut(rows: np.ndarray) -> list[np.ndarray]:
    """Rows in parts of at most PART, all of much the same length; one empty part of none."""
    return np.array_split(rows, max(1, -(-len(rows) // PART)))


def choose_maps(evidence: Tensor, count: int) -> list[int]:  # (n, M) -> count of M
    """The maps under which images are most likely, each under its best one: greedy, then exchanges while they help.

    Args:
        evidence: log-likelihood of n images under each of M maps.
    """
    chosen: list[int] = []
    best = torch.full((len(evidence),), -torch.inf, device=evidence.device)
    for _ in range(min(count, evidence.shape[1])):
        gain = torch.maximum(evidence, best[:, None]).mean(0)
        if chosen:
            gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, evidence[:, chosen[-1]])
    improved = True
    while improved:
        improved = False
        for place in range(len(chosen)):
            others = chosen[:place] + chosen[place + 1 :]
            rest = evidence[:, others].amax(1) if others else torch.full_like(best, -torch.inf)
            gain = torch.maximum(evidence, rest[:, None]).mean(0)
            gain[others] = -torch.inf
            if float(gain.max()) > float(gain[chosen[place]]) + 1e-6:
                chosen[place], improved = int(gain.argmax()), True
    return sorted(chosen)
