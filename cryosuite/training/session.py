"""Everything a training holds: model, optimiser, average, loader, its place, and how to save and restore them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cryosuite import __version__
from cryosuite.data.processes import Processes
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.kernels import chance
from cryosuite.kernels.memory import out_of_memory
from cryosuite.training import checkpoint
from cryosuite.training.ema import Ema
from cryosuite.training.guard import Meter, Watch, describe_images
from cryosuite.training.launch import PATIENCE, all_connected, rng_state, seed_all, set_rng_state, start_fabric, world
from cryosuite.training.logs import MetricsLog, RunLog, write_header
from cryosuite.training.method import Method, Step
from cryosuite.training.options import TrainOptions, plain
from cryosuite.training.schedule import lr_factor
from cryosuite.training.shard import GlobalBatches, pieces
from cryosuite.training.table import Table

if TYPE_CHECKING:
    from cryosuite.data.loader import Batch
    from cryosuite.data.particles import ParticleSet

STOPS = ("", "max_minutes", "SIGTERM", "SIGUSR1", "SIGINT")


@dataclass
class Place:
    """Where a training is: steps done, epochs finished, the next batch of this epoch, seconds spent.

    ``reported`` is ``seconds`` at the last line of metrics.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    reported: float = 0.0


class Objective(nn.Module):
    """The method's loss as a module, so that autocast and distributed gradients wrap all of it."""

    def __init__(self, method: Method, model: nn.Module) -> None:
        super().__init__()
        self.method, self.model = method, model
        # DistributedDataParallel looks for this on the module that it wraps
        apart = getattr(model, "not_sent_around", ())
        self._ddp_params_and_buffers_to_ignore = [f"model.{name}" for name in apart]

    def forward(self, work: Work) -> dict[str, Tensor]:
        """Named scalars of one batch at one step."""
        return self.method.loss(self.model, work.batch, work.step)


class Work:
    """A batch and its step; not a container that Fabric would walk through on every call."""

    __slots__ = ("batch", "step")

    def __init__(self, batch: Batch, step: Step) -> None:
        self.batch, self.step = batch, step


