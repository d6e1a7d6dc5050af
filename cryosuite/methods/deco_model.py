"""The CryoDECO model: particle image -> latent -> the Fourier field of its volume, and a table of poses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cryosuite.data.encoder_images import EncoderCache, normalise
from cryosuite.data.loader import Batch
from cryosuite.data.spectra import Spectra, Target, whitened
from cryosuite.kernels import fourier
from cryosuite.kernels.ball import half_ball, volume_of_half_ball
from cryosuite.kernels.rotations import matrix_to_six_d, six_d_to_matrix
from cryosuite.methods.deco_cached import CachedVolumes
from cryosuite.methods.deco_options import DecoOptions
from cryosuite.nets.deco_field import DecoField
from cryosuite.nets.ief_weights import LoadedEncoder
from cryosuite.training.table import Table

VOLUME_CHUNK = 1 << 25  # values of one activation when a volume is evaluated


class PoseTable(Table):
    """A rotation (six numbers: the first two rows before Gram-Schmidt) and a shift per particle, both learnt.

    ``margin`` (N,): log-likelihood by which the pose was better than the best one elsewhere when it was last searched
    for; NaN before. ``misfit`` (N,): loss of each image when it was last trained on.
    """

    def __init__(self, rotation: Tensor, shift: Tensor, lr_scale: float = 1.0) -> None:  # (N, 3, 3), (N, 2) of the box
        super().__init__({"six": matrix_to_six_d(rotation), "shift": shift}, lr_scale)
        self.register_buffer("margin", torch.full((len(rotation),), torch.nan))
        self.register_buffer("misfit", torch.zeros(len(rotation)))

    def forward(self, index: Tensor, learn: bool = False) -> tuple[Tensor, Tensor]:
        """(b, 3, 3) and (b, 2) of some particles, to be learnt in this step or not."""
        six, shift = self.take(index) if learn else (self.six[index], self.shift[index])
        return six_d_to_matrix(six), shift

    def put(self, index: Tensor, rotation: Tensor, shift: Tensor, margin: Tensor | None = None) -> None:
        """Write poses found by a search."""
        self.set(index, {"six": matrix_to_six_d(rotation), "shift": shift})
        if margin is not None:
            self.margin[index] = margin.to(self.margin)


class DecoModel(nn.Module):
    """Encoder, head, decoder and pose table, with the data's radial statistics as buffers.

    Args:
        box_size: D of the particles.
        options: of the method; ``options.zdim`` is the latent's length (with ``finetune none`` the encoder's).
        spectra: noise and signal per shell.
        loaded: the encoder; its final norm gives way to the head's own unless ``finetune none``.
        premultiplied: the images were already multiplied by their CTF.
    """

    def __init__(
        self, box_size: int, options: DecoOptions, spectra: Spectra, loaded: LoadedEncoder, premultiplied: bool = False
    ) -> None:
        super().__init__()
        self.box_size, self.options, self.premultiplied = box_size, options, premultiplied
        self.register_buffer("pixels", torch.tensor([loaded.mean, loaded.std]))  # mean, standard deviation of u8 / 255
        self.encoder, width = loaded.encoder, loaded.spec.dim
        if options.finetune == "none":
            self.head: nn.Module = nn.Identity()
            zdim = width
        else:
            self.encoder.norm = nn.Identity()
            zdim = options.zdim
            self.head = nn.Sequential(nn.LayerNorm(width, eps=1e-6), nn.Linear(width, zdim))
        self.zdim = zdim
        o = options
        self.field = DecoField(
            zdim, o.width, o.layers, o.n_frequencies, o.feat_sigma, o.layer_norm, o.field, box_size, o.low_memory
        )
        self.table: PoseTable | None = None
        self.cached: CachedVolumes | None = None
        white = options.loss == "whitened"
        mean_noise = spectra.noise if white else spectra.noise[:, 1:].mean(1, keepdim=True)
        total = (spectra.signal + spectra.noise.mean(0))[1:].mean().expand_as(spectra.signal)
        self.register_buffer("noise_amplitude", mean_noise.expand_as(spectra.noise).sqrt().clone())
        self.register_buffer("envelope", (spectra.signal if white else total).sqrt().clone())
        self._freeze()

    def keep_volumes(self, count: int, r_max: int) -> None:
        """Search for poses, up to a radius, in ``count`` cached volumes from now on."""
        self.cached = CachedVolumes(count, self.zdim, self.box_size, r_max)
        self.not_in_weights = "cached."

    @property
    def not_sent_around(self) -> list[str]:
        """Buffers as large as the set or the cached volumes, which are equal in all processes by themselves."""
        own = {"table": self.table, "cached": self.cached}
        return [f"{at}.{name}" for at, part in own.items() if part is not None for name, _ in part.named_buffers()]

    def _freeze(self) -> None:
        """What is not trained according to ``finetune``; positions and patch projection of the encoder never are."""
        blocks = self.options.trained_blocks
        names = ("pos_embed", "patch_embed") if self.options.encoder != "random" else ("pos_embed",)
        for name, parameter in self.encoder.named_parameters():
            if blocks is None:
                trained = not name.startswith(names)
            else:
                first = len(self.encoder.blocks) - blocks
                trained = name.startswith("blocks.") and int(name.split(".")[1]) >= first
            parameter.requires_grad_(trained)

    @property
    def encoder_trains(self) -> bool:
        """Whether any weight of the encoder is trained."""
        return any(p.requires_grad for p in self.encoder.parameters())

    def train(self, mode: bool = True) -> DecoModel:
        """As usual, but a frozen encoder and (with ``bn frozen``) batch norms stay as in evaluation."""
        super().train(mode)
        if mode and not self.encoder_trains:
            self.encoder.eval()
        elif mode and self.options.bn == "frozen":
            for module in self.encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    # data ------------------------------------------------------------------------------------------------------------

    def target(self, batch: Batch) -> Target:
        """Data and CTF on the half disc, divided by the noise, in float32; moved by the batch's shifts."""
        with torch.autocast(batch.images.device.type, enabled=False):
            disc = fourier.half_disc(self.box_size, device=batch.images.device)
            mask = fourier.window_mask(self.box_size, device=disc.device) if self.options.window else None
            return whitened(batch, disc, self.noise_amplitude, self.premultiplied, mask)

    def measure_pixels(self, cache: EncoderCache) -> None:
        """Take mean and standard deviation of the encoder's images from (at most 1,000 of) the images themselves."""
        rows = np.unique(np.linspace(0, len(cache) - 1, 1000).astype(np.int64))
        sample = cache.batch(rows).float() / 255
        self.pixels.copy_(torch.stack([sample.mean(), sample.std().clamp_min(1e-3)]))

    # network ---------------------------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:  # (b, s, s) uint8 -> (b, C)
        """Features of eight-bit images."""
        mean, std = self.pixels
        return self.encoder(normalise(images, mean, std))

    def latent(self, features: Tensor) -> Tensor:  # (b, C) -> (b, zdim)
        """Latents of features, float32."""
        return self.head(features).float()

    def values(self, q: Tensor, radius: Tensor, z: Tensor) -> Tensor:
        """The volumes' transform at q: (b, P, 3) cycles/px, |q| D (P,) or (b, P) -> (b, P, 2) Re, Im, float32."""
        return self.field(q, z) * self.amplitude(radius)[..., None]

    def amplitude(self, radius: Tensor) -> Tensor:  # (..., P) -> (..., P)
        """The data's radial amplitude, linear between shells."""
        low = radius.floor().long().clamp(0, self.box_size // 2 - 1)
        return torch.lerp(self.envelope[low], self.envelope[low + 1], (radius - low).clamp(0, 1))

    @torch.no_grad()
    def volumes(self, z: Tensor) -> Tensor:  # (k, zdim) -> (k, D, D, D)
        """Volumes of latents, float32, in the grey values of the images (a projection is their sum).

        Half of the ball |k| <= D/2 is evaluated in chunks; the mean, which no image shows, is set so that the density
        outside the inscribed sphere averages to zero.
        """
        device, D = self.envelope.device, self.box_size
        xyz = half_ball(D).to(device)
        radius = xyz.float().square().sum(1).sqrt()
        chunk = max(1024, VOLUME_CHUNK // self.options.width)
        result = []
        for one in z.to(device).split(1):
            parts = [
                self.values((xyz[i : i + chunk] / D)[None], radius[i : i + chunk], one)[0]
                for i in range(0, len(xyz), chunk)
            ]
            half = torch.view_as_complex(torch.cat(parts).float().contiguous())
            result.append(volume_of_half_ball(half, xyz, D))
        return torch.stack(result)
