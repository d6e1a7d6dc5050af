"""CryoHype (arXiv 2512.06332): a transformer reads a particle and writes the weights of that particle's own volume.

Poses and CTF are known. What differs from the paper by default: complex field on the half disc, whitened loss, learnt
positions, frequency marching, averaged tokens for volumes; very noisy images are read as two halves that judge one
another, of others some volumes are read in part from another image (hype_views). ``--preset paper`` goes back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.loader import Batch, BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import measure_spectra, slice_matrices
from cryosuite.errors import InputError, notice
from cryosuite.kernels import fourier
from cryosuite.methods.hype_latent import LatentSpace, TokensFromImages, build_bank, principal_axes, subset_rows
from cryosuite.methods.hype_model import HypeModel
from cryosuite.methods.hype_options import HypeOptions
from cryosuite.methods.hype_views import BEGIN
from cryosuite.reconstruct.backproject import common_pixel_size
from cryosuite.training.inference import encode_all
from cryosuite.training.method import Step
from cryosuite.training.schedule import march

# ``Spectra.seen`` below which images are read as two halves: mixtures, assemblies and loops of 32 pixels have 350 to
# 380 at SNR 0.1, where that costs the assembly's latents, and 35 to 40 at SNR 0.01, where it gains everywhere
HALVES_BELOW = 120.0
FULL_SET_AFTER = 0.85  # of the training: no coefficient sampling any more

# what the encoder sees (P,) or None for all, which coefficients judge it, and their weight in the loss
Reading = tuple[Tensor | None, Tensor | slice, Tensor | float]


class Hype:
    """The method: see training/method.py for its verbs.

    ``space`` holds the principal axes and the token bank once ``embed`` has run (or a run was loaded); until then
    ``encode`` gives the pooled scales themselves. ``tokens_at`` may be set to something better than the bank.
    """

    name = "hype"

    def __init__(self, options: HypeOptions | None = None, precision: str = "auto") -> None:
        self.options, self.precision = options or HypeOptions(), precision
        self.space: LatentSpace | None = None
        self.tokens_at: TokensFromImages | None = None
        self.pixel_size = 1.0  # of the volumes, Angstrom; known once the model is built
        self.halves = False  # whether images are read as two halves; known once the model is built for training
        self._chances: dict[int, Tensor] = {}  # of coefficients, per number of them

    def check(self, particles: ParticleSet) -> None:
        """Raises InputError where poses are missing or the box does not fit the patches."""
        if particles.rotation is None:
            raise InputError(f"{particles.path}: train-hype needs poses; none are given (--poses poses.pkl)")
        box_size, rmax, patch = particles.box_size, self.options.encoder_rmax, self.options.patch
        size = 2 * min(rmax or box_size // 2, box_size // 2)
        if patch and size % patch:
            raise InputError(
                f"--patch {patch}: must divide the encoder's image of {size} pixels "
                f"(box {box_size}, --encoder-rmax {rmax})"
            )

    # the verbs of a method -------------------------------------------------------------------------------------------

    def build(self, particles: ParticleSet) -> HypeModel:
        """The model; raises InputError as ``check`` does."""
        self.check(particles)
        self._chances.clear()
        self.pixel_size = common_pixel_size(particles.pixel_size)
        spectra = measure_spectra(particles, self.options.window)
        model = HypeModel(particles.box_size, self.options, spectra, particles.ctf_premultiplied)
        self.halves = self.options.reading == "halves"
        if self.options.reading == "auto" and spectra.seen < HALVES_BELOW:
            self.halves = True
            notice(
                f"the images hold little signal ({spectra.seen:.0f} times the noise of one coefficient in all): each "
                "is read as two halves in a step, for half as much time again (--reading whole does not)"
            )
        if self.options.other_views > 0 and not self.halves:
            model.remember_views()
        return model

    def loss(self, model: HypeModel, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Whitened squared error per coefficient of the half disc: 1 for pure noise."""
        device = batch.images.device
        disc = fourier.half_disc(model.box_size, device=device)
        half = model.box_size / 2
        # whole rings: for every new number of points the CPU's kernels keep buffers, gigabytes over a run
        r_max = math.ceil(march(step.fraction, self.options.march_from * half, half, self.options.march_over))
        count = disc.count(r_max)
        target, total = model.target(batch), 0.0
        for seen, points, weight in self._readings(model, disc, count, step):
            tokens = model.tokens(model.image(target, batch, seen), batch)
            if model.other_views is not None:
                share = self.options.other_views if step.fraction >= BEGIN else 0.0
                tokens = model.other_views.blended(tokens, model.pool(tokens.detach()), batch.rotation[:, 2], share)
            condition = model.condition(tokens)
            with torch.autocast(device.type, enabled=False):
                q = slice_frequencies(disc.frequency[points], slice_matrices(batch, self.pixel_size))
            values = model.values(q, q.norm(dim=-1) * model.box_size, condition)
            with torch.autocast(device.type, enabled=False):
                difference = torch.view_as_real(target.values[:, points]) - target.ctf[:, points, None] * values
                total = total + (difference.square().sum(-1) * weight).sum(1).mean()
        return {"loss": total}

    def encode(self, model: HypeModel, batch: Batch) -> Tensor:
        """Latents (b, 64); pooled scales before the principal axes are known; all tokens with ``--latent tokens``."""
        _, image = model.prepare(batch)
        tokens = model.tokens(image, batch)
        if self.options.latent == "tokens":
            return tokens.float().flatten(1)
        pooled = model.pool(tokens)
        return pooled if self.space is None else self.space.project(pooled)

    def decode(self, model: HypeModel, z: Tensor) -> Tensor:
        """Volumes (k, D, D, D) float32 at latents z (k, zdim), in the grey values of the images."""
        return model.volumes(self.tokens(model, z))

    # latents and tokens ----------------------------------------------------------------------------------------------

    def tokens(self, model: HypeModel, z: Tensor) -> Tensor:  # (k, zdim) -> (k, t, dim)
        """Weight tokens at latents."""
        if self.options.latent == "tokens":
            return z.view(len(z), sum(model.layer_tokens), -1)
        if self.tokens_at is not None:
            return self.tokens_at(z)
        if self.space is None or len(self.space.bank_z) == 0:
            raise InputError("no latent space yet: volumes can be made once the particles have been encoded")
        return self.space.tokens_at(z)

    def embed(self, model: HypeModel, particles: ParticleSet, progress: bool = True, bank: bool = True) -> np.ndarray:
        """Encode all particles, find the principal axes and fill the bank; the latents (N, zdim) of all of them."""
        on_cpu = next(model.parameters()).device.type == "cpu"
        how = {"precision": "32" if on_cpu else self.precision, "progress": progress}
        self.space, self.tokens_at = None, None
        if self.options.latent == "tokens":
            return encode_all(self, model, particles, **how).astype(np.float16)
        rows = subset_rows(particles)
        whole = len(rows) == len(particles)
        pooled = encode_all(self, model, particles if whole else particles.subset(rows), **how)
        self.space = principal_axes(pooled)
        z = self.space.project(torch.from_numpy(pooled)).numpy() if whole else encode_all(self, model, particles, **how)
        if bank:
            build_bank(self.space, z, self.reader(model, particles), self.options.bank, self.options.knn)
        return z

    def reader(self, model: HypeModel, particles: ParticleSet):
        """A function rows -> iterator of (rows, tokens), for hype_latent."""

        def read(rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
            device = next(model.parameters()).device
            loader = BatchLoader(particles.subset(rows), 256, shuffle=False, device=device)
            for batch in loader.epoch(0):
                with torch.inference_mode():
                    tokens = model.tokens(model.prepare(batch)[1], batch)
                yield rows[batch.index.cpu().numpy()], tokens

        return read

    def use_images(self, model: HypeModel, particles: ParticleSet, z: np.ndarray) -> None:
        """From now on decode from the images of the particles nearest to z instead of from the bank."""
        o = self.options
        self.tokens_at = TokensFromImages(z, self.reader(model, particles), o.volume_from, o.knn)

    # parts -----------------------------------------------------------------------------------------------------------

    def _readings(self, model: HypeModel, disc: fourier.HalfDisc, count: int, step: Step) -> list[Reading]:
        """How the images of a step are read: whole, or as two halves that are judged by one another.

        Of the first ``count`` coefficients all are judged, or a sample that follows the SNR. What is drawn is drawn on
        the CPU, so that a GPU need not be waited for.
        """
        sample = self.options.sample_coefficients and step.fraction < FULL_SET_AFTER
        if not sample and not self.halves:
            return [(None, slice(0, count), 1 / count)]
        chance = self._chance(model, disc, count) if sample else None
        points = torch.arange(count) if chance is None else systematic_sample(chance)
        if not self.halves:
            return [(None, points.to(disc.device), (1 / chance[points] / count).to(disc.device))]
        made = []
        for seen, own in two_halves(points, len(disc)):
            weight = 1 / (2 * len(own)) if chance is None else (1 / chance[own] / count).to(disc.device)
            made.append((seen.to(disc.device), own.to(disc.device), weight))
        return made

    def _chance(self, model: HypeModel, disc: fourier.HalfDisc, count: int) -> Tensor:
        """Chances (count,) of the coefficients to be drawn."""
        if count not in self._chances:
            shell, radius = disc.shell[:count].cpu(), disc.radius[:count].cpu()
            snr = (model.envelope.square() / model.noise_amplitude.square().mean(0)).cpu()[shell]
            always = radius <= self.options.sample_radius * model.box_size / 2
            self._chances[count] = inclusion(snr, always, max(1, round(self.options.sample_fraction * count)))
        return self._chances[count]


def two_halves(points: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:  # (m,) -> two of (size,), (m // 2,)
    """Two readings of an image with ``size`` coefficients: which the encoder sees, and by which it is judged.

    Each of ``points`` is seen in one reading and judges the other (of an odd number one judges neither); the rest
    goes to either at random. No coefficient is seen by the reading that it judges: what an image's own noise does to
    its volume is then no help to guess the image (noise2self, arXiv 1901.11365).
    """
    order = points[torch.randperm(len(points))]
    half = len(points) // 2
    first, second = order[:half].sort()[0], order[half : 2 * half].sort()[0]
    seen = torch.rand(size) < 0.5
    seen[first], seen[second] = True, False
    return [(seen, second), (~seen, first)]


def slice_frequencies(frequency: Tensor, rotation: Tensor) -> Tensor:  # (P, 2), (b, 3, 3) -> (b, P, 3)
    """Where the points of a central slice lie in the volume's transform: (kx, ky, 0) @ R, cycles per pixel."""
    return frequency @ rotation[:, :2]


def inclusion(snr: Tensor, always: Tensor, count: int) -> Tensor:  # (n,), (n,) -> (n,)
    """Chances in (0, 1] that sum to ``count``: 1 where ``always``, else as far as possible in proportion to the SNR.

    No chance is below a tenth of the even one, which bounds the weights 1 / chance.
    """
    n = len(snr)
    count = min(n, max(count, int(always.sum()) + 1))
    floor = 0.1 * count / n
    chance = torch.where(always, torch.ones_like(snr), snr.clamp_min(1e-12))
    fixed = always.clone()
    for _ in range(20):  # chances that reach 1 leave the budget for the others
        budget = count - fixed.sum()
        free = torch.where(fixed, torch.zeros_like(snr), snr.clamp_min(1e-12))
        scaled = (free * budget / free.sum().clamp_min(1e-30)).clamp_min(floor)
        chance = torch.where(fixed, torch.ones_like(snr), scaled.clamp(max=1))
        fixed = fixed | (scaled >= 1)
    return chance


def systematic_sample(chance: Tensor) -> Tensor:  # (n,) -> (m,) sorted indices
    """Systematic sampling: index i with probability chance_i, and m = round(sum of chances) or one off."""
    start = torch.rand((), device=chance.device)
    edges = torch.floor(torch.cumsum(chance, 0) + start)
    before = torch.cat([torch.zeros_like(edges[:1]), edges[:-1]])
    return torch.nonzero(edges > before).squeeze(1)
