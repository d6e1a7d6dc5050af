"""Speed of train-kraqen and polish: rates and how they grow, all in one process on one thread.

    python tests/benchmarks/kraqen_speed.py [--only network,codes,voxel,given,polish] [--rounds 3]

"network": one training step (forward, backward, AdamW, all frequencies) of the tri-plane field with 100 codes of rank
64 at D = 128 beside train-hype's default preset. "codes": the same step with 10 and with 200 codes. "voxel": images per
CPU second of one EM iteration (scores of all codes, then insertion), D = 32, with 24, 48 and 96 codes. "polish":
particles per CPU second summed into 16 classes and two half sets, beside one map's backprojection; both in memory that
the process keeps between rounds (`keep_memory`), and what a process pays that has to be given that memory first.
"given": the same rates where each round is given its memory anew, as a process that runs once is. The least CPU time
of several rounds counts, because the machine's noise only ever adds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from common import RESULTS, save
from hype_published_way import random_batch

from cryosuite.data.particles import ParticleSet
from cryosuite.kernels import fourier, rotations
from cryosuite.training.launch import fast_bf16, tune_process
from cryosuite.training.method import Method, Step

CODES, RANK, BOX = 100, 64, 128
EM_BOX, EM_IMAGES, EM_CODES = 32, 600, (24, 48, 96)
POLISH_CLASSES, POLISH_SETS = 16, ((64, 8000), (128, 2000), (128, 10000), (128, 40000))
GIVEN_SETS = ((128, 2000), (128, 10000))
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
IDLE_S = 10  # in which a virtual machine has given freed pages back to its host


def least(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of the fastest of several calls, after one that warms up."""
    work()
    spent = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return min(spent)


