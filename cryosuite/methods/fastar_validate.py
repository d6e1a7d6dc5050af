"""Is the network better than chance on molecules it has never seen? Errors in degrees beside a measured chance."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryosuite.kernels.planar import local_mean, mirror, relative
from cryosuite.kernels.rotations import geodesic_deg
from cryosuite.kernels.so3_grid import grid_rotations
from cryosuite.methods.fastar_loss import equivalent
from cryosuite.methods.fastar_options import HELD_OUT
from cryosuite.simulate.view_sets import ViewOptions, ViewSets
from cryosuite.training.launch import process_rank
from cryosuite.training.logs import write_scores

if TYPE_CHECKING:
    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.fastar import Fastar, FastarModel
    from cryosuite.methods.fastar_loader import Molecules
    from cryosuite.nets.multiview import Multiview
    from cryosuite.simulate.beads import Beads
    from cryosuite.simulate.view_sets import FastarBatch

SETTLED = 10**12  # images seen: the end of every curriculum
GRID = 2  # order of the grid of candidates: 4,608
BANK = 512  # projections encoded at a time
NEAR = 20.0  # degrees: a pose that local refinement can take up


def pose_errors(found: Tensor, truth: Tensor, mates: Tensor) -> Tensor:
    """Degrees (S, N) from rotations found (S, N, 3, 3) to the nearest symmetry mate of the true ones."""
    return geodesic_deg(found[:, :, None], equivalent(truth, mates)).amin(2)


def set_errors(found: Tensor, truth: Tensor) -> Tensor:
    """Degrees (S, N - 1) of poses relative to the first view, (S, N, 3, 3), with the better hand of each set."""
    truth, found = relative(truth), relative(found)
    both = torch.stack([geodesic_deg(found, truth), geodesic_deg(mirror(found), truth)])[:, :, 1:]
    better = both.median(-1).values.argmin(0)
    return torch.where((better == 0)[:, None], both[0], both[1])


def shuffled(rotation: Tensor, first: int, generator: torch.Generator) -> Tensor:
    """Rotations (S, N, 3, 3) dealt anew among the particles ``first`` .. of each set: what guessing would score."""
    out = rotation.clone()
    for s in range(len(rotation)):
        order = torch.randperm(rotation.shape[1] - first, generator=generator).to(rotation.device) + first
        out[s, first:] = rotation[s, order]
    return out


class Case:
    """Particles of some molecules never seen, and what is needed to pose them: made once.

    Args:
        stream: of the molecules, of this ``kind``; batch ``number`` is taken. order: of the grid of candidates.
    """

    def __init__(self, stream: ViewSets, number: int, order: int, kind: str) -> None:
        self.stream, self.number, self.order, self.key = stream, number, order, (kind, number)
        self.batch = stream.batch(number, SETTLED)

    @torch.no_grad()
    def errors(
        self, model: FastarModel, method: Fastar, generator: torch.Generator, banks: dict[tuple, Tensor]
    ) -> dict[str, Tensor]:
        """Degrees, the same for shuffled answers, and shift errors (pixels) of every particle.

        ``banks``: vectors of projections by molecule, shared by the cases of this scoring.
        """
        device = next(model.parameters()).device
        batch = self.batch.to(device)
        if method.options.mode == "target":
            rotation, shift = self._posed(model, batch, banks)
            deal = shuffled(rotation, 0, generator)
            found = {
                "deg": pose_errors(rotation, batch.rotation, batch.mates),
                "chance": pose_errors(deal, batch.rotation, batch.mates),
            }
        else:
            heads = method.star(model, batch)
            rotation, shift = model.net.poses(heads).rotation, heads.shift
            deal = shuffled(rotation, 1, generator)
            found = {"deg": set_errors(rotation, batch.rotation), "chance": set_errors(deal, batch.rotation)}
        found["shift"] = (shift - batch.shift).norm(dim=-1) * self.stream.options.size
        return {name: value.flatten().cpu() for name, value in found.items()}

    def _posed(self, model: FastarModel, batch: FastarBatch, banks: dict[tuple, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotations (S, N, 3, 3) and shifts by comparing with projections at all cells of the grid, as at inference."""
        cells, net, device = grid_rotations(self.order), model.net, batch.images.device
        if self.key not in banks:
            banks[self.key] = torch.cat([self._vectors(net, part, device) for part in cells.split(BANK)], 1)
        match = net.match(net.encode(batch.images.flatten(0, 1)))
        vector = match.vector.unflatten(0, batch.images.shape[:2])
        rotation, _ = local_mean(net.match_scores(vector, banks[self.key]), cells.to(device))
        return rotation, match.shift.unflatten(0, batch.images.shape[:2])

    def _vectors(self, net: Multiview, rotation: Tensor, device: torch.device) -> Tensor:  # (S, K, d)
        views = self.stream.views_of(self.number, rotation)
        return net.match(net.encode(views.flatten(0, 1).to(device))).vector.unflatten(0, views.shape[:2])


