"""The CryoHype model: particle image -> weight tokens -> the Fourier field of that particle's volume."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cryosuite.data.loader import Batch
from cryosuite.data.spectra import Spectra, Target, whitened
from cryosuite.kernels import fourier
from cryosuite.kernels.ball import half_ball, volume_of_half_ball
from cryosuite.methods.hype_input import EncoderInput, view_direction
from cryosuite.methods.hype_options import HypeOptions
from cryosuite.methods.hype_views import OtherViews
from cryosuite.nets.hypernet import build_hypernet, layer_shapes
from cryosuite.nets.inr import ConcatField, FourierFeatures, HyperField
from cryosuite.nets.triplane import TriplaneFeatures
from cryosuite.nets.vit import WeightTokenTransformer, best_patch

VOLUME_CHUNK = 1 << 25  # values of one activation when a volume is evaluated


class HypeModel(nn.Module):
    """Encoder, hypernetwork and field with the data's radial statistics as buffers.

    Args:
        box_size: D of the particles.
        options: of the method.
        spectra: noise and signal per shell.
        premultiplied: the images were already multiplied by their CTF.
    """

    def __init__(self, box_size: int, options: HypeOptions, spectra: Spectra, premultiplied: bool = False) -> None:
        super().__init__()
        self.box_size, self.options, self.premultiplied = box_size, options, premultiplied
        o = options
        if o.inr == "triplane":
            features: nn.Module = TriplaneFeatures(box_size)
        else:
            features = FourierFeatures(o.n_frequencies, o.feat_sigma * box_size)
        outputs = 2 if o.field == "complex" else 1
        shapes = layer_shapes(features.size, o.inr_width, o.inr_layers, o.groups, outputs)
        n_tokens = sum(shape.groups for shape in shapes)
        if o.conditioning == "concat":
            self.hyper, self.latent_norm = None, nn.LayerNorm(o.dim)
            self.field = ConcatField(features, o.dim, o.inr_width, o.inr_layers, o.field, o.low_memory)
        else:
            self.hyper = build_hypernet(o.hyper, shapes, o.dim)
            self.field = HyperField(features, o.field, o.low_memory)
        self.layer_tokens = [shape.groups for shape in shapes]
        self.input = EncoderInput(box_size, o, spectra)
        size = self.input.size
        self.encoder = WeightTokenTransformer(
            size,
            o.patch or best_patch(size, o.patches),
            n_tokens,
            o.dim,
            o.depth,
            o.heads,
            o.pos_embed,
            3 * o.pose_context,
        )
        whitened = o.loss == "whitened"
        mean_noise = spectra.noise[:, 1:].mean(1, keepdim=True) if not whitened else spectra.noise
        total = (spectra.signal + spectra.noise.mean(0))[1:].mean().expand_as(spectra.signal)
        self.register_buffer("noise_amplitude", mean_noise.expand_as(spectra.noise).sqrt().clone())
        self.register_buffer("envelope", (spectra.signal if whitened else total).sqrt().clone())
        self.other_views: OtherViews | None = None

    def remember_views(self) -> None:
        """Remember the tokens of images from now on: part of the training, and of its checkpoints, but not of a run."""
        pooled = self.pool(torch.zeros(1, sum(self.layer_tokens), self.options.dim)).shape[1]
        self.other_views = OtherViews(sum(self.layer_tokens), self.options.dim, pooled)
        self.not_in_weights = "other_views."
        self.not_sent_around = [f"other_views.{name}" for name, _ in self.other_views.named_buffers()]

    # data ------------------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> tuple[Target, Tensor]:
        """The target on the half disc and the encoder's image (b, S, S), all in float32."""
        target = self.target(batch)
        return target, self.image(target, batch)

    def target(self, batch: Batch) -> Target:
        """The whitened coefficients on the half disc, float32."""
        with torch.autocast(batch.images.device.type, enabled=False):
            disc = fourier.half_disc(self.box_size, device=batch.images.device)
            mask = fourier.window_mask(self.box_size, device=disc.device) if self.options.window else None
            return whitened(batch, disc, self.noise_amplitude, self.premultiplied, mask)

    def image(self, target: Target, batch: Batch, seen: Tensor | None = None) -> Tensor:  # -> (b, S, S)
        """The encoder's image, float32; of the half of the coefficients that is ``seen`` (P,) only."""
        with torch.autocast(batch.images.device.type, enabled=False):
            return self.input(target, fourier.half_disc(self.box_size, device=batch.images.device), batch, seen)

    # network ---------------------------------------------------------------------------------------------------------

    def tokens(self, image: Tensor, batch: Batch) -> Tensor:  # (b, S, S) -> (b, n_tokens, dim)
        """Weight tokens of images made by ``prepare``."""
        return self.encoder(image, view_direction(batch.rotation) if self.options.pose_context else None)

    def condition(self, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of the field for tokens (b, n_tokens, dim)."""
        if self.hyper is None:
            return [self.latent_norm(tokens.mean(1))], []
        return self.hyper(tokens), [base.bias for base in self.hyper.bases]

    def values(self, q: Tensor, radius: Tensor, condition: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        """The volumes' transform at q: (b, P, 3) cycles/px, |q| D (P,) or (b, P) -> (b, P, 2) Re, Im, float32."""
        return self.field(q, *condition) * self.amplitude(radius)[..., None]

    def amplitude(self, radius: Tensor) -> Tensor:  # (..., P) -> (..., P)
        """The data's radial amplitude, linear between shells."""
        low = radius.floor().long().clamp(0, self.box_size // 2 - 1)
        return torch.lerp(self.envelope[low], self.envelope[low + 1], (radius - low).clamp(0, 1))

    def pool(self, tokens: Tensor) -> Tensor:  # (b, n_tokens, dim) -> (b, p), p = sum of the layers' fan-ins
        """What the field is told, averaged over the groups of each layer, side by side, float32.

        The heads' outputs (scales) separate particles better than the tokens themselves, whose length and offset the
        heads normalise away: on 16 molecules k-means reached ARI .98 against .87 to .91.
        """
        if self.hyper is None:
            return self.latent_norm(tokens.mean(1)).float()
        parts = zip(self.hyper.heads, tokens.split(self.layer_tokens, dim=1), strict=True)
        return torch.cat([head(part).float().mean(1) for head, part in parts], dim=1)

    # volumes ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def volumes(self, tokens: Tensor) -> Tensor:  # (k, n_tokens, dim) -> (k, D, D, D)
        """Volumes of weight tokens, real space, float32, in the grey values of the images (a projection is their sum).

        Half of the ball |k| <= D/2 is evaluated in chunks. The zero frequency is not seen by any image: the mean is set
        so that the density outside the inscribed sphere averages to zero.
        """
        device, D = self.envelope.device, self.box_size
        xyz = half_ball(D).to(device)
        radius = xyz.float().square().sum(1).sqrt()
        chunk = max(1024, VOLUME_CHUNK // self.options.inr_width)
        result = []
        for row in tokens.split(1):
            condition = self.condition(row.to(device))
            parts = [
                self.values((xyz[i : i + chunk] / D)[None], radius[i : i + chunk], condition)[0]
                for i in range(0, len(xyz), chunk)
            ]
            half = torch.view_as_complex(torch.cat(parts).float().contiguous())
            result.append(volume_of_half_ball(half, xyz, D))
        return torch.stack(result)
