"""``cryosuite export``: a cluster or selection back to RELION or cryoSPARC."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from cryosuite.commands import options as opt

if TYPE_CHECKING:
    import numpy as np

    from cryosuite.data.particles import ParticleSet


def main(
    run: Annotated[
        Path,
        typer.Argument(
            help="A training run, a work folder, or a .star or .cs file.", metavar="RUN", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="File to write: .star, .cs, or .pkl (original indices).", show_default=False),
    ],
    labels: Annotated[
        Optional[Path],  # noqa: UP045  typer on Python 3.10 evaluates this
        typer.Option("--labels", help="Cluster of each particle: labels.pkl of analyze."),
    ] = None,
    cluster: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            "--cluster", help="Cluster to export, counted from 0; may be given several times.", metavar="<number>"
        ),
    ] = None,
    ind: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--ind", help="Particles to export: a .pkl of positions in the original set, counted from 0."),
    ] = None,
    binned: Annotated[
        bool, typer.Option("--binned", help="Export the cropped images of the work folder, not the original ones.")
    ] = False,
    datadir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--datadir", help="Folder in which the image stacks lie (for a .star or .cs)."),
    ] = None,
    passthrough: opt.Passthrough = None,
) -> None:
    """Write selected particles as a file that RELION or cryoSPARC takes back.

    The rows are those of the original, full-size images. All columns,
    optics groups and uids of the file you started from are kept.

        cryosuite export run --labels run/analyze.20/labels.pkl --cluster 3
        -o cluster3.star

        cryosuite export work --ind ind.pkl -o selected.cs
    """
    from cryosuite.console import say
    from cryosuite.data.export import export_particles, origin
    from cryosuite.data.open import open_particles
    from cryosuite.data.workdir import RunDir
    from cryosuite.errors import InputError

    if (labels is None) == (ind is None):
        raise InputError("say which particles: either --labels with --cluster, or --ind")
    found = open_particles(
        run, ind=ind, datadir=datadir, need_poses=False, need_ctf=False, passthrough=passthrough or ()
    )
    if labels is not None:
        found = found.subset(_in_clusters(found, labels, cluster))
    # poses that a run found replace those of its source
    solved = RunDir(run).exists() and RunDir(run).read_config().get("poses_found", False)
    export_particles(found, out, binned, poses=solved)
    source = found.path if binned or out.suffix == ".pkl" else origin(found).table
    say(f"{out}: {len(found)} particles, rows of {source}")


def _in_clusters(found: ParticleSet, labels: Path, cluster: list[int] | None) -> np.ndarray:
    """Rows of the set whose label is one of the clusters."""
    import numpy as np

    from cryosuite.errors import InputError
    from cryosuite.formats.pickles import read_labels

    values = read_labels(labels, unlabelled=True)
    if len(values) != len(found):
        raise InputError(
            f"{labels}: {len(values)} labels, but {found.path} has {len(found)} particles. Give the labels of this run."
        )
    if not cluster:
        raise InputError(f"say which cluster: --cluster N ({labels} has {', '.join(map(str, np.unique(values)))})")
    rows = np.flatnonzero(np.isin(values, cluster))
    if len(rows) == 0:
        raise InputError(f"{labels}: no particle in cluster {', '.join(map(str, cluster))}")
    return rows