class Examiner:
    """Scores a model after every epoch on molecules never trained on, at fixed signal to noise ratios.

    Args:
        molecules: of the training; phantoms of another seed are tested on. method: the method.
        run: whose metrics.jsonl is added to. held: structures in Angstrom kept out of the training, or None.
        snrs: of the test images; those below 5 have a CTF. cases: molecules of each kind. views: particles of each.
    """

    def __init__(
        self,
        molecules: Molecules,
        method: Fastar,
        run: RunDir,
        held: Beads | None = None,
        snrs: tuple[float, ...] = (10.0, 1.0, 0.2),
        cases: int = 4,
        views: int = 64,
    ) -> None:
        self.molecules, self.method, self.run, self.held = molecules, method, run, held
        self.snrs, self.cases, self.views = snrs, cases, views
        self.made: dict[str, list[Case]] = {}

    def _make(self) -> None:
        options = self.molecules.views
        if self.method.options.mode == "ab-initio":
            self.views = 8
        for snr in self.snrs if not self.made else ():
            fixed = replace(
                options, images=self.views, views=(self.views,) * 2, snr=(snr, snr),
                ctf=float(snr < 5 and options.ctf > 0), blind=0.0, junk=0.0, cones=0.0, structures=0.0, templates=0,
            )  # fmt: skip
            kinds = {"phantom": self._stream(fixed, None)}
            if self.held is not None:
                kinds["structure"] = self._stream(replace(fixed, structures=1.0), self.held)
            if self.molecules.target is not None:
                kinds = {"target": self.molecules.target.stream(fixed, HELD_OUT, torch.device("cpu"), 1)}
            for kind, stream in kinds.items():
                count = self.cases if self.method.options.mode == "target" else 8 * self.cases
                self.made[f"{kind}_snr{snr:g}"] = [Case(stream, n, GRID, kind) for n in range(count)]

    @staticmethod
    def _stream(options: ViewOptions, library: Beads | None) -> ViewSets:
        return ViewSets(options, library, HELD_OUT)

    def score(self, model: FastarModel) -> dict[str, float]:
        """All scores of a model as it is: medians in degrees and pixels, named such as phantom_snr1_deg."""
        self._make()
        training = model.training
        model.eval()
        generator, scores, banks = torch.Generator().manual_seed(0), {}, {}
        for name, cases in self.made.items():
            parts = [case.errors(model, self.method, generator, banks) for case in cases]
            every = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            scores |= {f"{name}_{key}": float(value.median()) for key, value in every.items()}
            scores[f"{name}_below"] = 100 * float((every["deg"] < NEAR).float().mean())
        model.train(training)
        return scores

    def write(self, epoch: int, model: FastarModel) -> dict[str, float]:
        """Add the scores after an epoch to metrics.jsonl (first process only)."""
        if process_rank() != 0:
            return {}
        scores = self.score(model)
        write_scores(self.run.metrics, epoch, scores, 3)
        return scores


def verdict(scores: dict[str, float], mode: str) -> str:
    """A sentence on what a network with these scores may be used for (go / no-go)."""
    hardest = [name.removesuffix("_deg") for name in scores if name.endswith("_deg")]
    if not hardest:
        return "not judged yet"
    medians = np.array([scores[f"{name}_deg"] for name in hardest])
    chances = np.array([scores[f"{name}_chance"] for name in hardest])
    if mode == "ab-initio":
        gain = float((chances - medians).max())
        if gain >= 20:
            return f"{gain:.0f} degrees better than chance at best: usable with --experimental, check its maps"
        return "no better than chance by 20 degrees (gate G4): do not use it; fastar-infer searches poses without it"
    worst = float(medians.max())
    below = min(scores[f"{name}_below"] for name in hardest)
    if worst <= 15 and below >= 60:
        return "good (gate G2): poses can be refined locally"
    if float(medians.min()) <= 60:
        return "learns (gate G1), not yet good (G2: 15 degrees): a first guess only; train longer, tune with --map"
    return "no better than a guess (gate G1: 60 degrees): do not use it"
