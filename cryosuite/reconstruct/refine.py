"""Poses made better: every image is matched, near the pose it has, to the map that all poses give, in a few rounds.

A round backprojects each half set with the present poses, keeps of each half map what their FSC says is signal, and
searches for every image in a cone around its pose (`kernels.pose_search`, whitened likelihood with CTF on the half
disc, up to the radius where the FSC falls below 0.143). An image is compared with the map of its own half set, never
with the other's, so that the FSC of the two stays that of independent halves (Scheres & Chen 2012). Poses within some
twenty degrees of the truth are enough to begin with; cones shrink from round to round while the radius grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.loader import Batch, BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.spectra import Target, measure_spectra, whitened
from cryosuite.errors import InputError
from cryosuite.kernels import fourier, pose_search, shells
from cryosuite.kernels.memory import Portions
from cryosuite.kernels.pose_search import Candidates, MagnifiedSource, SearchOptions, SliceSource, VolumeSource
from cryosuite.kernels.rotations import expmap, geodesic_deg
from cryosuite.reconstruct.abinitio_rounds import image_scales
from cryosuite.reconstruct.backproject import Reconstruction, reconstruct
from cryosuite.reconstruct.masks import half_map_mask
from cryosuite.reconstruct.solve import cropped

ROOM = 8  # pixels that a map's box is larger than twice its radius
FEWEST = 20  # particles without which no map is worth matching to
SIGNAL = 0.143  # FSC of the last shell that images are compared on
CHUNK = 128  # images searched for over all orientations at a time
MIDDLE = 2  # the level of a pose search at which poses that are handed in join


@dataclass(frozen=True)
class RefineOptions:
    """How poses are refined.

    rounds: of backprojection and search. cone: degrees searched around the poses in the first round; that of each
    next round is ``narrow`` times the last, but at least ``finest``. shift: pixels of a 128-pixel box searched at
    first. coarsest: resolution in Angstrom that images are compared to at least. r_max: largest radius in Fourier
    pixels, None: Nyquist. keep: poses followed per image. batch: images searched for at a time.
    """

    rounds: int = 3
    cone: float = 20.0
    narrow: float = 0.5
    finest: float = 3.0
    shift: float = 6.0
    coarsest: float = 40.0
    r_max: int | None = None
    keep: int = 6
    batch: int = 256

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.finest <= 60 or not 0 < self.cone <= 60 or not 0 < self.narrow <= 1:
            raise InputError(
                f"refinement with {self.rounds} rounds and cones of {self.cone:g} down to {self.finest:g} degrees: at "
                "least one round, and cones between 0 and 60 degrees, are needed"
            )

    def cone_of(self, number: int) -> float:
        """Half width in degrees of the search of round ``number``, counted from 0."""
        return max(self.cone * self.narrow**number, min(self.finest, self.cone))


@dataclass
class RefineResult:
    """Refined poses and the maps they give.

    Attributes:
        rotation: (N, 3, 3) float32. shift: (N, 2) float32, fraction of the box.
        score: (N,) gain in log-likelihood over an empty image, of the last round; margin: of the best pose over the
            best one at least ten degrees away.
        half_maps: the two half maps (D, D, D). fsc: (D/2,) between them, unmasked, shells 1 .. D/2.
        reconstruction: the same with the joint map.
        history: one record per round: round, cone, radius, moved_deg (median), score (mean), fsc_A.
    """

    rotation: np.ndarray
    shift: np.ndarray
    score: np.ndarray
    margin: np.ndarray
    half_maps: tuple[Tensor, Tensor]
    fsc: Tensor
    reconstruction: Reconstruction
    history: list[dict[str, Any]] = field(default_factory=list)


def refine(
    particles: ParticleSet,
    rotation: np.ndarray,  # (N, 3, 3) or (N, k, 3, 3)
    shift: np.ndarray | None,  # (N, 2) fraction of the box
    half: np.ndarray | None = None,  # (N,) 0 or 1
    maps: Tensor | Sequence[Tensor] | None = None,  # (D, D, D), or one per half set
    options: RefineOptions | None = None,
    weights: np.ndarray | None = None,  # (N,)
    device: torch.device | str = "cpu",
    log: Callable[[str, dict[str, Any]], None] | None = None,
    advance: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> RefineResult:
    """Improve poses by local projection matching.

    Args:
        particles: images with CTF (the set's own poses are not looked at).
        rotation, shift: poses to begin with, as CONVENTIONS has them; no shifts: zeros. Of k rotations per particle the
            first makes the first maps; the first round searches around them all.
        half: half set of every particle; default the set's own.
        maps: what the FIRST round matches to instead of backprojected half maps: one map for both or one for each, in
            the particles' box, of any grey scale. Below their resolution the halves are then not independent.
        weights: of the particles in the maps; 0 leaves one out of them, its pose is searched for all the same.
        device: where images are searched for.
        log: takes a line for people and a record of numbers after each round.
        advance: called with the number of images just done; N x rounds in all, or this process's share of them.
        processes: that share the images; all get the same result.

    Raises:
        InputError: poses that do not fit the set, half sets with fewer than 20 particles, maps of another box.
    """
    options = options or RefineOptions()
    engine = _Refiner(particles, rotation, shift, half, options, weights, torch.device(device), processes)
    engine.advance = advance or (lambda count: None)
    history: list[dict[str, Any]] = []
    start = engine.given(maps)
    reconstruction = None if start is not None else engine.reconstruct()
    for number in range(engine.options.rounds):
        record = engine.round(number, start, reconstruction)
        start, reconstruction = None, engine.reconstruct()
        record["fsc_A"] = _resolution(reconstruction)
        history.append(record)
        if log is not None:
            log(f"refinement, round {number + 1}: poses within {record['cone']:.1f} degrees, up to radius "
                f"{record['radius']}; moved {record['moved_deg']:.1f} degrees, half maps {record['fsc_A']:.1f} A",
                record)  # fmt: skip
    poses = (engine.rotation, engine.shift, engine.score, engine.margin)
    pair = (reconstruction.half_a, reconstruction.half_b)
    return RefineResult(*poses, pair, reconstruction.fsc, reconstruction, history)


def _resolution(one: Reconstruction) -> float:
    return shells.resolution(one.fsc, SIGNAL, one.box_size, one.pixel_size)


def search_everywhere(
    particles: ParticleSet,
    rows: np.ndarray,  # (n,)
    volume: Tensor,  # (D, D, D)
    coarsest: float = 20.0,
    keep: int = 4,
    shift: float = 0.1,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
    processes: Processes = ALONE,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Poses of some particles over all orientations, against one given map of any grey scale.

    Args:
        rows: of the set. volume: in the particles' box. coarsest: Angstrom that images are compared to at least.
        keep: poses per particle, apart from one another. shift: largest, fraction of the box.
        processes: that share the particles; all get the poses of all of them.

    Returns:
        rotation (n, keep, 3, 3), shift (n, 2) of the first of them, score (n,); float32.
    """
    device, box = torch.device(device), particles.box_size
    pixel_size = float(np.median(particles.pixel_size))
    radius = min(max(math.ceil(box * pixel_size / coarsest), 8), 20, box // 2)
    options = SearchOptions(
        r_min=min(10, radius), r_max=radius, levels=2, shift_extent=shift, keep=2 * keep, fit_scale=True
    )
    size = min(box, 2 * radius + ROOM)
    source = VolumeSource(cropped(volume, size).to(device), r_max=radius)
    ready = pose_search.prepare(source, options, device=device)
    amplitude = measure_spectra(particles, True).noise.sqrt().to(device)
    disc, window = fourier.half_disc(box, radius, device), fourier.window_mask(box).to(device)
    found: list[tuple[Tensor, ...]] = []
    mine, portions = processes.mine(rows, CHUNK), Portions("images")

    def all_mine() -> None:
        for batch in _batches(particles, mine, CHUNK, device):
            target = whitened(batch, disc, amplitude, particles.ctf_premultiplied, window)

            def searched(some: slice, batch: Batch = batch, target: Target = target) -> tuple[Tensor, ...]:
                images = target.values[some], target.ctf[some], batch.index[some]
                poses = pose_search.search(source, *images, options, prepared=ready)
                return poses.rotation[:, :keep].cpu(), poses.shift[:, 0].cpu() / size, poses.score[:, 0].cpu()

            for some, part in portions.over(searched, len(batch)):
                found.append(part)
                if advance is not None:
                    advance(some.stop - some.start)

    processes.each(all_mine)  # an image that one cannot read ends all of them
    found = found or [(torch.zeros(0, keep, 3, 3), torch.zeros(0, 2), torch.zeros(0))]
    rotation, moves, score = (processes.joined(torch.cat(part).numpy()) for part in zip(*found, strict=True))
    return rotation, moves, score


def _batches(particles: ParticleSet, rows: np.ndarray, size: int, device: torch.device) -> Iterator[Batch]:
    """The images of some rows in order, without their poses; ``index`` counts them from 0."""
    if len(rows):
        chosen = particles if len(rows) == len(particles) else particles.subset(rows)
        yield from BatchLoader(
            replace(chosen, rotation=None, shift=None), size, shuffle=False, device=device
        ).epoch(0)  # fmt: skip


class _Refiner:
    """The poses as they stand, and one round of searching."""

    def __init__(
        self,
        particles: ParticleSet,
        rotation: np.ndarray,
        shift: np.ndarray | None,
        half: np.ndarray | None,
        options: RefineOptions,
        weights: np.ndarray | None,
        device: torch.device,
        processes: Processes = ALONE,
    ) -> None:
        n, self.processes = len(particles), processes
        given = np.array(rotation, np.float32)
        self.tried = given if given.ndim == 4 else None
        self.rotation = given if given.ndim != 4 else given[:, 0].copy()
        self.shift = np.zeros((n, 2), np.float32) if shift is None else np.array(shift, np.float32)
        if self.rotation.shape != (n, 3, 3) or self.shift.shape != (n, 2):
            raise InputError(
                f"{particles.path or 'particles'}: poses of shapes {self.rotation.shape} and {self.shift.shape} do not "
                f"belong to {n} particles"
            )
        self.half = np.asarray(particles.half_sets() if half is None else half).astype(np.int8)
        self.weights = None if weights is None else np.asarray(weights, np.float32)
        counted = np.ones(n, bool) if weights is None else self.weights > 0
        sizes = np.bincount(self.half[counted], minlength=2)
        if self.half.shape != (n,) or len(sizes) != 2 or sizes.min() < FEWEST:
            raise InputError(
                f"{particles.path or 'particles'}: half sets of {' and '.join(map(str, sizes))} particles: at least "
                f"{FEWEST} each are needed to refine poses"
            )
        self.particles = replace(particles, half=self.half)
        self.counted, self.options, self.device = counted, options, device
        self.portions = Portions("images")
        self.box = particles.box_size
        self.pixel_size = float(np.median(particles.pixel_size))
        self.limit = min(options.r_max or self.box // 2, self.box // 2)
        self.amplitude = measure_spectra(particles, True).noise.sqrt().to(device)
        self.window = fourier.window_mask(self.box).to(device)
        self.place, self.reach = image_scales(particles)
        self.place = None if self.place is None else self.place.to(device)
        self.mine = processes.mine(np.arange(n), options.batch)
        self.score, self.margin = np.zeros(n, np.float32), np.zeros(n, np.float32)

    def reconstruct(self) -> Reconstruction:
        """Both half maps and their FSC with the present poses."""
        posed = replace(self.particles, rotation=self.rotation, shift=self.shift)
        rows = np.flatnonzero(self.counted)
        made = reconstruct(posed, rows=rows, weights=self.weights, processes=self.processes)
        return self.processes.first_does(lambda: made)

    def given(self, maps: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """The start maps as a pair; InputError where they do not fit."""
        if maps is None:
            return None
        pair = (maps, maps) if isinstance(maps, Tensor) else tuple(maps)
        if len(pair) != 2 or any(tuple(one.shape) != (self.box,) * 3 for one in pair):
            shapes = ", ".join(str(tuple(one.shape)) for one in pair)
            raise InputError(f"maps of shapes {shapes}: one or two of box {self.box} are needed, as the particles have")
        return pair

    # --- one round ---------------------------------------------------------------------------------------------------

    def round(
        self, number: int, start: tuple[Tensor, Tensor] | None, reconstruction: Reconstruction | None
    ) -> dict[str, Any]:
        """Search for all particles around their poses and keep the best; what happened as numbers."""
        cone = self.options.cone_of(number)
        radius, pair = self._first(start) if start is not None else self._filtered(reconstruction)
        reach = min(math.ceil(self.reach * radius), self.box // 2)  # of the images' points in the maps
        size = min(self.box, 2 * reach + ROOM)
        source: SliceSource = VolumeSource(
            torch.stack([cropped(one, size) for one in pair]).to(self.device),
            torch.from_numpy(self.half.astype(np.int64)).to(self.device), r_max=reach,
        )  # fmt: skip
        if self.place is not None:
            source = MagnifiedSource(source, self.place)
        options = self._search(cone, radius, size, number, start is not None)
        turns = expmap(ball(cone, cone / 2.5)).to(self.device)
        before = self.rotation.copy()
        disc = fourier.half_disc(self.box, radius, self.device)

        def all_mine() -> None:
            for batch in _batches(self.particles, self.mine, self.options.batch, self.device):
                index = batch.index + int(self.mine[0])
                target = whitened(batch, disc, self.amplitude, self.particles.ctf_premultiplied, self.window)

                def searched(some: slice, index: Tensor = index, target: Target = target) -> Candidates:
                    return self._around(index[some], target.values[some], target.ctf[some], source, options, turns)

                for some, found in self.portions.over(searched, len(index)):
                    self._keep(index[some], found, size)

        self.processes.each(all_mine)  # an image that one cannot read ends all of them
        for values in (self.rotation, self.shift, self.score, self.margin):
            values[:] = self.processes.joined(values[self.mine])
        self.tried = None
        moved = geodesic_deg(torch.from_numpy(before), torch.from_numpy(self.rotation))
        return {
            "round": number + 1, "cone": cone, "radius": radius, "moved_deg": float(moved.median()),
            "score": float(self.score.mean()),
        }  # fmt: skip

    def _keep(self, index: Tensor, found: Candidates, size: int) -> None:
        """Write down the best poses of some images; shifts come in pixels of a box of ``size``."""
        rows = index.cpu().numpy()
        self.rotation[rows] = found.rotation[:, 0].cpu().numpy()
        self.shift[rows] = found.shift[:, 0].cpu().numpy() / size
        self.score[rows] = found.score[:, 0].cpu().numpy()
        self.margin[rows] = pose_search.margin(found).cpu().numpy()
        self.advance(len(rows))

    def _around(
        self,
        index: Tensor,
        values: Tensor,
        transfer: Tensor,
        source: SliceSource,
        options: SearchOptions,
        turns: Tensor,
    ) -> Candidates:
        """Best poses of some images within a ball of small turns."""
        rows = index.cpu().numpy()
        begin = self.rotation[rows, None] if self.tried is None else self.tried[rows]
        shift = torch.from_numpy(self.shift[rows]).to(self.device) * source.box_size
        tried = (turns @ torch.from_numpy(begin).to(self.device)[:, :, None]).flatten(1, 2)
        count = tried.shape[1]
        carried = Candidates(tried, shift[:, None].expand(-1, count, 2), tried.new_zeros(len(rows), count))
        return pose_search.search(source, values, transfer, index, options, carried)

    def _search(self, cone: float, radius: int, size: int, number: int, other_scale: bool) -> SearchOptions:
        """The levels of a search: from the spacing of the ball down to half a Fourier pixel at the rim."""
        order = min(max(round(math.log2(60 * 2.5 / cone)), MIDDLE), 6)
        end = math.ceil(math.log2(60 * radius / 30))  # 30 degrees / radius: half a pixel
        levels = min(max(MIDDLE + 2, MIDDLE + end - order), MIDDLE + 8 - order)
        coarse = min(radius, max(5, round(140 / cone)))  # a step of the ball moves this point by a Fourier pixel
        share = MIDDLE / levels
        r_min = min(max(1, round((coarse - share * radius) / (1 - share))), radius)
        # a local grid of three by three steps, halved at each level, reaches two steps far
        step = self.options.shift / 128 * size * 0.7**number / 2
        return SearchOptions(
            r_min=r_min, r_max=radius, levels=levels, base_order=order - MIDDLE, keep=self.options.keep,
            shift_extent=2 * step / size, shift_grid=1, base="none", fit_scale=other_scale,
        )  # fmt: skip

    def _first(self, start: tuple[Tensor, Tensor]) -> tuple[int, tuple[Tensor, Tensor]]:
        """Given maps and the radius of the coarsest resolution."""
        wanted = math.ceil(self.box * self.pixel_size / self.options.coarsest)
        return min(max(wanted, 6), self.limit), start

    def _filtered(self, one: Reconstruction) -> tuple[int, tuple[Tensor, Tensor]]:
        """The radius up to which half maps agree, and the half maps, masked, each shell scaled by its share of signal.

        What noise is left in a half map would be fitted: its expected signal is FSC times the map.
        """
        mask = half_map_mask(one.map, one.fsc)
        maps = [half * mask for half in (one.half_a, one.half_b)]
        curve = one.fsc.float()
        below = torch.nonzero(curve < SIGNAL).flatten()
        agree = int(below[0]) if len(below) else len(curve)  # entry i is shell i + 1: shells 1 .. agree agree
        wanted = math.ceil(self.box * self.pixel_size / self.options.coarsest)
        radius = min(max(agree, min(wanted, 8), 4), self.limit)
        share = curve.clamp(0.02, 1.0)
        return radius, (_shell_scaled(maps[0], share), _shell_scaled(maps[1], share))


def _shell_scaled(volume: Tensor, share: Tensor) -> Tensor:
    """A map with every shell 1 .. D/2 multiplied by a number, shell 0 as shell 1, the corners removed."""
    D = volume.shape[-1]
    whole = torch.cat([share[:1], share, share.new_zeros(1)])
    shell = torch.fft.ifftshift(shells.shell_index(D, 3))[..., : D // 2 + 1].clamp(max=D // 2 + 1)
    return torch.fft.irfftn(torch.fft.rfftn(volume) * whole[shell], s=volume.shape)


def ball(radius_deg: float, spacing_deg: float) -> Tensor:
    """Rotation vectors (n, 3) float32, radians, of a cubic lattice within a ball, the origin first."""
    steps = int(radius_deg / spacing_deg + 1e-6)
    axis = torch.arange(-steps, steps + 1, dtype=torch.float64) * spacing_deg
    points = torch.cartesian_prod(axis, axis, axis)
    length = points.norm(dim=1)
    points = points[length <= radius_deg + 1e-6]
    return torch.deg2rad(points[points.norm(dim=1).argsort(stable=True)]).float()
