"""Speed and memory beside cryoDRGN and RELION: ratios of CPU seconds in one run on one machine.

    python tests/benchmarks/speed.py [--work DIR] [--images 5000] [--only preprocess,backproject,...]

cryoDRGN is taken from the virtual environment in CRYODRGN_VENV (``make bench`` makes one from PyPI), RELION from PATH
(Debian: apt-get install relion). Absent peers leave their columns blank.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from common import CRYOSUITE, RESULTS, Timing, best, peer, save, timed

SEED = 7
ALL = "help,fsc,preprocess,backproject64,backproject64x4,backproject128"


def cryodrgn(name: str = "cryodrgn") -> str | None:
    """The peer's executable in its own environment."""
    return peer(name, "", os.path.join(os.environ.get("CRYODRGN_VENV", "/nonexistent"), "bin", name))


def simulate(folder: Path, box: int, images: int, pixel_size: float) -> Path:
    """A phantom set to time on; what is in it does not matter, its size does."""
    out = folder / f"sim{box}"
    if not (out / "dataset.yaml").exists():
        options = ["--structures", "phantom:2", "-n", str(images), "-D", str(box), "--Apix", str(pixel_size)]
        timed([*CRYOSUITE, "simulate", "-o", str(out), *options, "--seed", str(SEED)])
    return out


def entry(ours: Timing, images: int | None = None, **peers: Timing | None) -> dict:
    """One row: our figures, each peer's, and the ratio of CPU seconds peer / ours."""
    row: dict = {"cpu_s": round(ours.cpu_s, 2), "wall_s": round(ours.wall_s, 2), "rss_mib": round(ours.rss_mib)}
    if images:
        row["images_per_cpu_s"] = round(images / ours.cpu_s)
    for name, timing in peers.items():
        if timing is not None:
            row[name] = {
                "cpu_s": round(timing.cpu_s, 2),
                "wall_s": round(timing.wall_s, 2),
                "rss_mib": round(timing.rss_mib),
                "ratio": round(timing.cpu_s / ours.cpu_s, 2),
            }
    return row


def total(timings: list[Timing]) -> Timing:
    """Several processes as one: times added, the largest peak."""
    cpu, wall = sum(timing.cpu_s for timing in timings), sum(timing.wall_s for timing in timings)
    return Timing(cpu, wall, max(timing.rss_mib for timing in timings), "")


def repeat(source: Path, times: int) -> Path:
    """A set several times over: a stack as long as real ones are, without simulating it."""
    import numpy as np

    from cryosuite.formats.pickles import read_ctf, read_poses, write_pickle
    from cryosuite.formats.stacks import StackReader, StackWriter
    from cryosuite.formats.star import read_star, write_star

    out = source.with_name(f"{source.name}x{times}")
    if (out / "ctf.pkl").exists():
        return out
    out.mkdir(exist_ok=True)
    blocks = read_star(source / "particles.star")
    rows = blocks["particles"]
    reader = StackReader(source / "particles.mrcs")
    with StackWriter(out / "particles.mrcs", reader.count * times, reader.box_size[0], reader.pixel_size) as writer:
        for _ in range(times):
            for start in range(0, reader.count, 500):
                writer.write(reader.read(np.arange(start, min(start + 500, reader.count))))
    blocks["particles"] = rows.loc[rows.index.repeat(times)].reset_index(drop=True)
    blocks["particles"]["rlnImageName"] = [f"{n + 1:06d}@particles.mrcs" for n in range(reader.count * times)]
    write_star(out / "particles.star", blocks)
    rotation, shift = read_poses(source / "poses.pkl")
    write_pickle(out / "poses.pkl", (np.tile(rotation, (times, 1, 1)), np.tile(shift, (times, 1))))
    write_pickle(out / "ctf.pkl", np.tile(read_ctf(source / "ctf.pkl"), (times, 1)))
    return out


