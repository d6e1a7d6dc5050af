"""The network of CryoKRAQEN: a basis field, K codes over it, and everything the training remembers as buffers.

Several processes see the same state without messages of their own: buffers are those of the first process (the
distributed wrapper sends them before every step), changes of the codes depend on buffers, the step and a generator
seeded by the step, and happen once at the start of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cryosuite.data.loader import Batch
from cryosuite.data.spectra import Spectra, Target, slice_matrices, whitened
from cryosuite.kernels import assignment, fourier
from cryosuite.kernels.ball import half_ball, volume_of_half_ball
from cryosuite.methods.kraqen_options import KraqenOptions
from cryosuite.nets.inr import half_space
from cryosuite.nets.triplane import BasisField, CoordinateFeatures
from cryosuite.training.launch import world

VOLUME_CHUNK = 1 << 24  # values of one activation when volumes are evaluated
VOLUMES_AT_ONCE = 64
OFFSET = 0.15  # rms of the codes' offsets, held by the gauge
RESERVOIR = 4096  # own codes of particles kept for --init kmeans
USAGE_MEMORY = 0.99  # decay of the running usage per step


class Scene:
    """A batch with the field's last hidden layer at its points: what the loss and the assignment work on."""

    def __init__(self, target: Target, weight: Tensor, sign: Tensor, hidden: Tensor) -> None:
        self.target, self.weight, self.sign, self.hidden = target, weight, sign, hidden

    @property
    def points(self) -> int:
        """P of the half disc used."""
        return self.weight.shape[1]


