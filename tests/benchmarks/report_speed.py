"""report.html of many particles: seconds and memory to write it, its size, and how fast a browser opens it.

    python tests/benchmarks/report_speed.py [--particles 300000] [--clusters 20] [--work FOLDER] [--opens 3]

Latents are made up (twenty clouds in eight dimensions); particles come from a star file of 16 columns and a stack;
each cluster has a volume of 64 voxels. Opening is timed in headless Chromium by the page's own clock: "drawn" is when
all particles stand on the map, "ready" when everything can be clicked, both from the start of the navigation. The least
of several opens counts: other work on the machine only ever adds; cpu_s is what all processes of the browser took.
On a busy machine write first, then open ahead of the other work: chrt -r 1 python ... --work FOLDER --reuse
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import mrcfile
import numpy as np
from common import save

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import Browser, missing

BOX, VOLUME = 16, 64


def make_set(folder: Path, count: int, rng: np.random.Generator) -> Path:
    """A star file of ``count`` particles with CTF, poses, micrographs and a figure of merit, and its stack."""
    star = folder / "particles.star"
    tile = rng.normal(size=(1000, BOX, BOX)).astype(np.float16)
    with mrcfile.new_mmap(folder / "particles.mrcs", (count, BOX, BOX), mrc_mode=12, overwrite=True) as stack:
        for start in range(0, count, 1000):
            stack.data[start : start + 1000] = tile[: min(1000, count - start)]
        stack.voxel_size = 4.0
    optics = ["_rlnOpticsGroup #1", "_rlnVoltage #2", "_rlnSphericalAberration #3", "_rlnAmplitudeContrast #4",
              "_rlnImagePixelSize #5", "_rlnImageSize #6", "_rlnImageDimensionality #7"]  # fmt: skip
    names = ["ImageName", "MicrographName", "AngleRot", "AngleTilt", "AnglePsi", "OriginXAngst", "OriginYAngst",
             "DefocusU", "DefocusV", "DefocusAngle", "OpticsGroup", "RandomSubset", "AutopickFigureOfMerit",
             "MaxValueProbDistribution", "CoordinateX", "CoordinateY"]  # fmt: skip
    with open(star, "w") as file:
        file.write("data_optics\n\nloop_\n" + "\n".join(optics) + f"\n1 300.0 2.7 0.1 4.0 {BOX} 2\n\n")
        file.write("data_particles\n\nloop_\n" + "\n".join(f"_rln{n} #{i}" for i, n in enumerate(names, 1)) + "\n")
        values = rng.random((count, 12))
        for i, v in enumerate(values.tolist()):
            file.write(
                f"{i + 1:06d}@particles.mrcs mic_{i // 120:05d}.mrc {360 * v[0] - 180:.3f} {180 * v[1]:.3f} "
                f"{360 * v[2] - 180:.3f} {20 * v[3] - 10:.3f} {20 * v[4] - 10:.3f} {8000 + 2e4 * v[5]:.1f} "
                f"{7900 + 2e4 * v[5]:.1f} {180 * v[6]:.2f} 1 {1 + i % 2} {v[7]:.4f} {v[8]:.4f} {4000 * v[9]:.1f} "
                f"{4000 * v[10]:.1f}\n"
            )
    return star


def make_analysis(folder: Path, count: int, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """The files of an analysis of made-up latents; returns the latents (count, 8)."""
    from cryosuite.analysis.palette import palette
    from cryosuite.data.workdir import AnalysisDir
    from cryosuite.formats.config import write_yaml
    from cryosuite.formats.mrc import write_map
    from cryosuite.formats.pickles import write_pickle

    centres = 4 * rng.normal(size=(clusters, 8))
    labels = rng.integers(0, clusters, count)
    z = (centres[labels] + rng.normal(size=(count, 8))).astype(np.float32)
    out = AnalysisDir(folder)
    volumes = out.kmeans(clusters)
    volumes.path.mkdir(parents=True, exist_ok=True)
    write_pickle(out.labels, labels.astype(np.int64))
    around = 2 * np.pi * labels / clusters
    umap = np.stack([12 * np.cos(around), 12 * np.sin(around)], 1) + rng.normal(size=(count, 2))
    write_pickle(out.umap, umap.astype(np.float32))
    axis = np.arange(VOLUME) - VOLUME // 2
    z3, y3, x3 = np.meshgrid(axis, axis, axis, indexing="ij")
    for label in range(clusters):
        blobs = sum(
            np.exp(-((x3 - a) ** 2 + (y3 - b) ** 2 + (z3 - c) ** 2) / 40.0) for a, b, c in rng.uniform(-14, 14, (8, 3))
        )
        write_map(volumes.volume(label), blobs.astype(np.float32), 4.0)
    write_yaml(out.summary, {
        "kind": "analysis", "epoch": 20, "n_particles": count, "left_out": [], "seed": 0, "clustering": "kmeans",
        "kmeans": {"clusters": clusters, "colours": palette(clusters), "levels": [0.4] * clusters,
                   "folder": volumes.path.name},
        "gmm": None, "volumes": {"start_index": 0},
    })  # fmt: skip
    return z


def write(work: Path, count: int, clusters: int) -> dict[str, float]:
    """Make everything in ``work`` and write the table and the page, once without and once with the turning volumes."""
    from cryosuite.analysis.report import write_particles, write_report
    from cryosuite.analysis.report_read import RunFacts, read_analysis
    from cryosuite.data.open import open_particles
    from cryosuite.data.workdir import AnalysisDir

    rng = np.random.default_rng(0)
    star = make_set(work, count, rng)
    z = make_analysis(work / "analyze.20", count, clusters, rng)
    records = [{"step": s, "epoch": 1, "loss": 1 + 1 / (s + 1) + 0.1 * rng.random()} for s in range(5000)]
    particles = open_particles(star)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = RunFacts(z, 20, particles, "benchmark", None, "hype", "cryosuite train-hype ...", records)
    began = time.process_time()
    found = read_analysis(AnalysisDir(work / "analyze.20"), z)
    columns = write_particles(found, facts)
    table = time.process_time()
    page = write_report(found, facts, columns)
    first = time.process_time()
    write_report(found, facts, columns)
    again = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "table_s": table - began, "page_first_s": first - table, "page_again_s": again - first,
        "size_MB": page.stat().st_size / 1e6, "table_MB": found.out.particles.stat().st_size / 1e6,
        "peak_MiB": peak / 1024, "before_MiB": before / 1024,
    }  # fmt: skip


SCRIPTS = {
    "colour_ms": "const s = document.querySelector('#colour-by'); const t = performance.now(); s.value = 'defocus';"
    "s.dispatchEvent(new Event('change')); return performance.now() - t;",
    "lasso_ms": "const g = document.querySelector('#plot'); const t = performance.now();"
    "const ring = Array.from({length: 60}, (_, i) => 2 * Math.PI * i / 60);"
    "g.emit('plotly_selected', {points: [], lassoPoints: {x: ring.map((a) => 12 + 4 * Math.cos(a)),"
    "y: ring.map((a) => 4 * Math.sin(a))}}); return performance.now() - t;",
    "heap_MB": "return performance.memory.usedJSHeapSize / 1e6;",
    "content_loaded_ms": "return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd;",
    "drawn_ms": "return +document.documentElement.dataset.drawn;",
}


def opened(page: Path, opens: int) -> dict[str, float]:
    """Milliseconds of the fastest open, and of recolouring and a lasso over all particles."""
    rounds = []
    for _ in range(opens):
        with Browser() as browser:
            before = browser.cpu()
            browser.open(page)
            one = {"ready_ms": browser.ready()}
            one["cpu_s"] = browser.cpu() - before
            one |= {name: float(browser.run(script)) for name, script in SCRIPTS.items()}
            wrong = browser.errors()
        if wrong:
            raise SystemExit(f"errors in the console: {wrong}")
        rounds.append(one)
    return {name: min(one[name] for one in rounds) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=300_000)
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--opens", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--reuse", action="store_true", help="only open the page that lies in --work")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="report-"))
    work.mkdir(parents=True, exist_ok=True)
    result: dict[str, float] = {"particles": arguments.particles, "clusters": arguments.clusters}
    before = work / "written.json"
    if not (arguments.reuse and before.is_file()):
        before.write_text(json.dumps(write(work, arguments.particles, arguments.clusters)))
    result |= json.loads(before.read_text())
    if missing():
        print(f"not opened: {missing()}")
    elif arguments.opens:
        result |= opened(work / "analyze.20" / "report.html", arguments.opens)
    print(json.dumps({name: round(value, 2) for name, value in result.items()}, indent=1))
    save("report_speed", {"seed": 0, **result})


if __name__ == "__main__":
    main()