def bench_preprocess(work: Path, images: int, runs: int) -> dict:
    """128 -> 64 of one stack, four times the images; cryoDRGN's downsample of the same stack."""
    source = repeat(simulate(work, 128, images, 2.5), 4)
    images *= 4
    ours = best(
        [*CRYOSUITE, "preprocess", str(source / "particles.star"), "-D", "64", "-o", str(work / "pre"), "--overwrite"],
        runs,
    )
    theirs = None
    if program := cryodrgn():
        theirs = best(
            [program, "downsample", str(source / "particles.mrcs"), "-D", "64", "-o", str(work / "drgn64.mrcs")], runs
        )
    return entry(ours, images, cryodrgn=theirs)


def bench_backproject(work: Path, images: int, box: int, runs: int, times: int = 1) -> dict:
    """All images into map, half maps and FSC. RELION runs three times (map, two halves), without FSC.

    ``times``: so many times the same images, from the star file alone.
    """
    source = simulate(work, box, images, 320 / box)
    if times > 1:
        source, images = repeat(source, times), images * times
    star, stack = source / "particles.star", source / "particles.mrcs"
    given = str(star if times > 1 else source)
    ours = best([*CRYOSUITE, "backproject", given, "-o", str(work / f"bp{box}"), "--overwrite"], runs)
    theirs = relion = None
    if program := cryodrgn():
        pickles = ["--poses", str(source / "poses.pkl"), "--ctf", str(source / "ctf.pkl"), "--uninvert-data"]
        theirs = timed([program, "backproject_voxel", str(stack), *pickles, "-o", str(work / f"drgn_bp{box}")])
    if program := peer("relion_reconstruct", "RELION_RECONSTRUCT", ""):
        command = [program, "--i", star.name, "--o", str(work / f"relion{box}.mrc"), "--ctf"]
        relion = total(
            [best([*command, *half], runs, cwd=source) for half in ([], ["--subset", "1"], ["--subset", "2"])]
        )
    return entry(ours, images, cryodrgn=theirs, relion=relion)


def bench_fsc(work: Path, box: int, runs: int) -> dict:
    """FSC of two random maps."""
    import numpy as np

    from cryosuite.formats.mrc import write_map

    rng = np.random.default_rng(SEED)
    signal = rng.standard_normal((box,) * 3, dtype=np.float32)
    names = [work / f"{letter}{box}.mrc" for letter in "ab"]
    for name in names:
        write_map(name, signal + rng.standard_normal((box,) * 3, dtype=np.float32), 1.0)
    ours = best([*CRYOSUITE, "eval-fsc", *map(str, names), "-o", str(work / "fsc")], runs)
    theirs = None
    if program := cryodrgn("cryodrgn_utils"):
        theirs = best([program, "fsc", *map(str, names), "-o", str(work / "fsc.txt")], runs)
    return entry(ours, cryodrgn=theirs)


def bench_help(work: Path, runs: int) -> dict:
    """The time to an answer of --help."""
    ours = best([*CRYOSUITE, "--help"], max(runs, 3))
    program = cryodrgn()
    return entry(ours, cryodrgn=best([program, "--help"], runs) if program else None)


def main() -> None:
    """Run the chosen benchmarks and write results/speed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "cryosuite-bench")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--only", default=ALL)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    work, images, runs = arguments.work, arguments.images, arguments.runs
    every = {
        "help": lambda: bench_help(work, runs),
        "fsc": lambda: bench_fsc(work, 256, runs),
        "preprocess": lambda: bench_preprocess(work, images, runs),
        "backproject64": lambda: bench_backproject(work, images, 64, runs),
        "backproject64x4": lambda: bench_backproject(work, images, 64, runs, 4),
        "backproject128": lambda: bench_backproject(work, images, 128, runs),
    }
    earlier = RESULTS / "speed.json"  # rows that are not measured again are kept
    rows = json.loads(earlier.read_text())["rows"] if earlier.exists() and arguments.only != ALL else {}
    for name in arguments.only.split(","):
        rows[name] = every[name]()
        print(name, rows[name], flush=True)
    save("speed", {"seed": SEED, "images": images, "runs": runs, "rows": rows})


if __name__ == "__main__":
    main()