def noise_particles(count: int, box: int, seed: int = 0) -> ParticleSet:
    """Noise images with random poses and a CTF: what is in them does not matter to the time."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    table = np.zeros((count, 9), np.float32)
    table[:] = [box, 320 / box, 15000, 14500, 0, 300, 2.7, 0.1, 0]
    return ParticleSet.from_array(
        generator.standard_normal((count, box, box), dtype=np.float32),
        320 / box,
        rotation=rotations.random_rotations(count, dtype=torch.float32).numpy(),
        shift=np.zeros((count, 2), np.float32),
        ctf=table,
        noise=np.full((1, box // 2 + 1), float(box**2), np.float32),
        normalised=True,
    )


def step_seconds(method: Method, batch_size: int, rounds: int) -> float:
    """CPU seconds of one optimiser step at full resolution, late in the training."""
    torch.manual_seed(0)
    model = method.build(noise_particles(64, BOX))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, fused=True)
    batch = random_batch(BOX, batch_size)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bf16()):
            loss = method.loss(model, batch, Step(700, 1000))["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return least(step, rounds)


def triplane(codes: int) -> Method:
    """The tri-plane field as --field triplane makes it, with 64 channels."""
    from cryosuite.methods.kraqen import Kraqen
    from cryosuite.methods.kraqen_options import KraqenOptions

    return Kraqen(KraqenOptions(field="triplane", n_codes=codes, rank=RANK))


def bench_network(rounds: int) -> dict:
    """Images per second of the tri-plane beside train-hype."""
    from cryosuite.methods.hype import Hype
    from cryosuite.methods.hype_options import PRESETS

    ours = 8 / step_seconds(triplane(CODES), 8, rounds)
    hype = 2 / step_seconds(Hype(PRESETS["default"].options), 2, rounds)
    return {
        "box": BOX, "codes": CODES, "rank": RANK, "kraqen_images_per_s": round(ours, 2),
        "hype_images_per_s": round(hype, 3), "ratio": round(ours / hype, 1),
    }  # fmt: skip


def bench_codes(rounds: int) -> dict:
    """The cost of a step with few and with many codes."""
    few, many = (step_seconds(triplane(codes), 8, rounds) for codes in (10, 200))
    return {"codes": [10, 200], "seconds": [round(few, 4), round(many, 4)], "growth": round(many / few, 3)}


def em_seconds(codes: int, rounds: int) -> tuple[float, float]:
    """CPU seconds to score all images under all codes, and to insert them with 1.5 codes each."""
    from cryosuite.kernels import class_slices

    generator = torch.Generator().manual_seed(0)
    disc = fourier.half_disc(EM_BOX)
    shape = (EM_IMAGES, len(disc))
    x = torch.complex(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
    ctf = torch.randn(shape, generator=generator)
    rotation = rotations.random_rotations(EM_IMAGES, dtype=torch.float32)
    volumes = torch.randn((codes, EM_BOX, EM_BOX, EM_BOX), generator=generator)
    transforms = class_slices.class_transforms(volumes, EM_BOX // 2)
    values, weights = x * ctf, ctf.square()
    score = least(lambda: class_slices.class_sums(transforms, values, weights, rotation, disc), rounds)
    first = np.arange(EM_IMAGES) % codes
    pairs = np.sort(np.stack([first, (first + 1) % codes], 1), 1)
    keep = np.stack([np.ones(EM_IMAGES, bool), np.arange(EM_IMAGES) % 2 == 0], 1)
    shares = torch.full((int(keep.sum()),), 0.5)
    rows = torch.from_numpy(np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int64))
    classes = torch.from_numpy(pairs[keep].astype(np.int32))
    sums = class_slices.new_class_accumulator(codes, EM_BOX // 2)
    insert = least(
        lambda: class_slices.insert_classes(sums, values, weights, (shares, classes, rows), rotation, disc), rounds
    )
    return score, insert


def bench_voxel(rounds: int) -> dict:
    """Image visits per CPU second of an EM iteration and how the time grows with the codes."""
    seconds = {codes: em_seconds(codes, rounds) for codes in EM_CODES}
    least_codes = EM_CODES[0]
    total = {codes: sum(parts) for codes, parts in seconds.items()}
    return {
        "box": EM_BOX, "images": EM_IMAGES, "codes": list(EM_CODES),
        "visits_per_s": [round(EM_IMAGES / total[codes]) for codes in EM_CODES],
        "scores_s": [round(seconds[codes][0], 4) for codes in EM_CODES],
        "insertion_s": [round(seconds[codes][1], 4) for codes in EM_CODES],
        "growth": round(total[EM_CODES[-1]] / total[least_codes], 2), "codes_growth": EM_CODES[-1] / least_codes,
    }  # fmt: skip


def bench_given(rounds: int) -> dict:
    """`bench_polish` in memory that malloc asks the system for, and gives back, in every round."""
    return {"classes": POLISH_CLASSES, "sets": [polish_rates(box, count, rounds) for box, count in GIVEN_SETS]}


def bench_polish(rounds: int) -> dict:
    """One pass into 16 classes and two halves, beside the pass of one map and its two halves."""
    from cryosuite.kernels import slices

    given = {box: handed_out(lambda b=box: slices.new_accumulator(b).data) for box in dict(POLISH_SETS)}
    keep_memory()  # for good: this comes last
    sets = [polish_rates(box, count, rounds) | given[box] for box, count in POLISH_SETS]
    return {"classes": POLISH_CLASSES, "sets": sets}


def polish_rates(box: int, count: int, rounds: int) -> dict:
    """Images per CPU second of both passes over one set."""
    from cryosuite.reconstruct.backproject import Accumulator
    from cryosuite.reconstruct.class_sums import accumulate
    from cryosuite.reconstruct.weights import ClassWeights

    particles = noise_particles(count, box)
    half = particles.half_sets()
    labels = ClassWeights.from_labels(np.arange(count) % POLISH_CLASSES)
    single = least(lambda: Accumulator(particles).run(half.astype(np.int64)), rounds)
    many = least(lambda: accumulate(particles, labels), rounds)
    return {
        "box": box, "images": count, "backproject_images_per_s": round(count / single),
        "polish_images_per_s": round(count / many), "ratio": round(single / many, 3), "pass_s": round(many, 2),
    }  # fmt: skip


def handed_out(new: Callable[[], torch.Tensor]) -> dict[str, float]:
    """CPU seconds to write for the first time to every page of the sums of all classes: pages that this process gave
    back a moment ago, and pages given back so long ago that a virtual machine fetches them from its host again."""

    def first_writes() -> float:
        sums = [new() for _ in range(2 * POLISH_CLASSES)]
        began = time.process_time()
        for data in sums:
            data.view(-1)[::1024] = 1
        return time.process_time() - began

    first_writes()
    at_once = first_writes()
    time.sleep(IDLE_S)
    return {"pages_at_once_s": round(at_once, 2), "pages_after_idling_s": round(first_writes(), 2)}


def keep_memory() -> None:
    """Have malloc keep what is freed, so that rounds measure the program: a rented virtual machine hands freed pages
    back to its host within seconds, and asking for them again takes up to forty times as long as filling them with
    zeros. Zeros are still written in every round, as the system writes them to pages it gives to a process."""
    malloc = ctypes.CDLL(None)
    for parameter, value in ((M_TRIM_THRESHOLD, -1), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
        if not malloc.mallopt(parameter, value):
            raise SystemExit("polish: glibc's mallopt is needed to measure this")


BENCHES = {"network": bench_network, "codes": bench_codes, "voxel": bench_voxel, "given": bench_given}
BENCHES["polish"] = bench_polish  # the last: it changes how memory is had


def main() -> None:
    """Measure what was chosen, print, save; rows that are not measured again are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tune_process()
    earlier = RESULTS / "kraqen_speed.json"
    rows = json.loads(earlier.read_text())["rows"] if earlier.exists() else {}
    for name in arguments.only.split(","):
        rows[name] = BENCHES[name](arguments.rounds)
        print(name, rows[name], flush=True)
        save("kraqen_speed", {"seed": 0, "threads": 1, "bf16": fast_bf16(), "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