class Session:
    """One process's part of a training."""

    def __init__(self, method: Method, particles: ParticleSet, run: RunDir, options: TrainOptions) -> None:
        self.method, self.particles, self.run, self.options = method, particles, run, options
        self.fabric = start_fabric(options, getattr(method, "unused_parameters", False))
        self.rank, self.processes = world()
        self.main, self.device = self.rank == 0, self.fabric.device
        self.control = None  # a group of CPU messages, so that asking for a stop does not wait for the GPU
        if self.processes > 1:
            self.control = all_connected(torch.distributed.new_group(backend="gloo", timeout=PATIENCE))
        seed_all(options.seed)
        self.model = method.build(particles)
        self.objective = self.fabric.setup_module(Objective(method, self.model))
        if options.compile and self.device.type == "cuda":
            self.model.compile()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.tables = [module for module in self.model.modules() if isinstance(module, Table)]
        self.optimizer = self._optimizer()
        self.ema = Ema(self.model, options.ema)
        loader = getattr(method, "loader", GlobalBatches)
        self.loader = loader(
            particles, options.batch_size, self.rank, self.processes, seed=options.seed, device=self.device
        )
        self.total = options.epochs * len(self.loader)
        self.place = Place()
        self.micro_batches, self.halved = options.micro_batches, False
        self.watch = Watch(self._explain)
        self.meter = Meter(self.watch)
        self.log = RunLog(run.log, self.main)
        self.began = self.saved = self.mark = time.monotonic()
        seed_all(options.seed + 1)  # the same everywhere: each process draws for all rows and keeps its own (chance.py)

    def _optimizer(self) -> torch.optim.Optimizer:
        groups = getattr(self.method, "parameter_groups", None)
        groups = [{"params": self.parameters}] if groups is None else groups(self.model)
        groups = [{**group, "params": list(group["params"])} for group in groups]
        real = all(p.is_floating_point() for group in groups for p in group["params"])
        return torch.optim.AdamW(
            groups,
            lr=self.options.lr,
            betas=self.options.betas,
            weight_decay=self.options.weight_decay,
            fused=real and self.device.type in ("cpu", "cuda"),
        )

    # --- one step

    def descend(self, batch: Batch, step: Step) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step; returns the named losses and the gradient norm, still on the device."""
        own = getattr(self.method, "lr_factor", None)
        factor = own(step) if own else lr_factor(step.index, step.total, self.options.warmup, self.options.lr_final)
        decay = getattr(self.method, "weight_decay", None)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * group.get("lr_scale", 1.0) * factor
            if decay is not None and group["weight_decay"]:
                group["weight_decay"] = decay(step)
        losses = self._gradients_within_memory(batch, step)
        clip = self.options.grad_clip or float("inf")
        most = -(-self.loader.global_size(self.place.batch) // self.processes)
        rows = [moving for table in self.tables if (moving := table.gather(most)) is not None]
        norm = nn.utils.clip_grad_norm_([*self.parameters, *rows], clip)
        self.optimizer.step()
        for table in self.tables:
            table.step(self.options.lr * table.lr_scale * factor, self.options.betas)
        self.ema.update()
        return losses, norm

    def _gradients_within_memory(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Gradients of a batch; when memory runs out, once, with batches in twice as many pieces."""
        while True:
            try:
                return self._gradients(batch, step)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                size = -(-len(batch.index) // self.micro_batches)
                if self.processes > 1:  # one alone cannot go back: the others are on their way to where they meet
                    raise InputError(
                        f"the {self._holder} of process {self.rank} has not enough memory for {size} images at a time, "
                        "and with several processes a batch is not halved: start again with half the --batch-size, or "
                        f"go on with --resume and more {self._holder}s, which share the batch"
                    ) from None
                if self.halved or size < 2:
                    raise InputError(
                        f"the {self._holder} has not enough memory for {size} images at a time: start again with a "
                        "smaller --batch-size"
                    ) from None
            self._halve(len(batch.index))  # outside the except block, whose traceback holds on to the tensors

    @property
    def _holder(self) -> str:
        """What ran out of memory, in words."""
        return "GPU" if self.device.type == "cuda" else "machine"

    def _halve(self, images: int) -> None:
        """From now on cut every batch into twice as many pieces, and say so."""
        self.micro_batches, self.halved = 2 * self.micro_batches, True
        compared = getattr(self.method, "compares_images", False)
        result = "images are then compared within a piece only" if compared else "the result is the same"
        message = (
            f"the {self._holder} ran out of memory: from now on a batch is computed in {self.micro_batches} pieces of "
            f"{-(-images // self.micro_batches)} images; {result}, a little slower"
        )
        notice(message)
        self.log.write(message)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _gradients(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Backward through all pieces of a batch, weighted so that the sum is the gradient of the global mean."""
        self.optimizer.zero_grad(set_to_none=True)
        for table in self.tables:
            table.drop()
        count, total = len(batch.index), self.loader.global_size(self.place.batch)
        share = self.loader.weight(self.place.batch) * self.processes / total
        # as many pieces in every process, so that what they tell each other on the way is told as often
        parts = pieces(batch, min(self.micro_batches, max(1, total // self.processes)))
        sums: dict[str, Tensor] = {}
        done = 0
        for number, part in enumerate(parts):
            weight = share * len(part.index) / count
            waits = self.processes > 1 and number < len(parts) - 1
            own, done = self._own_rows(done, len(part.index), total), done + len(part.index)
            with self.fabric.no_backward_sync(self.objective) if waits else nullcontext(), own:
                losses = self.objective(Work(part, step))
                self.fabric.backward(losses["loss"] if weight == 1 else losses["loss"] * weight)
            for name, value in losses.items():
                value = value.detach() if len(parts) == 1 else value.detach() * (len(part.index) / count)
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def _own_rows(self, done: int, count: int, total: int) -> AbstractContextManager:
        """Where processes share a batch of ``total``: which of its rows the next ``count`` of this process are."""
        if self.processes == 1:
            return nullcontext()
        if self.rank >= total:  # a row again, which does not count
            return chance.sharing(chance.Share([0], total))
        first = self.rank + done * self.processes
        return chance.sharing(chance.Share(slice(first, first + count * self.processes, self.processes), total))

    # --- time and stopping

    def decide(self, received: str) -> tuple[str, bool]:
        """(why to stop or "", whether a checkpoint is due), the same answer in every process."""
        now = time.monotonic()
        limit = self.options.max_minutes
        reason = received or ("max_minutes" if limit is not None and now - self.began > 60 * limit else "")
        due = now - self.saved >= 60 * self.options.checkpoint_every_minutes
        if self.processes == 1:
            return reason, due
        flags = torch.tensor([STOPS.index(reason), int(due and self.main)])
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.control)
        return STOPS[int(flags[0])], bool(flags[1])

    def tick(self) -> None:
        """Add the time since the last tick to the time spent training."""
        now = time.monotonic()
        self.place.seconds += now - self.mark
        self.mark = now

    # --- saving and restoring

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What this training is, to be compared on resume."""
        options = plain(getattr(self.method, "options", None)) or {}
        return {
            "options": plain(self.options),
            "method": {"name": self.method.name, "options": options},
            "particles": checkpoint.fingerprint(self.particles),
        }

    def save(self, even_if_not_calm: bool = True) -> bool:
        """Write the checkpoint (all processes call it); False where it was left out because the loss is exploding.

        Reads the pending losses first, so that weights that went wrong never replace a good checkpoint.
        """
        self.meter.collect()
        self.saved = time.monotonic()
        if not (self.watch.calm or even_if_not_calm):
            return False
        self.tick()
        generators: list[Any] = [rng_state()]
        if self.processes > 1:
            generators = [None] * self.processes
            torch.distributed.all_gather_object(generators, rng_state(), group=self.control)
        if self.main:
            state = {
                "format": checkpoint.FORMAT,
                "version": __version__,
                "place": plain(self.place),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "tables": [table.moments() for table in self.tables],
                "ema": self.ema.state_dict(),
                "rng": generators,
                "meter": self.meter.state_dict(),
                "watch": self.watch.state_dict(),
                "micro_batches": self.micro_batches,
                **self.identity,
            }
            checkpoint.save_state(self.run.checkpoint, state)
        self.saved = time.monotonic()
        return True

    def share_broken(self) -> None:
        """Let the first process tell the broken images that all have met; all call it."""
        share = getattr(self.loader, "share_broken", None)
        if share is not None:
            share(self._all())

    def _all(self) -> Processes:
        return Processes(self.rank, self.processes, self.control)

    def together(self) -> None:
        """Wait for all processes."""
        if self.processes > 1:
            torch.distributed.barrier(group=self.control)

    def restore(self) -> None:
        """Take up the checkpoint; raises InputError where it belongs to another training."""
        path = self.run.checkpoint
        state = checkpoint.load_state(path, "a checkpoint")
        then = checkpoint.with_later_options(state, self.method.options)
        checkpoint.refuse_differences(path, then, self.identity)
        self.place = Place(**state["place"])
        before = state["options"]["epochs"]
        if before != self.options.epochs:
            # a stream of images is as long as --images says, and its epochs are the time between two tests
            images = getattr(self.particles, "epoch_images", None)
            flag, unit = ("--num-epochs", 1) if images is None else ("--images", images)
            now, done = self.options.epochs * unit, self.place.epoch * unit
            if now < done:
                at = f"epoch {done}" if images is None else f"{done} images"
                raise InputError(f"{flag} {now}: {path} is already at {at}")
            notice(f"{flag} was {before * unit} and is {now} now: the learning rate follows the new length")
        tables = state.get("tables", [])
        if len(tables) != len(self.tables):
            raise InputError(f"{path}: of an earlier cryosuite, which learnt poses in another way: start the run again")
        checkpoint.load_into(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        for table, moments in zip(self.tables, tables, strict=True):
            table.load_moments(moments)
        self.ema.load_state_dict(state["ema"])
        self.meter.load_state_dict(state["meter"])
        self.watch.load_state_dict(state["watch"])
        self.micro_batches = max(state["micro_batches"], self.options.micro_batches)
        same = len(state["rng"]) == self.processes  # else another number of processes goes on
        set_rng_state(state["rng"][self.rank if same else 0])

    def open_logs(self) -> MetricsLog:
        """Start (or go on with) run.log and metrics.jsonl."""
        if self.main:
            write_header(
                self.log,
                self.run,
                str(self.device),
                str(self.fabric.strategy.precision.precision),
                self.processes,
                self.options.seed,
            )
            place = self.place
            self.log.write(
                f"{'going on at' if place.step else 'starting at'} step {place.step} of {self.total}, "
                f"epoch {place.epoch + 1} of {self.options.epochs}, {len(self.particles)} images"
            )
        return MetricsLog(self.run.metrics, self.place.step, self.main)

    def epoch_is_finished(self) -> bool:
        """Whether ``finish_epoch`` has been done for the epoch of this place, as the first process sees it."""
        return self._all().first_does(self.run.weights(self.place.epoch).exists)

    def finish_epoch(self, on_epoch: Callable[[int, nn.Module], None] | None) -> None:
        """The work after an epoch with the averaged weights: ``on_epoch``, then weights.N.pkl."""
        state = rng_state()
        training = self.model.training
        self.model.eval()
        with self.ema.swapped_in():
            if on_epoch is not None:
                on_epoch(self.place.epoch, self.model)
            if self.main:
                checkpoint.save_weights(self.run.weights(self.place.epoch), self.place.epoch, self.model)
        self.model.train(training)
        set_rng_state(state)
        self.mark = time.monotonic()

    def _explain(self, step: int, rows: np.ndarray) -> str:
        saved = checkpoint.load_state(self.run.checkpoint, "a checkpoint") if self.run.checkpoint.is_file() else None
        last = "No checkpoint had been written yet."
        if saved is not None:
            last = f"The last good checkpoint is {self.run.checkpoint} (step {saved['place']['step']})."
        describe = getattr(self.particles, "describe", None)  # a set that is no plain list of images knows itself
        which = describe_images(self.particles, rows) if describe is None else describe(rows)
        return f"{which} {last} A lower --lr often helps."
