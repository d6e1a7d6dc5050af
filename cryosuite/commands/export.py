"""``cryosuite export``: clusters or a selection back to RELION or cryoSPARC."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from cryosuite.commands import options as opt

if TYPE_CHECKING:
    import numpy as np

    from cryosuite.data.source import Source


def main(
    source: opt.Sources,
    out: Annotated[
        list[Path],
        typer.Option(
            "-o",
            "--out",
            help="File to write: .star, .cs, or .pkl (original indices); may be given several times. With "
            "--all-clusters a folder.",
            show_default=False,
            metavar="<path>",
        ),
    ],
    cluster: Annotated[
        Optional[list[str]],  # noqa: UP045  typer on Python 3.10 evaluates this
        typer.Option("--cluster", help="Clusters to export, counted from 0: --cluster 3 5.", metavar="<number>"),
    ] = None,
    all_clusters: Annotated[
        bool, typer.Option("--all-clusters", help="Every cluster to a file of its own in the folder -o.")
    ] = False,
    ind: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--ind", help="Particles to export: a .pkl of positions in the original set, counted from 0."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All particles, for instance with the poses found.")
    ] = False,
    labels: opt.Labels = None,
    analysis: opt.Analysis = None,
    epoch: opt.Epoch = None,
    binned: opt.Binned = False,
    relion: opt.Relion = None,
    datadir: opt.Datadir = None,
    passthrough: opt.Passthrough = None,
) -> None:
    """Write clusters or selected particles as files that RELION or cryoSPARC takes back.

    The rows are those of the original, full-size images. All columns,
    optics groups, micrograph coordinates, half sets and uids of the file you
    started from are kept; poses are those the run found, if it did. To
    choose by condition, lasso or distance see select.

        cryosuite export run --cluster 3 -o cluster3.star

        cryosuite export run --cluster 3 5 -o both.star -o both.cs

        cryosuite export run --all-clusters -o clusters/

        cryosuite export work --ind ind.pkl -o selected.cs
    """
    from cryosuite.console import say
    from cryosuite.data.export import export_all, origin
    from cryosuite.data.source import open_source
    from cryosuite.errors import InputError

    path, clusters = opt.run_and_clusters(source, cluster)
    which = [bool(clusters), all_clusters, ind is not None, everything]
    if labels is not None and not any(which):
        raise InputError("say which cluster: --cluster N, or --all-clusters -o folder/" + _known(labels))
    if sum(which) != 1:
        raise InputError("say which particles: one of --cluster, --all-clusters, --ind and --all")
    found = open_source(
        path, epoch=epoch, labels=labels, analysis=analysis, datadir=datadir, passthrough=passthrough or ()
    )
    if all_clusters:
        _every_cluster(found, out, binned, relion)
        return
    chosen = found.particles.subset(_rows(found, clusters, ind))
    export_all(chosen, out, binned, poses=found.poses_found, relion=relion)
    where = found.particles.path if binned else origin(found.particles).table
    for written in out:
        what = "original indices, from 0" if written.suffix == ".pkl" else f"rows of {where}"
        say(f"{written}: {len(chosen):,} particles, {what}")


def _known(labels: Path) -> str:
    """The clusters there are, for a message."""
    import numpy as np

    from cryosuite.formats.pickles import read_labels

    values = np.unique(read_labels(labels, unlabelled=True))
    return f" ({labels} has {', '.join(map(str, values[values >= 0][:40]))})"


def _rows(found: Source, clusters: list[int], ind: Path | None) -> np.ndarray:
    """Rows of the set: of clusters, of a list of original indices in its order, or all."""
    import numpy as np

    from cryosuite.data.select import rows_by_index, rows_in_clusters

    if clusters:
        return rows_in_clusters(found.need_labels(), clusters, found.labels_from)
    return np.arange(len(found.particles)) if ind is None else rows_by_index(found.particles, ind)


def _every_cluster(found: Source, out: list[Path], binned: bool, relion: str | None) -> None:
    """One file (or two) per cluster in a folder, and a table of them."""
    from cryosuite.analysis.class_files import TABLE, write_classes
    from cryosuite.console import say, table
    from cryosuite.errors import InputError

    if len(out) != 1 or out[0].suffix in (".star", ".cs", ".pkl"):
        raise InputError("--all-clusters: give one folder with -o, such as -o clusters/")
    folder = out[0]
    foreign = next(folder.glob("cluster_*"), None) if not (folder / TABLE).is_file() else None
    if foreign is not None:
        raise InputError(f"{foreign}: is not from an export: choose another folder with -o")
    rows = write_classes(
        folder, found.particles, found.need_labels(), poses=found.poses_found, binned=binned, relion=relion, lists=True
    )
    shown = [[str(row.label), f"{row.particles:,}", row.star or "-", row.cs or "-"] for row in rows]
    title = f"{folder}: {len(rows)} clusters of {len(found.particles):,} particles"
    table(title, ["cluster", "particles", "star", "cs"], shown)
    say(f"labels from {found.labels_from}; indices beside each file (.ind.pkl), for --ind of other commands")
