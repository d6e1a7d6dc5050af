"""Where a training runs: devices, processes, precision and seeds, on a laptop, under torchrun or under srun."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning_fabric.strategies import DDPStrategy

from cryosuite import ranks
from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import InputError
from cryosuite.training.options import TrainOptions

TIMEOUT = timedelta(minutes=30)  # of messages between processes that train
PATIENCE = timedelta(days=1)  # of processes that share work out: one may be much slower, a dead one is noticed at once


@dataclass(frozen=True)
class Shape:
    """How many processes there are: ``devices`` on each of ``nodes``, started by ``launcher``."""

    devices: int
    nodes: int
    launcher: str  # "torchrun", "srun" or "self"

    @property
    def world_size(self) -> int:
        """The number of processes in all."""
        return self.devices * self.nodes


def launch_shape(options: TrainOptions, environ: Mapping[str, str] = os.environ) -> Shape:
    """The processes that are running or must be started: what torchrun or srun say, else what the options say.

    Inside a SLURM batch script without srun the options count: one process that starts the others itself.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        local = int(environ["LOCAL_WORLD_SIZE"])
        return Shape(local, int(environ["WORLD_SIZE"]) // local, "torchrun")
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        nodes = int(environ.get("SLURM_STEP_NUM_NODES", "1"))
        if tasks % nodes:
            raise InputError(f"srun started {tasks} tasks on {nodes} nodes: use the same number on every node")
        return Shape(tasks // nodes, nodes, "srun")
    return Shape(options.devices, options.num_nodes, "self")


def process_rank(environ: Mapping[str, str] = os.environ) -> int:
    """The rank of this process as its launcher says, before any process group exists."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return ranks.process_rank(environ)


def was_restarted(environ: Mapping[str, str] = os.environ) -> bool:
    """True where torchrun (--max-restarts) or SLURM (requeue) started this very command before.

    Such a run goes on from its checkpoint although nobody typed --resume.
    """
    counts = (environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


def world() -> tuple[int, int]:
    """(rank, number of processes) of the running process group; (0, 1) where there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def join_processes(devices: int = 1, num_nodes: int = 1, accelerator: str = "cpu") -> Processes:
    """The processes that torchrun or srun started to do this command's work together; one where nobody did.

    They speak by gloo, on processors, whatever the command computes on; on a machine with GPUs each takes its own.

    Args:
        devices: on each of ``num_nodes`` machines, started here where nobody started them.
        accelerator: "cuda" where each of these needs a GPU.

    Raises InputError where more GPUs are asked for than this machine has.
    """
    options = TrainOptions(accelerator="cpu", devices=devices, num_nodes=num_nodes)
    shape = launch_shape(options)
    if accelerator == "cuda" and shape.launcher == "self":
        _need_gpus(shape.devices)
    if shape.world_size == 1:
        return ALONE
    fabric = start_fabric(options)
    if torch.cuda.is_available():
        torch.cuda.set_device(fabric.local_rank % torch.cuda.device_count())
    atexit.register(_leave)
    return training_processes()


def _leave() -> None:
    """End gloo's threads: one that still runs when a process ends aborts it, though all its work is done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def meet(options: TrainOptions) -> Processes:
    """Start and join the processes of a training that is about to begin, for work that they share before it."""
    if launch_shape(options).world_size > 1:
        start_fabric(options)
    return training_processes()


def training_processes() -> Processes:
    """The processes of a training, for work that they share before or after it; they speak by gloo."""
    rank, count = world()
    if count == 1:
        return ALONE
    return Processes(rank, count, all_connected(torch.distributed.new_group(backend="gloo", timeout=PATIENCE)))


def all_connected(group: Any = None) -> Any:
    """The group (None: of all processes) once every process has its connections.

    One that ended before, by a mistake in its input say, would leave the others calling it until their time is over.
    """
    torch.distributed.barrier(group)
    return group


def resolve_accelerator(name: str) -> str:
    """ "auto" is a CUDA card where there is one, else the CPU (Apple's GPU has no complex numbers)."""
    if name == "gpu" and not torch.cuda.is_available():
        raise InputError("--accelerator gpu: torch finds no CUDA device here; use --accelerator cpu or auto")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if name == "gpu" else name


def fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively (AVX512-BF16 or AMX): about five times float32's rate."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def resolve_precision(name: str, accelerator: str) -> str:
    """Lightning's name of the precision: "auto" is bf16-mixed on cards that have it, else 32-true."""
    if name == "auto":
        name = "bf16" if accelerator == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    return "bf16-mixed" if name == "bf16" else "32-true"


def start_fabric(options: TrainOptions, unused_parameters: bool = False) -> Fabric:
    """Lightning Fabric for these options, its processes started and joined."""
    shape = launch_shape(options)
    accelerator = resolve_accelerator(options.accelerator)
    if accelerator == "cuda":
        _need_gpus(shape.devices)
    strategy: DDPStrategy | str = "auto"
    if shape.world_size > 1:
        strategy = DDPStrategy(find_unused_parameters=unused_parameters, timeout=TIMEOUT)
    # its remarks on precision and rank are in run.log in our own words
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    plugins = {"self": [LightningEnvironment()], "srun": [SLURMEnvironment()], "torchrun": None}[shape.launcher]
    fabric = Fabric(
        accelerator=accelerator,
        devices=shape.devices,
        num_nodes=shape.nodes,
        strategy=strategy,
        precision=resolve_precision(options.precision, accelerator),
        plugins=plugins,
    )
    if shape.launcher == "torchrun" and world()[1] < shape.world_size and was_restarted():
        _join_anew(accelerator)
    fabric.launch()
    if world()[1] > 1 and torch.distributed.get_backend() == "gloo":
        all_connected()
    return fabric


def _need_gpus(count: int) -> None:
    if count > torch.cuda.device_count():
        raise InputError(f"--devices {count}: this machine has {torch.cuda.device_count()} GPUs")


def _join_anew(accelerator: str) -> None:
    """Join the processes of a torchrun that restarted them, under keys of this attempt.

    With a fixed --master-port the agent's store outlives a restart and still holds the addresses of the dead; a
    process that reads them before they are overwritten calls a port where nobody listens.
    """
    if accelerator == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(torch.distributed.rendezvous("env://", timeout=TIMEOUT))
    store = torch.distributed.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if accelerator == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def tune_process() -> None:
    """Settings of this process that make training on a CPU faster and change no number that matters.

    Denormal numbers count as zero, and the C library keeps freed memory instead of handing every tensor's pages back
    to the system and asking for them again.
    """
    torch.set_flush_denormal(True)
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 64 << 20)):  # mmap, trim, top pad
        mallopt(parameter, value)


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, object]:
    """The state of all random generators of this process, as tensors, numbers and lists."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss_next],
    }


def set_rng_state(state: dict) -> None:
    """Put all random generators of this process where ``rng_state`` found them."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
