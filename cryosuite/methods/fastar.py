"""Poses in one forward pass (CryoFastAR, arXiv 2506.05864): the training, against a known molecule or ab initio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cryosuite.kernels.planar import relative
from cryosuite.kernels.rotations import quaternion_to_matrix
from cryosuite.kernels.so3_grid import grid_rotations
from cryosuite.methods.fastar_loader import Molecules, SetLoader
from cryosuite.methods.fastar_loss import cell_loss, nearest_mate, set_loss, shift_loss, weighted
from cryosuite.methods.fastar_options import FastarOptions
from cryosuite.nets.multiview import SPECS, Heads, Multiview
from cryosuite.simulate.view_sets import FastarBatch
from cryosuite.training.method import Step

DECAY = 0.2  # last share of the training in which the learning rate falls to 0


class FastarModel(nn.Module):
    """The network, with what only its training needs beside it."""

    def __init__(self, options: FastarOptions) -> None:
        super().__init__()
        self.net = Multiview(SPECS[options.preset])
        self.register_buffer("cells", grid_rotations(options.grid_order).clone(), persistent=False)
        with torch.no_grad():  # an image first asks those patches that look like its own
            for block in self.net.dec_blocks2:
                block.cross_attn.projq.weight.copy_(block.cross_attn.projk.weight)


class Fastar:
    """The method ``fastar`` for the training loop; ``particles`` are ``Molecules``.

    Args:
        warmup: steps in which the learning rate rises.
        load: take the weights of ``options.start`` (not when a training goes on: they are in its checkpoint).
    """

    name = "fastar"
    unused_parameters = True  # the clean picture, the role of the hand, and in ab-initio mode the grid head

    def __init__(self, options: FastarOptions, warmup: int = 500, load: bool = True) -> None:
        self.options, self.warmup, self.load = options, warmup, load

    def build(self, particles: Molecules) -> FastarModel:
        """The model, from a weight file where one is to be gone on from."""
        model = FastarModel(self.options)
        if self.load and self.options.start:
            from cryosuite.data.multiview_weights import load_multiview

            loaded, _ = load_multiview(self.options.start, SPECS[self.options.preset])
            model.net.load_state_dict(loaded.state_dict())
        return model

    def loader(self, particles: Molecules, batch_size: int, rank: int, processes: int, **how: Any) -> SetLoader:
        """Batches for the training loop."""
        return SetLoader(particles, batch_size, rank, processes, **how)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Weight decay on matrices only."""
        matrices = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        return [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]

    def lr_factor(self, step: Step) -> float:
        """Factor on the learning rate: a linear start, constant, the last fifth falling to 0.

        So a training can be made longer or shorter on the way: nothing before its last fifth depends on its length.
        """
        rising = min(1.0, (step.index + 1) / max(self.warmup, 1))
        return rising * min(1.0, (1 - step.fraction) / DECAY)

    def loss(self, model: FastarModel, batch: FastarBatch, step: Step) -> dict[str, Tensor]:
        """The losses of the mode."""
        if self.options.mode == "target":
            return self._target_loss(model, batch, step)
        return self._ab_initio_loss(model, batch, step)

    def _target_loss(self, model: FastarModel, batch: FastarBatch, step: Step) -> dict[str, Tensor]:
        o, net, shape = self.options, model.net, batch.images.shape[:2]
        count = shape[0] * shape[1]
        both = net.encode(torch.cat([batch.images.flatten(0, 1), batch.candidates.flatten(0, 1)]))
        match = net.match(both)
        scores = net.match_scores(
            match.vector[:count].unflatten(0, shape), match.vector[count:].unflatten(0, batch.candidates.shape[:2])
        )
        told = {
            "match": cell_loss(scores, batch.candidate_rotation, batch.rotation, batch.mates, batch.known, o.match_deg),
            "shift": shift_loss(match.shift[:count].unflatten(0, shape), batch.shift, batch.known),
        }
        total = told["match"] + told["shift"]
        if o.map_weight:
            told |= self._map_losses(model, batch, both[:count].unflatten(0, shape), step)
            total = total + o.map_weight * (told["map"] + o.cell_weight * told["cells"] + told["map_shift"])
        return {"loss": total} | told

    def _map_losses(self, model: FastarModel, batch: FastarBatch, tokens: Tensor, step: Step) -> dict[str, Tensor]:
        """Losses of what is predicted against the templates."""
        o, net = self.options, model.net
        cache = net.templates(batch.templates, net.maps_of(batch.template_rotation))
        found = net.heads(net.against(cache, tokens))
        spec = net.spec
        _, error = nearest_mate((found.c, found.a, found.b), batch.rotation, batch.mates, spec.size, spec.patch)
        # one random turn of all cells a step, so that nothing is learnt about the places of the grid
        with torch.autocast(model.cells.device.type, enabled=False):
            cells = model.cells @ quaternion_to_matrix(torch.randn(4, device=batch.rotation.device))
        scores = net.grid_scores(found.pooled, cells)
        return {
            "map": weighted(error, found.conf_logit, batch.known, step.index >= o.steady),
            "cells": cell_loss(scores, cells, batch.rotation, batch.mates, batch.known, o.cell_deg),
            "map_shift": shift_loss(found.shift, batch.shift, batch.known),
        }

    def _ab_initio_loss(self, model: FastarModel, batch: FastarBatch, step: Step) -> dict[str, Tensor]:
        o, net = self.options, model.net
        truth = relative(batch.rotation)
        hand = None
        if o.hand_loss == "anchor":
            hand = torch.ones(len(batch.index), device=truth.device)
        found = self.star(model, batch, hand)
        spec = net.spec
        error, other = set_loss((found.c, found.a, found.b), truth, batch.known, spec.size, spec.patch, o.hand_loss)
        told = {"map": weighted(error, found.conf_logit, batch.known, step.index >= o.steady)}
        told["shift"] = shift_loss(found.shift, batch.shift, batch.known)
        return {
            "loss": told["map"] + told["shift"], "error": error.detach().mean(), "mirrored": other.float().mean()
        } | told  # fmt: skip

    @staticmethod
    def star(model: FastarModel, batch: FastarBatch, hand: Tensor | None = None) -> Heads:
        """What is said of sets of views of molecules nobody knows; the first view is the reference."""
        tokens = model.net.encode(batch.images.flatten(0, 1)).unflatten(0, batch.images.shape[:2])
        return model.net.heads(model.net.star(tokens, hand))
