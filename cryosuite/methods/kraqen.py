"""CryoKRAQEN with a network field (Gao et al., CVPR 2026): K codes over one tri-plane basis, no encoder.

A particle is described by its shares in K codes and by its own code, the MAP estimate around the mix. Formulas as
published; the linear read-out of a slice, the own code f_i and the margins are ours, for the paper does not give them.
Poses and CTF are known. The voxel field of the same assignment engine is in kraqen_voxel.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cryosuite.data.loader import Batch, BatchLoader
from cryosuite.data.particles import ParticleSet
from cryosuite.data.spectra import SPECTRUM_IMAGES, measure_spectra, whitened
from cryosuite.errors import InputError
from cryosuite.kernels import assignment, chance, fourier
from cryosuite.kernels.triplet import alignment_loss, triplet_loss, triplet_margin
from cryosuite.methods.kraqen_model import KraqenModel, Scene
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.reconstruct.backproject import common_pixel_size
from cryosuite.reconstruct.weights import ClassWeights, stacked
from cryosuite.training.inference import encode_batches
from cryosuite.training.launch import world
from cryosuite.training.method import Step
from cryosuite.training.schedule import march

CONSENSUS_STEPS, CONSENSUS_PART = 250, 0.05  # first steps, in which all codes are the consensus: the fewer of the two
SUBSPACE_PART = 0.3  # of the training, before the k-means start
SPLIT_UNTIL = 0.8
EM_CODES = 3  # codes whose slices the EM loss compares one by one; the rest of the shares as one mixed slice


class Kraqen:
    """The method: see training/method.py for its verbs."""

    name = "kraqen"

    def __init__(self, options: KraqenOptions | None = None) -> None:
        self.options = options or KraqenOptions(field="triplane")
        self._step = -1  # the step whose start has been seen to: pieces of one batch share it

    def check(self, particles: ParticleSet) -> None:
        """Raises InputError where poses are missing or the field is not a network."""
        if self.options.field == "voxel":
            raise InputError("--field voxel is not trained by steps; a network field is triplane or fourier")
        if particles.rotation is None:
            raise InputError(f"{particles.path}: train-kraqen needs poses; none are given (--poses poses.pkl)")

    # the verbs of a method -------------------------------------------------------------------------------------------

    def build(self, particles: ParticleSet) -> KraqenModel:
        """The model; raises InputError as ``check`` does."""
        self.check(particles)
        self._step = -1
        spectra = measure_spectra(particles, window=False)
        pixel_size = common_pixel_size(particles.pixel_size)
        model = KraqenModel(
            particles.box_size, self.options, spectra, particles.ctf_premultiplied, len(particles), pixel_size
        )
        model.power.copy_(whitened_power(model, particles))
        return model

    def parameter_groups(self, model: KraqenModel) -> list[dict]:
        """Planes and codes learn ``fast`` times as fast as the network."""
        planes = [p for name, p in model.named_parameters() if "planes" in name]
        network = [p for name, p in model.named_parameters() if "planes" not in name and name != "codes"]
        groups = [{"params": [*planes, model.codes], "lr_scale": self.options.fast}, {"params": network}]
        return [group for group in groups if group["params"]]

    def loss(self, model: KraqenModel, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Distance of the data from the mixed slice per coefficient, and the triplet loss when it is on."""
        self._begin(model, len(batch), step)
        o, half = self.options, model.box_size / 2
        r_max = math.ceil(march(step.fraction, o.march_from * half, half, o.march_over))
        scene = model.scene(batch, r_max)
        with torch.autocast(batch.images.device.type, enabled=False):
            return self._loss(model, scene, r_max, step)

    def _loss(self, model: KraqenModel, scene: Scene, r_max: int, step: Step) -> dict[str, Tensor]:
        o = self.options
        system = model.gram(scene)
        codes = self._jittered(model, step)
        p, logits, t = self._shares(model, system, scene.points, r_max, step, codes)
        phase = self._phase(step)
        extra: dict[str, Tensor] = {}
        if phase == "consensus":
            mask = torch.zeros_like(codes[0])
            mask[0] = 1
            error = self._distance(model, scene, ((p @ codes) * mask)[:, None])[:, 0].mean()
        elif phase == "subspace":
            f = model.own_codes(system, p)
            model.remember(f, system)
            error = self._distance(model, scene, f[:, None])[:, 0].mean() + 0 * codes.sum()
        else:
            if model.training:
                model.count(p.detach())
            error = self._error(model, scene, p, codes, step)
            if o.beta > 0:
                f = model.own_codes(system, p.detach())
                negative = torch.softmax(-logits.detach() / t, dim=1)
                margin = triplet_margin(codes.detach(), o.margin)
                triplet = triplet_loss(f, codes, p, negative, margin) + alignment_loss(f, codes, p, o.alignment)
                extra["triplet"] = triplet.mean()
        loss = error + o.beta * extra["triplet"] if extra else error
        with torch.no_grad():
            entropy = -(p * p.clamp_min(1e-30).log()).sum(1).mean()
            live = (model.usage > 0.1 / len(codes)).sum().to(error.dtype)
        return {"loss": loss, "error": error, **extra, "entropy": entropy, "codes_used": live}

    def encode(self, model: KraqenModel, batch: Batch) -> Tensor:
        """Own code of every particle, (b, M)."""
        return self.describe_batch(model, batch)[1]

    def decode(self, model: KraqenModel, z: Tensor) -> Tensor:
        """Volumes (k, D, D, D) float32 of codes z (k, M), in the grey values of the images."""
        return model.volumes(z)

    # inference -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def describe_batch(self, model: KraqenModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Shares (b, K) at the final temperature and own codes (b, M), float32."""
        r_max = model.box_size // 2
        scene = model.scene(batch, r_max)
        with torch.autocast(batch.images.device.type, enabled=False):
            system = model.gram(scene)
            logits = model.logits(system, scene.points, r_max, model.codes)
            p = torch.softmax(logits / self.options.t_min, dim=1)
            return p, model.own_codes(system, p)

    # parts of the loss -----------------------------------------------------------------------------------------------

    def _phase(self, step: Step) -> str:
        if self.options.init == "kmeans" and step.fraction < SUBSPACE_PART:
            return "subspace"
        early = step.index < min(CONSENSUS_STEPS, CONSENSUS_PART * step.total)
        return "consensus" if early and self.options.init == "random" else "codes"

    def _begin(self, model: KraqenModel, images: int, step: Step) -> None:
        """What happens once at the start of a step, before its first piece: gauge, k-means start, splitting."""
        if not model.training or step.index == self._step:
            return
        self._step = step.index
        before = self._phase(Step(max(step.index - 1, 0), step.total))
        phase = self._phase(step)
        if phase == "codes" and before == "subspace":
            model.start_from_means(step.index)
        model.hold_gauge()
        if not self.options.split or phase != "codes" or step.fraction > SPLIT_UNTIL:
            return
        seen = max(20 * len(model.codes), 0.1 * model.n_images)
        period = max(1, round(seen / max(chance.whole(images), 1)))
        if before == "codes" and step.index % period == 0:
            model.split(step.index)

    def _jittered(self, model: KraqenModel, step: Step) -> Tensor:
        codes, o = model.codes, self.options
        if not (model.training and o.jitter > 0 and codes.shape[1] > 1):
            return codes
        rms = codes[:, 1:].detach().square().mean().sqrt()
        noise = torch.randn_like(codes)
        noise[:, 0] = 0
        return codes + (o.jitter * (1 - step.fraction)) * rms * noise

    def _shares(
        self, model: KraqenModel, system: assignment.Gram, points: int, r_max: int, step: Step, codes: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Shares (b, K), logits in units of T* and the temperature. With --straight-through the shares are one-hot
        and carry the gradient of the soft ones with respect to the codes."""
        o = self.options
        t = assignment.annealed(step.fraction, o.t_max, o.t_min, o.anneal_over, o.anneal)
        b = assignment.balance_strength(step.fraction, o.balance, o.anneal_over)
        straight = o.straight_through and self._phase(step) == "codes"
        with torch.set_grad_enabled(straight and torch.is_grad_enabled()):
            logits = model.logits(system, points, r_max, codes)
            logits = assignment.balance(logits, model.usage, b)
            p = torch.softmax(logits / t, dim=1)
            if straight:
                hard = F.one_hot(p.argmax(1), p.shape[1]).to(p.dtype)
                p = hard + p - p.detach()
        return p, logits, t

    def _error(self, model: KraqenModel, scene: Scene, p: Tensor, codes: Tensor, step: Step) -> Tensor:
        """Blended |X - C sum_k p_k S_k|, or sum_k p_k |X - C S_k| (the last part of the training, or --blend em)."""
        o = self.options
        if o.blend != "em" and step.fraction < 1 - o.em_last:
            return self._distance(model, scene, (p @ codes)[:, None])[:, 0].mean()
        share, best = p.topk(min(EM_CODES, p.shape[1]), dim=1)
        rest = (1 - share.sum(1, keepdim=True)).clamp_min(0)
        others = p.scatter(1, best, 0.0) / rest.clamp_min(1e-6)
        tried = torch.cat([codes[best], (others @ codes)[:, None]], dim=1)  # (b, J, M)
        shares = torch.cat([share, rest], dim=1)
        return (shares * self._distance(model, scene, tried)).sum(1).mean()

    def _distance(self, model: KraqenModel, scene: Scene, codes: Tensor) -> Tensor:  # (b, J, M) -> (b, J)
        """Mean distance per coefficient between the data and the CTF-filtered slices of codes."""
        slices = model.field.slices(scene.hidden, scene.sign, codes)  # (b, P, J, 2)
        data = torch.view_as_real(scene.target.values)[:, :, None]
        difference = data - slices * scene.weight[:, :, None, None]
        if self.options.loss == "l1":
            return difference.abs().sum(-1).mean(1)
        if self.options.loss == "huber":
            return F.huber_loss(difference, torch.zeros_like(difference), reduction="none").sum(-1).mean(1)
        return difference.square().sum(-1).mean(1)


class _Describer:
    """The method seen as one whose latents are shares and own codes side by side."""

    name = "kraqen"

    def __init__(self, method: Kraqen) -> None:
        self.method = method

    def encode(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.cat(self.method.describe_batch(model, batch), dim=1)


def describe(
    model: KraqenModel, particles: ParticleSet, progress: bool = True, batch_size: int = 256, precision: str = "auto"
) -> tuple[ClassWeights, np.ndarray]:
    """Shares of all particles in the codes (sparse) and their own codes (N, M) float32, every image read once.

    Call it in every process: each does its part and all get the whole. ``precision``: of a GPU; the processor works in
    float32.
    """
    method = Kraqen(model.options)
    K = len(model.codes)
    if model.codes.device.type == "cpu":
        precision = "32"
    found = encode_batches(_Describer(method), model, particles, batch_size, precision=precision, progress=progress)
    parts = [(ClassWeights.from_dense(both[:, :K], model.options.sparse), both[:, K:]) for _, both in found]
    if world()[1] > 1:
        gathered: list = [None] * world()[1]
        torch.distributed.all_gather_object(gathered, parts)
        parts = [part for process in gathered for part in process]
    z = np.concatenate([own for _, own in parts]) if parts else np.zeros((0, model.codes.shape[1]), np.float32)
    return stacked([weights for weights, _ in parts], K), z


def responsibilities(model: KraqenModel, particles: ParticleSet, progress: bool = True) -> ClassWeights:
    """Shares of all particles in the K codes of a trained model."""
    return describe(model, particles, progress)[0]


@torch.no_grad()
def whitened_power(model: KraqenModel, particles: ParticleSet) -> Tensor:
    """Mean |x|^2 per shell (D//2 + 1,) of whitened images, from up to 2,000 of them: 1 for pure noise."""
    rows = np.sort(np.random.default_rng(0).choice(len(particles), min(len(particles), SPECTRUM_IMAGES), replace=False))
    disc = fourier.half_disc(model.box_size)
    total = torch.zeros(model.box_size // 2 + 1, dtype=torch.float64)
    for batch in _batches(particles.subset(rows)):
        x = whitened(batch, disc, model.noise_amplitude, model.premultiplied).values
        total.index_add_(0, disc.shell, x.abs().square().sum(0).double())
    points = torch.bincount(disc.shell, minlength=len(total)).clamp_min(1)
    power = total / points / len(rows)
    power[0] = power[1]
    return power.float()


def _batches(particles: ParticleSet) -> Iterator[Batch]:
    return BatchLoader(particles, 256, shuffle=False, prefetch=0).epoch(0)
