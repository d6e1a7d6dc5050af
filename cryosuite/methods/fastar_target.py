"""Training on one known molecule: particles simulated from its map, or real particles with known poses."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.loader import BatchLoader
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError, notice
from cryosuite.formats.mrc import read_map
from cryosuite.kernels import chance, fourier
from cryosuite.kernels.slices import extract_slices
from cryosuite.methods.fastar_images import Preparation, Window, choose_window
from cryosuite.methods.fastar_options import HELD_OUT, FastarOptions
from cryosuite.methods.fastar_reference import Reference, Views, load_reference
from cryosuite.simulate.imaging import ENTROPY
from cryosuite.simulate.view_sets import FastarBatch, ViewOptions, ViewSets

LOW_PASS = 20.0  # A, of the map, as at inference
TENTH = 10  # every tenth real particle is kept to test on
FEWEST = 100  # real particles worth tuning on
REAL_SNR = 1.0  # what real particles are noted with; nobody measured it
REAL_STREAM = 111


@dataclass
class OneMolecule:
    """Sets of one and the same molecule, in place of ``Beads``."""

    sets: int
    mates: Tensor  # (S, 1, 3, 3)

    def __len__(self) -> int:
        return self.sets

    def rows(self, index: slice) -> OneMolecule:
        """Some of the sets."""
        mates = self.mates[index]
        return OneMolecule(len(mates), mates)


class MapViews(ViewSets):
    """The stream of particles of one map: projections are central slices of it, shifts exact phases.

    Args:
        views: of the map, at the network's size. edge: of the field, A. options, seed, device, parts: as ViewSets.
    """

    def __init__(
        self, options: ViewOptions, views: Views, edge: float, seed: int, device: torch.device, parts: int
    ) -> None:
        super().__init__(options, None, seed, device, parts)
        self.views, self.edge = views, edge

    def molecules(self, sets: int, generator: torch.Generator) -> tuple[OneMolecule, Tensor]:
        """The one molecule, ``sets`` times; the edge of the field (S,) A."""
        mates = torch.eye(3, device=self.device).expand(sets, 1, 3, 3)
        return OneMolecule(sets, mates), torch.full((sets,), self.edge, device=self.device)

    def project(
        self, molecule: OneMolecule, which: Tensor, rotation: Tensor, shift: Tensor, size: int,
        blur: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Clean projections (b, D, D) with mean zero. The map is low-passed already: ``blur`` is not used."""
        disc = self.views.disc
        spectra = extract_slices(self.views.transform, rotation, disc)
        return fourier.from_half_disc(fourier.phase_shift(spectra, disc, -shift), disc)


class PosedViews(MapViews):
    """The stream of real particles with known poses, beside projections of their map.

    Args: as MapViews; particles, preparation: the set and how its images become the network's input; rows: those used.
    """

    def __init__(
        self, options: ViewOptions, views: Views, edge: float, seed: int, device: torch.device, parts: int,
        particles: ParticleSet, preparation: Preparation, rows: np.ndarray,
    ) -> None:  # fmt: skip
        super().__init__(options, views, edge, seed, device, parts)
        self.particles, self.preparation, self.rows = particles, preparation, rows
        self.loader = BatchLoader(particles, 1, prefetch=0)

    def batch(self, number: int, seen: int | None = None, part: int = 0) -> FastarBatch:
        """Batch ``number``: sets of particles drawn at random; process r of w has the sets r, r + w, ..."""
        rng = np.random.default_rng([ENTROPY, REAL_STREAM, self.seed, number])
        total, count = self.sets_of(number * self.options.images * self.parts if seen is None else seen)
        drawn = rng.choice(self.rows, total * count, replace=len(self.rows) < total * count).reshape(total, count)
        own = slice(part, total, self.parts)
        unique, back = np.unique(drawn[own].ravel(), return_inverse=True)
        real = self.loader.batch(unique)
        images, good = self.preparation(real)
        again = torch.from_numpy(back).to(images.device).view(-1, count)
        generator, sets = self.generator(number), len(again)
        rotation = real.rotation.to(self.device)[again]
        molecule, edge = self.molecules(sets, generator)
        with chance.sharing(chance.Share(own, total) if self.parts > 1 else None):
            near = self.candidates(rotation, generator)
            marks = self.template_rotation.expand(sets, -1, -1, -1)
            clear = self.noise_free(molecule, edge, torch.cat([near, marks], 1), generator)
        split = near.shape[1]
        return FastarBatch(
            index=torch.arange(total, device=self.device)[own] + number * total, images=images[again],
            rotation=rotation, shift=real.shift.to(self.device)[again] / self.preparation.window.share,
            known=good[again], candidates=clear[:, :split], candidate_rotation=near, templates=clear[:, split:],
            template_rotation=marks, mates=molecule.mates, snr=torch.full((sets,), REAL_SNR, device=self.device),
        )  # fmt: skip


class TargetViews:
    """One known molecule to be tuned on: what ``Molecules`` makes its stream from."""

    def __init__(self, reference: Reference, window: Window, pixel_size: float, particles: ParticleSet | None) -> None:
        self.reference, self.window, self.particles = reference, window, particles
        self.edge = window.width * pixel_size
        volume = np.ascontiguousarray(reference.volume.numpy())
        self.key = float(zlib.crc32(volume.tobytes(), 0 if particles is None else len(particles)) % 65521)

    def stream(self, options: ViewOptions, seed: int, device: torch.device, parts: int) -> MapViews:
        """The stream; of the seed HELD_OUT the real particles that are not trained on."""
        views = Views(self.reference.volume, self.window, 2, device)
        if self.particles is None:
            return MapViews(options, views, self.edge, seed, device, parts)
        rows = np.arange(len(self.particles))
        rows = rows[rows % TENTH == 0] if seed == HELD_OUT else rows[rows % TENTH != 0]
        ready = Preparation(self.particles, self.window, 2, device)
        return PosedViews(options, views, self.edge, seed, device, parts, self.particles, ready, rows)


def open_target(options: FastarOptions, size: int) -> TargetViews:
    """The map of ``--map`` and, where given, the particles of ``--finetune``.

    Raises InputError for a map without a pixel size, and for particles that are too few or have no poses.
    """
    low_pass = 0.0 if options.full_map else LOW_PASS
    if options.full_map:
        notice("--full-map: the map's details go into the poses, so the whole FSC of maps made with them is biased")
    path = Path(options.map)
    particles = None
    if options.finetune:
        particles = open_particles(options.finetune)
        if len(particles) < FEWEST:
            raise InputError(f"{options.finetune}: {len(particles)} particles; at least {FEWEST} are needed to tune on")
        box, pixel = particles.box_size, float(np.median(particles.pixel_size))
    else:
        found = read_map(path)
        if not found.pixel_size:
            raise InputError(f"{path}: the header has no pixel size; write it there (e.g. with ChimeraX or relion)")
        box, pixel = 2 * math.ceil(max(found.data.shape) / 2), float(found.pixel_size)
    reference = load_reference(box, pixel, path, None, low_pass)
    return TargetViews(reference, choose_window(box, size, reference.gyration), pixel, particles)
