"""Poses, classes and maps of particles of which nothing but the CTF is known, in closed form, without a network.

1. Starts. From maps of random orientations, annealed expectation maximisation over a whole grid of orientations, at low
   frequency; several times, and of the maps of all starts those are kept that explain the images best
   (`abinitio_starts`, `abinitio_em`).
2. Rounds. Every image is searched for against every map (`kernels.pose_search`), the particles of each class are
   backprojected with their best poses, and the radius grows from round to round. The maps are cleaned as `polish` does;
   an image chooses its class by half maps that it has no part in (`held_out` says why). In the last rounds a particle
   stays in its class and near its poses, and is compared at its own pixel size and magnification where these differ (a
   few per cent, which neither the starts nor a coarse grid of orientations would notice).
3. In a mixture, once the classes are nearly pure, each begins anew from its own particles (`abinitio_restarts`). Those
   that gain by it search for their poses again, and all particles for their classes.

The work is cut into units of a second or so: ``advance`` does one, ``state_dict`` holds everything in between, so a
driver can save, stop and go on exactly (methods.deco_start). Several processes take the same steps together and hold
the same state; each searches for images of its own, and the sums of all are added up.
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
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.spectra import measure_spectra, whitened
from cryosuite.errors import InputError
from cryosuite.kernels import fourier, pose_search
from cryosuite.kernels.memory import Portions
from cryosuite.kernels.pose_search import Candidates
from cryosuite.reconstruct.abinitio_restarts import Restarts, class_units
from cryosuite.reconstruct.abinitio_rounds import ANYWHERE, NEAR, OWN, RoundMaps, class_halves, image_scales
from cryosuite.reconstruct.abinitio_starts import AbInitioOptions, Starts

CHUNK = 256  # images searched for at a time
ANEW = (0, "anew")  # in the place of a round: every class begins anew (abinitio_restarts)
REPEATS, LOW, SETTLED = 8, 16, 0.015  # of a global round up to this radius, until so few particles change their class
ROOM = 8  # pixels that a map's box is larger than twice its radius


@dataclass
class Found:
    """What was found: rotation (N, 3, 3), shift (N, 2) fraction of the box, label, score, margin and good (N,).

    score: gain in log-likelihood over an empty image. margin: of the best pose over the best one elsewhere. good: False
    where an image is broken, so that its pose means nothing.
    """

    rotation: np.ndarray
    shift: np.ndarray
    label: np.ndarray
    score: np.ndarray
    margin: np.ndarray
    good: np.ndarray


class AbInitio:
    """The search; ``advance`` until ``done``, then ``found``.

    Args:
        particles: with CTF and noise; poses are not looked at.
        log: takes a line for people and a record of numbers per step.
        processes: that share the images; all of them do every unit, and all have what was found.
    """

    def __init__(
        self,
        particles: ParticleSet,
        options: AbInitioOptions,
        device: torch.device | str = "cpu",
        log: Callable[[str, dict[str, Any]], None] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        if len(particles) < 50 * options.classes:
            raise InputError(
                f"{particles.path}: {len(particles)} particles are too few to find {options.classes} maps without "
                f"poses: at least {50 * options.classes} are needed"
            )
        self.particles, self.options, self.device = particles, options, torch.device(device)
        self.log, self.processes = log or (lambda text, record: None), processes
        self.box = particles.box_size
        spectra = measure_spectra(particles, True)
        self.noise_amplitude, self.signal = spectra.noise.sqrt(), spectra.signal
        self.mask = fourier.window_mask(self.box)
        self.place, self.reach = image_scales(particles)
        self.loader = BatchLoader(particles, CHUNK, shuffle=False, prefetch=0)
        self.starts = Starts(
            self._white, len(particles), self.signal, self.box, options, self.device, self._note, processes
        )
        self.rounds = planned(options, self.box // 2)
        anew = options.classes * class_units() if ANEW in self.rounds else 0
        self.total = self.starts.units + (len(self.rounds) - (anew > 0)) * self._chunks + anew
        self._restarts: Restarts | None = None
        self._maps: tuple[int, RoundMaps] | None = None
        self.portions = Portions("images")
        self.half = torch.from_numpy(np.asarray(particles.half_sets())).long()
        # volumes (K, d, d, d), halves (2, K, d, d, d) once there are particles with poses
        # before: classes (N,) at the start of the round
        self.state: dict[str, Any] = {"round": 0, "chunk": 0, "volumes": None, "halves": None, "poses": None,
                                      "before": None, "anew": None, "renewed": [], "history": []}  # fmt: skip

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
        s, at = self.state, self.rounds.index(ANEW) if ANEW in self.rounds else len(self.rounds)
        rounds = s["round"] - (s["round"] > at)
        anew = self.options.classes * class_units() if s["round"] > at else 0
        if s["round"] == at < len(self.rounds) and s["anew"] is not None:
            anew = self._classes_anew().position
        return self.starts.position + rounds * self._chunks + s["chunk"] + anew

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
        elif not self.done and self.rounds[self.state["round"]] == ANEW:
            self._begin_anew()
        elif not self.done:
            self._search_chunk()

    def state_dict(self) -> dict[str, Any]:
        """Everything between two units, as tensors and plain values."""
        return {**self.state, "starts": dict(self.starts.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self.state = {name: value for name, value in state.items() if name != "starts"}
        self.starts.state = dict(state["starts"])
        self._maps = self._restarts = None

    @property
    def joint_radius(self) -> int:
        """Fourier pixels up to which poses are found in maps of ALL images: half maps made with them agree up to there
        by their noise, too."""
        return max(radius for radius, mode in self.rounds if mode != ANEW[1])

    @property
    def found(self) -> Found:
        """The poses and classes of all particles."""
        poses = self.state["poses"]
        rows = torch.arange(len(self.particles))
        best = Candidates(poses["rotation"], poses["shift"], poses["score"])
        return Found(
            best.rotation[rows, 0].numpy(), best.shift[rows, 0].numpy(), poses["label"].numpy(),
            best.score[:, 0].numpy(), pose_search.margin(best).numpy(), ~self.loader.broken.rows,
        )  # fmt: skip

    # --- classes anew ------------------------------------------------------------------------------------------------

    def _classes_anew(self) -> Restarts:
        if self._restarts is None:
            s = self.state
            self._restarts = Restarts(
                self._white, s["poses"]["label"].numpy(), s["volumes"], self.signal, self.box, self.options,
                self.device, self._note, s["anew"], self.processes,
            )  # fmt: skip
        return self._restarts

    def _begin_anew(self) -> None:
        """The next iteration of a class that begins anew; after the last class the second half of the rounds."""
        s, restarts = self.state, self._classes_anew()
        restarts.advance()
        s["anew"] = restarts.state
        if restarts.done:
            s["volumes"], s["halves"] = torch.stack(restarts.state["volumes"]), None
            s["renewed"] = list(restarts.state["renewed"])
            s["round"], s["anew"], self._restarts = s["round"] + 1, None, None
            while not s["renewed"] and self.rounds[s["round"]][1] == OWN:
                s["round"] += 1

    # --- rounds ------------------------------------------------------------------------------------------------------

    def _white(self, rows: np.ndarray, r_max: int) -> tuple[Tensor, Tensor]:
        """Whitened coefficients and CTF (b, P) of some images, not shifted, on the device."""
        batch = replace(self.loader.batch(rows), shift=None)
        target = whitened(
            batch, fourier.half_disc(self.box, r_max), self.noise_amplitude, self.particles.ctf_premultiplied, self.mask
        )
        return target.values.to(self.device), target.ctf.to(self.device)

    def _round_maps(self) -> RoundMaps:
        """The maps of this round, made ready once."""
        s, number = self.state, self.state["round"]
        if self._maps is None or self._maps[0] != number:
            self._maps = None  # the memory of the last round's
            how = (*self.rounds[number], self.options, self.device, self.reach)
            self._maps = number, RoundMaps(s["volumes"], s["halves"], *how)
        return self._maps[1]

    def _search_chunk(self) -> None:
        """Search for the next images, in every process a chunk; after the last one make the maps of the next round."""
        s = self.state
        if s["poses"] is None:
            s["poses"] = self._no_poses()
        if s["chunk"] == 0:
            s["before"] = s["poses"]["label"].clone()
            s["poses"]["moved"].zero_()
        for found in self.processes.everyone(self._searched):
            rows = found.pop("rows")
            for name, values in found.items():
                s["poses"][name][rows] = values
        s["chunk"] = min(s["chunk"] + self.processes.count, self._chunks)
        if s["chunk"] == self._chunks:
            self._end_round(self.rounds[s["round"]][0])

    def _searched(self) -> dict[str, Tensor]:
        """What this process finds in its chunk: the rows, and the poses, classes and so on that they have now."""
        s, (radius, mode) = self.state, self.rounds[self.state["round"]]
        begin = (s["chunk"] + self.processes.rank) * CHUNK
        rows = np.arange(begin, max(min(begin + CHUNK, len(self.particles)), begin))
        if mode == OWN:
            rows = rows[np.isin(s["poses"]["label"][torch.from_numpy(rows)].numpy(), s["renewed"])]
        if not len(rows):
            return {"rows": torch.from_numpy(rows)}
        maps = self._round_maps()
        values, transfer = self._white(rows, radius)
        at = torch.from_numpy(rows)
        had = {name: held[at] for name, held in s["poses"].items()}

        def search(some: slice) -> tuple[Tensor, ...]:
            before = Candidates(had["rotation"][some], had["shift"][some] * maps.scale, had["score"][some])
            images = values[some], transfer[some], had["label"][some], self.half[at[some]]
            place = None if self.place is None else self.place[at[some]]
            found, label = maps.search(*images, before, place)
            return found.rotation.cpu(), found.shift.cpu() / maps.scale, found.score.cpu(), label.cpu()

        parts = [found for _, found in self.portions.over(search, len(rows))]
        rotation, shift, score, label = (torch.cat(part) for part in zip(*parts, strict=True))
        moved = _angle(had["rotation"][:, 0], rotation[:, 0])
        return {"rows": at, "rotation": rotation, "shift": shift, "score": score, "label": label, "moved": moved}

    def _no_poses(self) -> dict[str, Tensor]:
        n, keep = len(self.particles), self.options.keep
        eye = torch.eye(3).expand(n, keep, 3, 3).clone()
        return {"rotation": eye, "shift": torch.zeros(n, keep, 2), "score": torch.zeros(n, keep),
                "label": torch.zeros(n, dtype=torch.int64), "moved": torch.zeros(n)}  # fmt: skip

    def _end_round(self, radius: int) -> None:
        """Backproject every class with the poses of this round."""
        s, o = self.state, self.options
        self.loader.broken.share(self.processes)
        p = s["poses"]
        now, later = self.rounds[s["round"]], self.rounds[s["round"] + 1 :]
        following = next((r for r, mode in later if r and (r, mode) != now), radius)
        reach = min(self.box // 2, max(radius, following))
        size = min(self.box, 2 * reach + ROOM)
        posed = replace(self.particles, rotation=p["rotation"][:, 0].numpy(), shift=p["shift"][:, 0].numpy())
        label = p["label"].numpy()
        halves = class_halves(posed, label, self.half.numpy(), o.classes, size, reach, self.processes)
        halves[:, np.flatnonzero(np.bincount(label, minlength=o.classes) == 0)] = 0
        # coefficients, not grey values, are those of the particles
        s["halves"] = halves * (self.box / size) ** 3
        s["volumes"] = s["halves"].mean(0)
        record = {
            "stage": "round",
            "round": s["round"] + 1,
            "radius": radius,
            "score": float(p["score"][:, 0].mean()),
            "moved_deg": float(p["moved"].median()),
            "changed": self.processes.first_does(lambda: float((p["label"] != s["before"]).float().mean())),
            "sizes": np.bincount(label, minlength=o.classes).tolist(),
        }
        changed = record["changed"]
        text = f"round {s['round'] + 1}: radius {radius}, {record['moved_deg']:.1f} degrees moved"
        self._note(text + (f", {changed:.0%} changed their class" if o.classes > 1 else ""), record)
        s["round"], s["chunk"] = s["round"] + 1, 0
        while (
            changed < SETTLED
            and now[1] == ANYWHERE
            and s["round"] < len(self.rounds)
            and self.rounds[s["round"]] == now
        ):
            s["round"] += 1  # nothing more to be had at this radius


def planned(options: AbInitioOptions, nyquist: int) -> list[tuple[int, str]]:
    """The rounds (radius, what is searched) of a box, each once; cheap ones of a mixture up to REPEATS times.

    Classes and poses of a mixture come out of each other: at a radius that is cheap to search the rounds are repeated
    while particles change their class (measured: four molecules, ARI .50 in the first round, .95 in the twentieth).
    """
    rounds = [(min(r, nyquist), ANYWHERE if everywhere else NEAR) for r, everywhere in options.rounds]
    once = [one for n, one in enumerate(rounds) if n == 0 or one != rounds[n - 1] or one[1] == NEAR]
    low = [r for r, mode in once if mode == ANYWHERE and r <= LOW]
    if options.classes == 1 or not low:
        return once
    many = [(r, ANYWHERE) for r in low for _ in range(REPEATS)]
    again = [(low[-1], OWN), *[(low[-1], ANYWHERE)] * REPEATS]
    return [*many, ANEW, *again, *(one for one in once if one[1] == NEAR or one[0] > LOW)]


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between rotations (n, 3, 3)."""
    cosine = (((a * b).sum((-1, -2)) - 1) / 2).clamp(-1, 1)
    return torch.rad2deg(torch.acos(cosine))