class KraqenModel(nn.Module):
    """Field, codes (K, M) and the data's radial statistics.

    Channel 0 of a code starts at 1 and carries what all have in common, the others are offsets.

    Args:
        box_size: D. options: of the method. spectra: noise and signal per shell.
        premultiplied: the images were already multiplied by their CTF.
        n_images: of the training set; only sets how often dead codes are looked for.
        pixel_size: Angstrom, of the map.
    """

    def __init__(
        self,
        box_size: int,
        options: KraqenOptions,
        spectra: Spectra,
        premultiplied: bool = False,
        n_images: int = 0,
        pixel_size: float = 1.0,
    ) -> None:
        super().__init__()
        o = options
        K, M = o.codes, o.rank or min(o.codes, 64)
        self.box_size, self.options, self.premultiplied, self.n_images = box_size, o, premultiplied, n_images
        channels = 0 if o.field == "fourier" else o.channels
        features = CoordinateFeatures(box_size, channels, o.plane_size, o.levels, o.features, o.feat_sigma)
        self.field = BasisField(features, M, o.width, o.layers)
        codes = OFFSET * torch.randn(K, M)
        codes[:, 0] = 1
        self.codes = nn.Parameter(codes)
        self.register_buffer("noise_amplitude", spectra.noise.sqrt().clone())
        self.register_buffer("envelope", spectra.signal.sqrt().clone())
        self.register_buffer("power", torch.ones(box_size // 2 + 1))  # mean |x|^2 of whitened data per shell
        self.register_buffer("pixel_size", torch.tensor(float(pixel_size)))
        self.register_buffer("usage", torch.full((K,), 1 / K))
        self.register_buffer("hard", torch.zeros(K))  # images per best code since the last look for dead codes
        kmeans = o.init == "kmeans"
        self.register_buffer("reservoir", torch.zeros(RESERVOIR if kmeans else 0, M))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("metric", torch.zeros(M if kmeans else 0, M))

    # data and field --------------------------------------------------------------------------------------------------

    def scene(self, batch: Batch, r_max: int) -> Scene:
        """Whitened data up to a radius and the hidden layer at the points of the slices."""
        device = batch.images.device
        with torch.autocast(device.type, enabled=False):
            disc = fourier.half_disc(self.box_size, min(r_max, self.box_size // 2), device)
            target = whitened(batch, disc, self.noise_amplitude, self.premultiplied)
            q = disc.frequency @ slice_matrices(batch, self.pixel_size)[:, :2]  # (kx, ky, 0) @ R
            sign = half_space(q)
            weight = target.ctf * self.amplitude(disc.radius)
        return Scene(target, weight, sign, self.field.hidden(q * sign[..., None]))

    def amplitude(self, radius: Tensor) -> Tensor:  # (P,) -> (P,)
        """The data's radial amplitude, linear between shells."""
        low = radius.floor().long().clamp(0, self.box_size // 2 - 1)
        return torch.lerp(self.envelope[low], self.envelope[low + 1], (radius - low).clamp(0, 1))

    def signal(self, r_max: int) -> Tensor:
        """s of the data up to a radius: mean |x|^2 over the points, less the noise."""
        radius = torch.arange(1, r_max + 1, device=self.power.device)
        return ((self.power[1 : r_max + 1] * radius).sum() / radius.sum() - 1).clamp_min(1e-4)

    # assignment ------------------------------------------------------------------------------------------------------

    def gram(self, scene: Scene) -> assignment.Gram:
        """The system of every image; no gradient."""
        with torch.autocast(scene.weight.device.type, enabled=False):
            return self.field.gram(scene.hidden.detach(), scene.sign, scene.weight, scene.target.values)

    def logits(self, system: assignment.Gram, points: int, r_max: int, codes: Tensor) -> Tensor:  # -> (b, K)
        """Logits in units of T*."""
        o = self.options
        values = assignment.scores(o.assign, system, codes)
        return assignment.logits(o.assign, values, 2.0 * points, self.signal(r_max), o.kernel)

    def own_codes(self, system: assignment.Gram, p: Tensor) -> Tensor:  # (b, K) -> (b, M)
        """MAP code of each particle around its mixed code."""
        codes = self.codes.detach()
        return assignment.map_codes(system, p @ codes, assignment.code_variance(codes))

    # what the training remembers -------------------------------------------------------------------------------------

    @torch.no_grad()
    def count(self, p: Tensor) -> None:
        """Take the shares (b, K) of a batch, of all processes that share it, into the running usage and hard counts."""
        hard = torch.zeros_like(self.hard).index_add_(0, p.argmax(1), torch.ones_like(p[:, 0]))
        mean = p.mean(0)
        if world()[1] > 1:
            told = torch.cat([p.sum(0), hard, hard.new_tensor([len(p)])])
            torch.distributed.all_reduce(told)
            total, hard = told[:-1].view(2, -1)
            mean = total / told[-1]
        self.usage.lerp_(mean, 1 - USAGE_MEMORY)
        self.hard += hard

    @torch.no_grad()
    def hold_gauge(self) -> None:
        """Bring the offsets back to their rms and put the factor into the read-out: no slice changes."""
        if self.codes.shape[1] < 2:
            return
        factor = OFFSET / self.codes[:, 1:].square().mean().sqrt().clamp_min(1e-12)
        self.codes[:, 1:].mul_(factor)
        self.field.rescale(1 / factor)

    @torch.no_grad()
    def split(self, step: int) -> None:
        """Put each dead code (fewer than .1 / K of the images since the last look) beside one of the busiest."""
        K = len(self.codes)
        share = self.hard / self.hard.sum().clamp_min(1)
        order = share.argsort(descending=True, stable=True)
        dead = share[order] < 0.1 / K
        alive = (K - dead.sum()).clamp_min(1)
        source = order[torch.arange(K - 1, -1, -1, device=order.device) % alive]  # the emptiest gets the busiest
        noise = torch.randn(self.codes.shape, generator=torch.Generator().manual_seed(step)).to(self.codes)
        noise[:, 0] = 0
        twins = self.codes[source] + 0.1 * OFFSET * noise
        self.codes[order] = torch.where(dead[:, None], twins, self.codes[order])
        usage = self.usage.clone()
        halved = torch.zeros_like(usage).index_add_(0, source, dead.to(usage.dtype))
        usage = usage / (1 + halved)
        self.usage[order] = torch.where(dead, usage[source], usage[order])
        self.hard.zero_()

    @torch.no_grad()
    def remember(self, f: Tensor, system: assignment.Gram) -> None:
        """Keep own codes (b, M) and the mean G for the k-means start."""
        at = (self.filled + torch.arange(len(f), device=f.device)) % RESERVOIR
        self.reservoir[at] = f.to(self.reservoir.dtype)
        self.filled += len(f)
        self.metric.lerp_(system.G.mean(0), 0.1)

    @torch.no_grad()
    def start_from_means(self, step: int, rounds: int = 30) -> None:
        """Codes from k-means of the own codes kept, distances in the metric mean G.

        On the CPU, where sums have one order: the processes must come to the same codes bit for bit.
        """
        kept = self.reservoir[: min(int(self.filled), RESERVOIR)].double().cpu()
        metric = self.metric.double().cpu()
        if not len(kept):
            return
        K, M = self.codes.shape
        level = metric.diagonal().mean().clamp_min(1e-12)
        root = torch.linalg.cholesky(metric / level + 1e-6 * torch.eye(M, dtype=torch.float64))
        points = kept @ root  # |root^T d|^2 = d^T G d
        generator = torch.Generator().manual_seed(step)
        first = [int(torch.randint(len(kept), (), generator=generator))]
        distance = (points - points[first[0]]).square().sum(1)
        while len(first) < K:  # k-means++
            first.append(int(torch.multinomial(distance + 1e-12, 1, generator=generator)))
            distance = torch.minimum(distance, (points - points[first[-1]]).square().sum(1))
        centres = points[first]
        for _ in range(rounds):
            label = torch.cdist(points, centres).argmin(1)
            count = torch.bincount(label, minlength=K)[:, None]
            total = torch.zeros_like(centres).index_add_(0, label, points)
            centres = torch.where(count > 0, total / count.clamp_min(1), centres)
        self.codes.copy_(torch.linalg.solve_triangular(root.T, centres.T, upper=True).T)
        self.hard.zero_()
        self.usage.fill_(1 / K)

    # volumes ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def volumes(self, z: Tensor) -> Tensor:  # (k, M) -> (k, D, D, D)
        """Volumes of codes in real space, float32, in the grey values of the images.

        The network runs once over half of the ball for up to 64 of them.
        """
        D = self.box_size
        xyz = half_ball(D).to(self.codes.device)
        radius = xyz.float().square().sum(1).sqrt()
        step = max(1024, VOLUME_CHUNK // (self.options.width * 4))
        result = []
        for part in z.to(self.codes).split(VOLUMES_AT_ONCE):
            found = []
            for i in range(0, len(xyz), step):
                q = (xyz[i : i + step] / D)[None]
                sign = half_space(q)
                values = self.field.slices(self.field.hidden(q * sign[..., None]), sign, part[None])[0]
                found.append(torch.view_as_complex(values) * self.amplitude(radius[i : i + step])[:, None])
            half = torch.cat(found)
            result += [volume_of_half_ball(half[:, k], xyz, D) for k in range(len(part))]
        return torch.stack(result) if result else torch.zeros(0, D, D, D)
