"""The batch loader on a work folder against images held in memory, both shuffled; with the file in the page cache, and
with its pages dropped before every epoch.

    python tests/benchmarks/fire_loader.py [--work FOLDER] [--images 16000] [--box 64] [--rounds 10]

"In memory" is the least that a loader can do: a permutation of the whole set, and of each batch the rows gathered from
one tensor, with poses and CTF. Every epoch of every kind reads all images and adds up some pixels of each batch. The
rates are images per second of processor time (threads together), which another job on the machine does not change, and
by the clock; of several rounds, each with all kinds one after the other, the best counts. The cold epochs wait for the
disk; so does a plain read of the file from end to end, to which they are compared. Beside a training of
``--step-rate`` images/s (a wait as long as its steps) the disk is read ahead while the steps run.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import save

from cryosuite.data.loader import Batch, BatchLoader
from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.work_files import write_work_files
from cryosuite.data.workdir import WorkDir
from cryosuite.formats.mrc import StackWriter

BATCH = 256
WANTED = 0.8
SLOW_ROUNDS = 2  # of those that wait for the disk or for each other


@dataclass
class Rate:
    """Images per second of the clock and of the processor."""

    clock: float = 0.0
    processor: float = 0.0

    def best(self, other: Rate) -> Rate:
        """The better of two rounds, each on its own."""
        return Rate(max(self.clock, other.clock), max(self.processor, other.processor))


def make_work(folder: Path, count: int, box: int, seed: int) -> ParticleSet:
    """A work folder of noise with poses and CTF; kept when it is of this size."""
    work = WorkDir(folder)
    if not (work.exists() and work.read_dataset()["n_particles"] == count):
        rng = np.random.default_rng(seed)
        work.path.mkdir(parents=True, exist_ok=True)
        table = np.tile(np.float32([box, 3.0, 15000, 14800, 30, 300, 2.7, 0.1, 0]), (count, 1))
        rotation = np.tile(np.eye(3, dtype=np.float32), (count, 1, 1))
        described = ParticleSet.from_array(
            np.broadcast_to(np.zeros((1, box, box), np.float32), (count, box, box)), 3.0, rotation=rotation,
            shift=np.zeros((count, 2), np.float32), ctf=table,
        )  # fmt: skip
        with StackWriter(work.particles, count, box, 3.0) as writer:
            for start in range(0, count, 1000):
                shape = (min(1000, count - start), box, box)
                writer.write(rng.standard_normal(shape, dtype=np.float32))
        write_work_files(work, described, box, described.pixel_size, None, {"sign": 1, "normalised": True})
    return open_particles(folder)


def drop(path: Path) -> None:
    """Give the pages of a file back to the system."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def from_memory(particles: ParticleSet, images: np.ndarray, epoch: int) -> Iterator[Batch]:
    """Batches in the order of a permutation of all rows, gathered from a tensor."""
    tensor, rotation, shift = (torch.from_numpy(x) for x in (images, particles.rotation, particles.shift))
    order = np.random.default_rng([0, epoch]).permutation(len(particles))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        index = torch.from_numpy(rows)
        group = torch.from_numpy(particles.optics_group[rows].astype(np.int64))
        yield Batch(index, tensor[index], rotation[index], shift[index], particles.ctf_params(rows), group)


def consumed(batches: Iterator[Batch], step: float = 0.0) -> Rate:
    """The rate of an epoch whose batches are looked at; ``step`` seconds of waiting for each stand for a training."""
    clock, processor, count = time.perf_counter(), time.process_time(), 0
    for batch in batches:
        count += len(batch)
        batch.images[:, ::8, ::8].sum()
        if step:
            time.sleep(step)
    return Rate(count / (time.perf_counter() - clock), count / (time.process_time() - processor))


def whole_file(path: Path, images: int) -> Rate:
    """A plain read of the file, 8 MiB at a time."""
    clock, processor, buffer = time.perf_counter(), time.process_time(), bytearray(8 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return Rate(images / (time.perf_counter() - clock), images / (time.process_time() - processor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("bench/fire/loader"))
    parser.add_argument("--images", type=int, default=16000)
    parser.add_argument("--box", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-rate", type=float, default=2000.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    particles = make_work(given.work, given.images, given.box, given.seed)
    file = WorkDir(given.work).particles
    images = particles.read(slice(None))
    loader, step = BatchLoader(particles, BATCH, seed=given.seed), BATCH / given.step_rate
    plain = BatchLoader(particles, BATCH, seed=given.seed, prefetch=0)

    def cold(run: Callable[[], Rate]) -> Rate:
        drop(file)
        return run()

    def warm(run: Callable[[], Rate]) -> Rate:
        whole_file(file, given.images)  # a system short of memory drops pages at any time
        return run()

    kinds: dict[str, Callable[[int], Rate]] = {
        "memory": lambda epoch: consumed(from_memory(particles, images, epoch)),
        "warm": lambda epoch: warm(lambda: consumed(plain.epoch(epoch))),
        "warm, threads": lambda epoch: warm(lambda: consumed(loader.epoch(epoch))),
        "cold": lambda epoch: cold(lambda: consumed(loader.epoch(epoch))),
        "disk": lambda epoch: cold(lambda: whole_file(file, given.images)),
    }
    best = {name: Rate() for name in [*kinds, "memory, training", "cold, training"]}
    for epoch in range(given.rounds):
        for name, run in kinds.items():
            if epoch < SLOW_ROUNDS or name in ("memory", "warm"):
                best[name] = best[name].best(run(epoch))
                print(epoch, name, best[name], flush=True)
    for name, batches in (("memory", lambda: from_memory(particles, images, 0)), ("cold", lambda: loader.epoch(0))):
        drop(file)
        best[f"{name}, training"] = consumed(batches(), step)
        print(name, "beside a training", best[f"{name}, training"], flush=True)
    write(given, best)


def write(given: argparse.Namespace, best: dict[str, Rate]) -> None:
    """The rows of the README's table."""
    size = f"{given.images:,} images of {given.box} pixels ({given.images * given.box**2 * 4 / 1e9:.1f} GB)"
    warm = best["warm"].processor / best["memory"].processor
    beside = best["cold, training"].clock / best["memory, training"].clock

    def line(what: str, share: float, detail: str) -> dict:
        result = f"{100 * share:.0f} % of the rate in memory"
        held = "" if share >= WANTED else f" (below {100 * WANTED:.0f} %)"
        return {"kind": "load", "what": what, "tried": given.rounds, "result": result + held, "detail": detail}

    rows = [
        line(
            f"shuffled loader, file in the page cache: {size}", warm,
            f"{best['warm'].processor:,.0f} against {best['memory'].processor:,.0f} images per second of processor",
        ),
        line(
            f"shuffled loader beside a training of {given.step_rate:,.0f} images/s, pages dropped before each epoch",
            beside,
            f"alone it reads {best['cold'].clock:,.0f} images/s, the disk from end to end gives "
            f"{best['disk'].clock:,.0f} (with {os.getloadavg()[0]:.0f} jobs on {os.cpu_count()} processors)",
        ),
    ]  # fmt: skip
    rows[1]["tried"] = 1
    rates = {name: {"clock": round(rate.clock), "processor": round(rate.processor)} for name, rate in best.items()}
    save("fire_loader", {"seed": given.seed, "rows": rows, "images_per_second": rates})


if __name__ == "__main__":
    main()
