"""``cryosuite select``: particles by lasso, cluster, condition, neighbourhood or at random."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from cryosuite.commands import options as opt

if TYPE_CHECKING:
    from cryosuite.data.select import Selection
    from cryosuite.data.source import Source

NEAR = 1000  # particles of --near-volume and --near-row
WHICH, OTHERS, FILES = "Which particles (all conditions together)", "Of these", "Files"


def main(
    source: opt.Sources,
    out: Annotated[
        list[Path],
        typer.Option(
            "-o",
            "--out",
            help="File to write: .pkl (original indices), .star or .cs; may be given several times.",
            show_default=False,
            metavar="<path>",
        ),
    ],
    lasso: Annotated[
        Optional[Path],  # noqa: UP045  typer on Python 3.10 evaluates this
        typer.Option(
            "--from",
            help="lasso.json saved by the report, or a text file of rows, from 0.",
            rich_help_panel=WHICH,
        ),
    ] = None,
    cluster: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--cluster", help="Clusters, counted from 0: --cluster 3 5.", metavar="<number>", rich_help_panel=WHICH
        ),
    ] = None,
    where: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--where",
            help='Condition on columns of particles.csv: "pc1 > 2 and confidence > 0.8".',
            metavar="<condition>",
            rich_help_panel=WHICH,
        ),
    ] = None,
    near_volume: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--near-volume", help="The --count particles nearest to the volume of this cluster.", rich_help_panel=WHICH
        ),
    ] = None,
    near_row: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--near-row", help="The --count particles nearest to this one (a row, from 0).", rich_help_panel=WHICH
        ),
    ] = None,  # fmt: skip
    count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--count", help="How many for --near-volume and --near-row; nothing: 1000.", rich_help_panel=WHICH
        ),
    ] = None,
    invert: Annotated[bool, typer.Option("--not", help="All other particles instead.", rich_help_panel=OTHERS)] = False,
    within: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            "--with",
            help="Keep only those that this .pkl of original indices lists too.",
            metavar="<path>",
            rich_help_panel=OTHERS,
        ),
    ] = None,
    random: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--random", help="Keep this many of those chosen, at random.", rich_help_panel=OTHERS),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--seed", help="Random seed of --random; nothing: 0.", rich_help_panel=OTHERS, callback=opt.check_seed
        ),
    ] = None,
    labels: opt.Labels = None,
    analysis: opt.Analysis = None,
    epoch: opt.Epoch = None,
    binned: opt.Binned = False,
    relion: opt.Relion = None,
    datadir: opt.Datadir = None,
    passthrough: opt.Passthrough = None,
) -> None:
    """Choose particles and write them as index lists, for RELION or for cryoSPARC.

    RUN is a training run (ours or cryoDRGN's), the folder of an analysis,
    a work folder, or a .star or .cs file. Conditions are joined by AND;
    --not turns the result around, --with and --random then narrow it.
    A .pkl holds positions in the original stack, as --ind takes them; .star
    and .cs hold the original, un-binned rows.

        cryosuite select run --from lasso.json -o ind.pkl -o chosen.star

        cryosuite select run --cluster 3 5 -o ind.pkl

        cryosuite select run --where "pc1 > 2 and confidence > 0.8" -o good.star

        cryosuite select run --near-volume 4 --count 500 -o near4.cs

        cryosuite select particles.star --random 10000 --seed 1 -o some.star
    """
    from cryosuite.console import say, table
    from cryosuite.data.export import export_all, origin
    from cryosuite.data.select import Selection
    from cryosuite.data.source import open_source
    from cryosuite.errors import InputError

    path, clusters = opt.run_and_clusters(source, cluster)
    asked = [clusters, lasso, where, within, random]
    if all(value in (None, []) for value in asked) and near_volume is None and near_row is None:
        raise InputError(
            "say which particles: --from, --cluster, --where, --near-volume, --near-row, --with or --random"
        )
    if count is not None and near_volume is None and near_row is None:
        raise InputError(f"--count {count}: says how many for --near-volume or --near-row: give one (or use --random)")
    if seed is not None and random is None:
        raise InputError(f"--seed {seed}: is only for --random")
    found = open_source(
        path, epoch=epoch, labels=labels, analysis=analysis, datadir=datadir, passthrough=passthrough or ()
    )
    chosen = Selection(len(found.particles))
    if lasso is not None:
        _from_file(found, chosen, lasso)
    _by_value(found, chosen, clusters, where or [])
    _near(found, chosen, near_volume, near_row, NEAR if count is None else count)
    if invert:
        chosen.complement()
    _narrow(found, chosen, within or [], random, seed or 0)
    rows = chosen.rows()
    export_all(found.particles.subset(rows), out, binned, poses=found.poses_found, relion=relion)
    table(f"{found.name}: {len(found.particles):,} particles", ["condition", "particles"],
          [[what, f"{number:,}"] for what, number in chosen.steps] + [["selected", f"{len(rows):,}"]])  # fmt: skip
    where_from = found.particles.path if binned else origin(found.particles).table
    for written in out:
        what = "original indices, from 0" if written.suffix == ".pkl" else f"rows of {where_from}"
        say(f"{written}: {len(rows):,} particles, {what}")


def _from_file(found: Source, chosen: Selection, path: Path) -> None:
    """--from: a lasso, rows as text, or original indices."""
    from cryosuite.data.select import rows_by_index, rows_from

    if path.suffix == ".pkl":
        chosen.add(f"--from {path.name}", rows_by_index(found.particles, path))
    else:
        chosen.add(f"--from {path.name}", rows_from(path, len(found.particles), found.name, found.epoch))


def _by_value(found: Source, chosen: Selection, clusters: list[int], where: list[str]) -> None:
    """--cluster and --where."""
    from cryosuite.data.select import rows_in_clusters

    if clusters:
        labels = found.need_labels()
        named = " ".join(map(str, clusters))
        chosen.add(f"--cluster {named}", rows_in_clusters(labels, clusters, found.labels_from))
    if where:
        from cryosuite.analysis.columns import Columns
        from cryosuite.data.where import parse_where

        columns = Columns(found)
        for text in where:
            condition = parse_where(text, columns.has)
            chosen.add(f'--where "{condition.text}"', condition.rows(columns, len(found.particles)))


def _near(found: Source, chosen: Selection, volume: int | None, row: int | None, count: int) -> None:
    """--near-volume and --near-row."""
    import numpy as np

    from cryosuite.data.select import latent_of_cluster, latent_of_row, nearest_rows

    if volume is not None:
        z, labels, row_of = found.need_latents(), found.need_labels(), found.centre_row(volume)
        known = row_of is not None and (labels == volume).any() and np.isfinite(z[row_of]).all()
        point = z[row_of] if known else latent_of_cluster(z, labels, volume)
        chosen.add(f"--near-volume {volume}", nearest_rows(found.z, point, count))
    if row is not None:
        point = latent_of_row(found.need_latents(), row)
        chosen.add(f"--near-row {row}", nearest_rows(found.z, point, count))


def _narrow(found: Source, chosen: Selection, within: list[Path], random: int | None, seed: int) -> None:
    """--with and --random."""
    from cryosuite.data.select import rows_by_index

    for path in within:
        chosen.add(f"--with {path.name}", rows_by_index(found.particles, path))
    if random is not None:
        chosen.at_random(random, seed)
