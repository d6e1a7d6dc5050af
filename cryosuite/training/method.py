"""What the training loop asks of a method, whatever paper it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cryosuite.data.loader import Batch
    from cryosuite.data.particles import ParticleSet


class Step(NamedTuple):
    """The place of one optimiser step in the whole training: ``index`` counts from 0 to ``total - 1``."""

    index: int
    total: int

    @property
    def fraction(self) -> float:
        """How much of the training lies behind this step: 0 at the first step, below 1 at the last."""
        return self.index / max(self.total, 1)


@runtime_checkable
class Method(Protocol):
    """The verbs every method has, so that the loop, ``analyze`` and ``polish`` treat all of them alike.

    All randomness must come from torch's global generators (their state lies in the checkpoint), and whatever a
    method learns or remembers between steps must be a parameter or a buffer of its model.

    Optional attributes the loop looks for: ``options`` (a dataclass; kept in the checkpoint and compared on resume),
    ``parameter_groups(model) -> list[dict]`` (for AdamW; ``lr_scale`` multiplies the learning rate of a group),
    ``unused_parameters`` (True where some parameters get no gradient in some steps), ``loader(particles, batch_size,
    rank, processes, seed=, device=)`` (batches of its own, with the verbs of ``GlobalBatches``), ``lr_factor(step)``
    (factor on the learning rate instead of the usual cosine), ``weight_decay(step)`` (of all groups whose decay is not
    0, instead of a fixed one), ``compares_images`` (True where the loss compares the images of a batch with each other,
    so that pieces of a batch are not quite the batch). Values with a row per particle are a ``Table`` of the model, in
    no parameter group.
    """

    name: str

    def build(self, particles: ParticleSet) -> nn.Module:
        """The model, on the CPU; called once, after the seed has been set.

        It may name the beginning of names that go into the checkpoint only (``not_in_weights``), and buffers that all
        processes make alike by themselves (``not_sent_around``).
        """
        ...

    def loss(self, model: nn.Module, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Named scalars, means over the batch; ``"loss"`` is minimised, the others are only written down.

        Called inside autocast. Must not read values back from the device (no ``.item()``, no ``.cpu()``).
        """
        ...

    def encode(self, model: nn.Module, batch: Batch) -> Tensor:
        """The latent of every particle of the batch, (b, zdim)."""
        ...

    def decode(self, model: nn.Module, z: Tensor) -> Tensor:
        """Volumes (k, D, D, D) for latents z (k, zdim)."""
        ...
