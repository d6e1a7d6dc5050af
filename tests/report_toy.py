"""A finished analysis made up for the tests of its report: four clusters of particles, their volumes, hostile names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryosuite.analysis.palette import palette
from cryosuite.analysis.report import write_particles, write_report
from cryosuite.analysis.report_read import RunFacts, read_analysis
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import AnalysisDir
from cryosuite.formats.config import write_yaml
from cryosuite.formats.mrc import write_map
from cryosuite.formats.pickles import write_pickle
from cryosuite.formats.relion import ParticleTables

D, PIXEL, CLUSTERS = 16, 3.0, 4
EVIL = "<script>alert(1)</script>"
CORNERS = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], float)


def particle_set(count: int, seed: int = 0) -> ParticleSet:
    """Images with a blob, poses, CTF and a star table with a hostile micrograph, text and numbers."""
    rng = np.random.default_rng(seed)
    axis = np.arange(D) - D // 2
    blob = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / 8.0)
    images = (blob + 0.3 * rng.normal(size=(count, D, D))).astype(np.float32)
    ctf = np.tile(np.array([D, PIXEL, 0, 0, 0, 300, 2.7, 0.1, 0], np.float32), (count, 1))
    ctf[:, 2] = 10_000 + 100 * np.arange(count)
    ctf[:, 3] = ctf[:, 2] - 200
    rotation = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))[:, None, None]
    names = [EVIL, "a\"b'c & d.mrc", "</script><b>.mrc", "plain.mrc"]
    table = pd.DataFrame({
        "rlnImageName": [f"{i + 1:06d}@p.mrcs" for i in range(count)],
        "rlnMicrographName": [names[i % 4] for i in range(count)],
        "rlnClassNumber": np.arange(count) % 3 + 1,
        "rlnAutopickFigureOfMerit": rng.normal(size=count),
        EVIL: np.arange(count) * 0.5,
        "rlnGroupName": [f"<img src=x onerror=alert({i % 2})>" for i in range(count)],
        "rlnConstant": np.ones(count),
    })  # fmt: skip
    tables = ParticleTables(
        Path("p.star"), table, None, {}, "3.0", "particles", ["particles"], np.zeros(count, np.int64)
    )
    return ParticleSet.from_array(
        images, PIXEL, ctf=ctf, rotation=rotation.astype(np.float32), tables=tables, source=Path("p.star"),
        shift=rng.uniform(-0.1, 0.1, (count, 2)).astype(np.float32), index=np.arange(count)[::-1] * 2 + 5,
        path=Path("p.star"),
    )  # fmt: skip


def make_analysis(
    folder: Path, count: int = 200, *, zdim: int = 3, umap: bool = True, volumes: bool = True, bad: tuple[int, ...] = ()
) -> tuple[AnalysisDir, np.ndarray]:
    """The files of an analysis; rows in ``bad`` are NaN. Clusters lie at the corners of a square in the UMAP."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    groups = min(CLUSTERS, count)
    labels = np.arange(count) % groups
    z = (6 * np.eye(CLUSTERS, zdim)[labels] + 0.2 * rng.normal(size=(count, zdim))).astype(np.float32)
    z[list(bad)], labels[list(bad)] = np.nan, -1
    out = AnalysisDir(folder)
    write_pickle(out.labels, labels)
    if umap:
        places = (CORNERS[labels] + 0.5 * rng.normal(size=(count, 2))).astype(np.float32)
        places[list(bad)] = np.nan
        write_pickle(out.umap, places)
    kmeans = out.kmeans(groups)
    kmeans.path.mkdir()
    axis = np.arange(D) - D // 2
    square = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None] ** 2
    for label in range(groups if volumes else 0):
        write_map(kmeans.volume(label), np.exp(-square / (8.0 + 4 * label)).astype(np.float32), PIXEL)
    write_yaml(out.summary, {
        "kind": "analysis", "epoch": 7, "n_particles": count, "left_out": list(bad), "seed": 0, "clustering": "kmeans",
        "command": "cryosuite analyze 'my run' --ksample 4",
        "kmeans": {"clusters": groups, "colours": palette(groups), "levels": [0.3] * groups if volumes else [],
                   "folder": kmeans.path.name},
        "gmm": None, "volumes": {"start_index": 0},
    })  # fmt: skip
    return out, z


def write_all(out: AnalysisDir, z: np.ndarray, particles: ParticleSet | None, **changed: object) -> Path:
    """particles.csv and report.html of an analysis; returns the page."""
    records = [{"step": s, "epoch": 1 + s // 20, "loss": 2.0 - 0.01 * s, "lr": 0.001} for s in range(100)]
    facts = RunFacts(z, 7, particles, "my run", None, "hype", f"cryosuite train-hype {EVIL} -o 'my run'", records)
    facts = replace(facts, **changed)
    found = read_analysis(out, z)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cryosuite.analysis.report_clusters.FRAMES", 4)  # pictures of a turn: enough, and quick
        return write_report(found, facts, write_particles(found, facts))
