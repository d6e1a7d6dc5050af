"""Endless sets of views of molecules for training pose networks, made on the device; batch n is a pure function of
(seed, n).

A batch holds S molecules: N noisy particles of each, and M noise-free templates from fixed directions (target mode).
Coloured noise is simulated as it is seen after whitening: the picture is divided by the noise's amplitude spectrum and
white noise is added, which is the same thing.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from cryosuite.kernels import chance
from cryosuite.kernels.ctf import CtfParams, ctf
from cryosuite.kernels.density import MOLMAP_SIGMA
from cryosuite.kernels.fourier import real_inverse
from cryosuite.kernels.rotations import expmap, quaternion_to_matrix
from cryosuite.simulate.beads import Beads, phantom_beads, project_beads
from cryosuite.simulate.imaging import ENTROPY

STREAM = 110  # keeps the seeds of this stream apart from those of other streams and data sets
STRUCTURE_RADIUS = (0.13, 0.22)  # of gyration, fraction of the box, as RADIUS of phantoms
CONE_WIDTH = 0.35  # of a preferred direction, about radians


@dataclass(frozen=True)
class ViewOptions:
    """What a batch holds: ``images`` particles, N of each of S = images / N molecules. Pairs are the ends of a range.

    Lengths in Angstrom are drawn with the box's edge ``box_angstrom``: 130-390 A is a pixel of 2-6 A at 64 pixels.
    snr: (start, end): var of the whole clean image with its CTF / var of the noise, before whitening. It is drawn per
    molecule between a floor and ten times that, and the floor falls log-linearly from start to end over the first
    ``curriculum`` images. views: (start, end) likewise (all N from the beginning where both are equal). ctf: share of
    batches with CTF, from ``ctf_from`` (share of the curriculum) on. blind: share of batches in which the CTF is not
    told. low_pass: of templates and candidates, A (as ChimeraX molmap counts it). structures: share of molecules from
    the library. templates: views from fixed directions, 0 for none. hard: candidates per particle beside the one that
    is right within ``jitter_deg`` (-1: no candidates at all); they lie about ``hard_deg`` from it (both: sd of each
    component of the turn, degrees).
    """

    size: int = 32
    images: int = 256
    views: tuple[int, int] = (32, 32)
    templates: int = 0
    hard: int = 1
    jitter_deg: float = 4.0
    hard_deg: float = 25.0
    beads: int = 96
    curriculum: int = 400_000
    snr: tuple[float, float] = (10.0, 0.1)
    ctf: float = 0.8
    ctf_from: float = 0.15
    blind: float = 0.3
    coloured: float = 0.5
    shift: float = 0.08
    cones: float = 0.25
    neighbours: float = 0.2
    junk: float = 0.0
    symmetric: float = 0.1
    structures: float = 0.5
    box_angstrom: tuple[float, float] = (130.0, 390.0)
    low_pass: tuple[float, float] = (12.0, 28.0)

    def with_images(self, images: int) -> ViewOptions:
        """The same for another number of images."""
        return replace(self, images=images)


@dataclass
class FastarBatch:
    """S molecules; images as the network takes them (``network_input``), poses in the conventions of the house.

    index (S,) int64. images (S, N, 2, D, D). rotation (S, N, 3, 3). shift (S, N, 2) fraction of the box that centres.
    known (S, N) bool: False for junk. candidates (S, K, 2, D, D): noise-free views of which each particle has one of
    nearly its own rotation, candidate_rotation (S, K, 3, 3). templates (S, M, 2, D, D), template_rotation (S, M, 3, 3):
    the same for all molecules. mates (S, G, 3, 3). snr (S,).
    """

    index: Tensor
    images: Tensor
    rotation: Tensor
    shift: Tensor
    known: Tensor
    candidates: Tensor
    candidate_rotation: Tensor
    templates: Tensor
    template_rotation: Tensor
    mates: Tensor
    snr: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FastarBatch:
        """The same batch on another device."""
        return FastarBatch(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))


def template_rotations(count: int, device: torch.device | str = "cpu") -> Tensor:  # (M, 3, 3)
    """Rotations of templates, spread evenly over all of SO(3) by super-Fibonacci spirals (Alexa, CVPR 2022).

    Always the same for the same ``count``. With 48 the nearest is 34 degrees away on average and never more than 63:
    every image has a template that looks like it, in-plane angle and all. (Views over half a sphere at one in-plane
    angle, the other choice, leave an image up to 180 degrees from all of them, and the network learnt nothing from
    those in the time we had.)
    """
    s = torch.arange(count, dtype=torch.float64) + 0.5
    inner, outer = (s / count).sqrt(), (1 - s / count).sqrt()
    alpha, beta = 2 * math.pi * s / math.sqrt(2), 2 * math.pi * s / 1.533751168755204288118041
    quaternion = torch.stack(
        [inner * torch.sin(alpha), inner * torch.cos(alpha), outer * torch.sin(beta), outer * torch.cos(beta)], 1
    )
    return quaternion_to_matrix(quaternion).float().to(device)


def soft_disc(size: int, device: torch.device | str = "cpu") -> Tensor:  # (D, D)
    """1 inside 0.42 of the box, a cosine down to 0 at its edge (0.5)."""
    axis = (torch.arange(size, device=device) - size // 2) / size
    radius = (axis[:, None].square() + axis.square()).sqrt()
    return 0.5 + 0.5 * torch.cos(math.pi * ((radius - 0.42) / 0.08).clamp(0, 1))


def network_input(images: Tensor, flipped: Tensor | None = None) -> Tensor:  # (..., D, D) -> (..., 2, D, D)
    """Grey values as the network takes them: per image zero mean and unit standard deviation inside the disc, times the
    disc.

    Args:
        images: (..., D, D) white particles, cropped to the network's size and whitened.
        flipped: the same images with the sign of their CTF undone (phase-flipped), or None where no CTF is known: the
            second channel is then zero. A template has no CTF: give it twice.
    """
    disc = soft_disc(images.shape[-1], images.device)
    total = disc.sum()

    def scaled(x: Tensor) -> Tensor:
        mean = (x * disc).sum((-2, -1), keepdim=True) / total
        x = x - mean
        return x * ((x.square() * disc).sum((-2, -1), keepdim=True) / total).clamp(min=1e-20).rsqrt() * disc

    first = scaled(images)
    return torch.stack([first, torch.zeros_like(first) if flipped is None else scaled(flipped)], -3)


def template_input(images: Tensor) -> Tensor:
    """``network_input`` of noise-free templates (..., D, D): there is no CTF, so both channels show the same."""
    one = network_input(images)[..., :1, :, :]
    return one.expand(*one.shape[:-3], 2, *one.shape[-2:])


class ViewSets:
    """The stream.

    Args:
        options: what a batch holds.
        library: molecules in ANGSTROM to take besides phantoms (``structure_beads``, padded to any K), or None.
        seed: of everything. device: where batches are made. parts: processes that each make ``options.images`` a step.
    """

    def __init__(
        self,
        options: ViewOptions,
        library: Beads | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        parts: int = 1,
    ) -> None:
        self.options, self.seed, self.device, self.parts = options, seed, torch.device(device), parts
        self.library = None if library is None else library.to(self.device)
        self.template_rotation = template_rotations(options.templates, self.device)
        fy = torch.fft.fftfreq(options.size, device=self.device)
        fx = torch.fft.rfftfreq(options.size, device=self.device)
        self.frequency = torch.stack([g.reshape(-1) for g in torch.broadcast_tensors(fx[None], fy[:, None])], 1)

    def generator(self, number: int) -> torch.Generator:
        """The random numbers of one batch."""
        words = np.random.SeedSequence([ENTROPY, self.seed, STREAM, number, 0]).generate_state(2, np.uint32)
        return torch.Generator(device=self.device).manual_seed((int(words[0]) << 31) ^ int(words[1]))

    def progress(self, seen: int) -> float:
        """Share of the curriculum that lies behind ``seen`` images, 0 .. 1."""
        return min(seen / max(self.options.curriculum, 1), 1.0)

    def snr_floor(self, seen: int) -> float:
        """Lower end of the signal to noise ratios drawn after ``seen`` images."""
        start, end = self.options.snr
        return float(start * (end / start) ** self.progress(seen))

    def view_count(self, seen: int) -> int:
        """N after ``seen`` images."""
        start, end = self.options.views
        return int(round(start * (end / start) ** self.progress(seen)))

    def sets_of(self, seen: int) -> tuple[int, int]:
        """How many sets the batch of all processes has after ``seen`` images, and the views of each."""
        count = min(self.view_count(seen), self.options.images)
        return self.options.images * self.parts // count, count

    def molecules(self, sets: int, generator: torch.Generator) -> tuple[Beads, Tensor]:
        """S molecules in random orientation, in fractions of the box; edge of the box (S,) A."""
        o, device = self.options, self.device
        low, high = (math.log(v) for v in o.box_angstrom)
        edge = torch.exp(low + (high - low) * torch.rand(sets, generator=generator, device=device))
        made = phantom_beads(sets, generator, o.beads, o.symmetric)
        turn = quaternion_to_matrix(torch.randn(sets, 4, generator=generator, device=device))
        if self.library is not None:
            made, edge = self._with_structures(made, edge, generator)
        return made.turned(turn), edge

    def _with_structures(self, phantoms: Beads, edge: Tensor, generator: torch.Generator) -> tuple[Beads, Tensor]:
        """Some of the phantoms replaced by molecules of the library, at random scales."""
        o, library, device, sets = self.options, self.library, self.device, len(phantoms)
        which = torch.randint(len(library), (sets,), generator=generator, device=device)
        share = torch.rand(sets, generator=generator, device=device)
        low, high = STRUCTURE_RADIUS
        radius = low + (high - low) * torch.rand(sets, generator=generator, device=device)
        taken = library.rows(which)
        size = (taken.xyz.square().sum(-1) * taken.weight).sum(1).sqrt()  # A
        real = size / radius  # edge of the box for that radius
        taken, use = taken.scaled(1 / real), share < o.structures
        return _either(use, taken, phantoms), torch.where(use, real, edge)

    project = staticmethod(project_beads)  # what another kind of molecule has its own of

    def directions(self, sets: int, count: int, generator: torch.Generator) -> Tensor:  # (S, N, 3, 3)
        """Rotations: uniform, or for a share of the molecules about one preferred direction, any in-plane angle."""
        o, device = self.options, self.device
        view = chance.randn(sets, count, 3, generator=generator, device=device)
        view = view / view.norm(dim=-1, keepdim=True)
        preferred = chance.randn(sets, 1, 3, generator=generator, device=device)
        preferred = preferred / preferred.norm(dim=-1, keepdim=True)
        cone = chance.rand(sets, 1, 1, generator=generator, device=device) < o.cones
        scatter = CONE_WIDTH * chance.randn(sets, count, 3, generator=generator, device=device)
        view = torch.where(cone, preferred + scatter, view)
        view = view / view.norm(dim=-1, keepdim=True)
        other = chance.randn(sets, count, 3, generator=generator, device=device)
        x = torch.linalg.cross(other, view)
        x = x / x.norm(dim=-1, keepdim=True)
        return torch.stack([x, torch.linalg.cross(view, x), view], -2)

    def batch(self, number: int, seen: int | None = None, part: int = 0) -> FastarBatch:
        """Batch ``number`` of the stream for one process (``part``), after ``seen`` images; None: as in training.

        Process r of w makes the molecules r, r + w, ... of the batch that one process alone would make.
        """
        o, device = self.options, self.device
        generator = self.generator(number)
        seen = number * o.images * self.parts if seen is None else seen
        total, count = self.sets_of(seen)
        beads, edge = self.molecules(total, generator)
        rotation = self.directions(total, count, generator)
        shift = (2 * torch.rand(total, count, 2, generator=generator, device=device) - 1) * o.shift
        own = slice(part, total, self.parts)
        index = torch.arange(total, device=device)[own] + number * total
        with chance.sharing(chance.Share(own, total) if self.parts > 1 else None):
            return self._imaged(beads.rows(own), edge[own], rotation[own], shift[own], index, seen, generator)

    def _imaged(
        self, beads: Beads, edge: Tensor, rotation: Tensor, shift: Tensor, index: Tensor, seen: int,
        generator: torch.Generator,
    ) -> FastarBatch:  # fmt: skip
        """The batch of these molecules, views and shifts."""
        o, device, (sets, count) = self.options, self.device, rotation.shape[:2]
        which = torch.arange(sets, device=device)
        clean = self.project(
            beads, which.repeat_interleave(count), rotation.flatten(0, 1), shift.flatten(0, 1), o.size
        ).view(sets, count, o.size, o.size)
        clean = self._with_neighbours(clean, beads, generator)
        known = torch.ones(sets, count, dtype=torch.bool, device=device)
        if o.junk:
            known[:, count - int(o.junk * count) :] = False
            clean = torch.where(known[..., None, None], clean, 0)
        low, high = math.log(self.snr_floor(seen)), math.log(min(10 * self.snr_floor(seen), max(o.snr)))
        snr = torch.exp(low + (high - low) * chance.rand(sets, generator=generator, device=device))
        images, flipped = self._exposed(clean, edge, snr, self.progress(seen) >= o.ctf_from, generator)
        near = self.candidates(rotation, generator)
        marks = self.template_rotation.expand(sets, -1, -1, -1)
        clear = self.noise_free(beads, edge, torch.cat([near, marks], 1), generator)
        split = near.shape[1]
        return FastarBatch(
            index=index, images=network_input(images, flipped), rotation=rotation, shift=shift,
            known=known, candidates=clear[:, :split], candidate_rotation=near, templates=clear[:, split:],
            template_rotation=marks, mates=beads.mates, snr=snr,
        )  # fmt: skip

    def candidates(self, rotation: Tensor, generator: torch.Generator) -> Tensor:  # (S, N, 3, 3) -> (S, K, 3, 3)
        """For each particle a rotation that is nearly right and ``hard`` that are not."""
        o = self.options
        if o.hard < 0:
            return rotation[:, :0]
        spread = [o.jitter_deg] + o.hard * [o.hard_deg]
        (sets, count), how = rotation.shape[:2], {"generator": generator, "device": self.device}
        turns = chance.rows(lambda n: torch.randn(len(spread), n, count, 3, **how).transpose(0, 1), sets)
        turns = turns.transpose(0, 1)
        angle = torch.tensor(spread, device=self.device).view(-1, 1, 1, 1) * (math.pi / 180)
        return torch.cat(list(expmap(turns * angle) @ rotation), 1)

    def views_of(self, number: int, rotation: Tensor, resolution: float = 20.0) -> Tensor:
        """Noise-free views (S, K, 2, D, D) of the molecules of batch ``number`` at rotations (K, 3, 3); S as at the end
        of the curriculum."""
        sets = self.options.images // min(self.options.views[1], self.options.images)
        beads, edge = self.molecules(sets, self.generator(number))
        plain = copy(self)
        plain.options = replace(self.options, low_pass=(resolution, resolution))
        return plain.noise_free(beads, edge, rotation.expand(sets, -1, -1, -1), self.generator(0))

    def noise_free(self, beads: Beads, edge: Tensor, rotation: Tensor, generator: torch.Generator) -> Tensor:
        """Centred views (S, K, 2, D, D) without noise, low-passed by a Gaussian, as the network takes them."""
        o, device, (sets, count) = self.options, self.device, rotation.shape[:2]
        low, high = o.low_pass
        resolution = low + (high - low) * chance.rand(sets, generator=generator, device=device)
        blur = MOLMAP_SIGMA * resolution / edge
        which = torch.arange(sets, device=device).repeat_interleave(count)
        still = torch.zeros(len(which), 2, device=device)
        images = self.project(beads, which, rotation.flatten(0, 1), still, o.size, blur[which])
        return template_input(images.view(sets, count, o.size, o.size))

    def _with_neighbours(self, clean: Tensor, beads: Beads, generator: torch.Generator) -> Tensor:
        """The first few particles of each set get another copy of the molecule beside them, mostly out of the picture.

        The place in a set means nothing, so it does not matter that they are the first.
        """
        o, device, sets = self.options, self.device, len(beads)
        few = int(o.neighbours * clean.shape[1])
        if not few:
            return clean
        rotation = self.directions(sets, few, generator).flatten(0, 1)
        angle = 2 * math.pi * chance.rand(sets, few, generator=generator, device=device).flatten()
        far = 0.5 + 0.3 * chance.rand(sets, few, generator=generator, device=device).flatten()
        away = torch.stack([far * torch.cos(angle), far * torch.sin(angle)], 1)
        which = torch.arange(sets, device=device).repeat_interleave(few)
        other = self.project(beads, which, rotation, away, o.size).view(sets, few, o.size, o.size)
        return torch.cat([clean[:, :few] + other, clean[:, few:]], 1)

    def _exposed(
        self, clean: Tensor, edge: Tensor, snr: Tensor, contrast: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Whitened noisy images (S, N, D, D), and phase-flipped ones (0 where the CTF is not told)."""
        o, device, (sets, count) = self.options, self.device, clean.shape[:2]
        draw = torch.rand(3, generator=generator, device="cpu" if device.type == "cpu" else device)
        knee = torch.exp(chance.rand(sets, generator=generator, device=device) * 2.3 - 1.5) * 0.25  # cycles/pixel
        gain = 0.7 + 0.6 * chance.rand(sets, count, 1, 1, generator=generator, device=device)
        params = self._optics(edge, count, generator)
        spectra = torch.fft.rfft2(clean)
        # drawn on the device and never read back: both ways are blended by 0/1 factors
        on = (draw[0] < o.ctf).to(clean.dtype) if contrast else torch.zeros((), device=device)
        values = ctf(self.frequency, params).view(sets, count, *spectra.shape[-2:]).to(clean.dtype)
        values = on * values + (1 - on)
        sign = torch.where(values < 0, -1.0, 1.0)
        spectra = spectra * values
        power = real_inverse(spectra, (o.size, o.size)).var((1, 2, 3))  # (S,)
        s2 = self.frequency.square().sum(1).view(spectra.shape[-2:])
        colour = 1 / (1 + s2 / knee[:, None, None].square())
        colour = colour / colour.mean((1, 2), keepdim=True)
        tinted = (draw[1] < o.coloured).to(clean.dtype)
        amplitude = (tinted * colour + 1 - tinted).rsqrt()[:, None]
        scale = (snr / power.clamp(min=1e-30)).sqrt()[:, None, None, None]
        white = chance.randn(*clean.shape, generator=generator, device=device)
        spectra = spectra * amplitude * scale * gain + torch.fft.rfft2(white)
        images = real_inverse(spectra, (o.size, o.size))
        return images, real_inverse(spectra * sign, (o.size, o.size)) * (draw[2] >= o.blind).to(clean.dtype)

    def _optics(self, edge: Tensor, count: int, generator: torch.Generator) -> CtfParams:
        """Microscopes drawn per molecule, defocus per particle."""
        sets, device = len(edge), self.device

        def uniform(low: float, high: float, per: int = 1) -> Tensor:
            drawn = low + (high - low) * chance.rand(sets, per, generator=generator, device=device)
            return drawn.expand(sets, count).reshape(-1)

        defocus, half = 1e4 * uniform(0.8, 3.0, count), uniform(0, 300, count)
        voltage = torch.where(uniform(0, 1) < 0.5, 200.0, 300.0)
        pixel = (edge / self.options.size).repeat_interleave(count)
        return CtfParams(
            defocus + half, defocus - half, uniform(0, 180, count), voltage, uniform(0.01, 2.7), uniform(0.07, 0.1),
            torch.zeros_like(pixel), pixel, bfactor=uniform(0, 150),
        )  # fmt: skip


def _either(use: Tensor, first: Beads, second: Beads) -> Beads:
    """Molecules of ``first`` where ``use`` (M,), else of ``second``; padded to the larger K and number of mates."""

    def joined(a: Tensor, b: Tensor, filler: Tensor | float) -> Tensor:
        size = max(a.shape[1], b.shape[1])
        wide = []
        for v in (a, b):
            pad = torch.zeros(len(v), size - v.shape[1], *v.shape[2:], device=v.device, dtype=v.dtype) + filler
            wide.append(torch.cat([v, pad], 1))
        return torch.where(use.view(-1, *(1,) * (a.ndim - 1)), *wide)

    eye = torch.eye(3, device=use.device)
    return Beads(
        joined(first.xyz, second.xyz, 0.0), joined(first.weight, second.weight, 0.0),
        joined(first.width, second.width, 1.0), joined(first.mates, second.mates, eye),
    )  # fmt: skip
