"""``cryosuite report``: the page of an analysis made again, for instance after polish."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from cryosuite.commands import options as opt
from cryosuite.data.typed import typed

if TYPE_CHECKING:
    import numpy as np

    from cryosuite.data.particles import ParticleSet
    from cryosuite.data.workdir import AnalysisDir, RunDir


def main(
    where: Annotated[Path, typer.Argument(help="Folder of an analysis, or of a run (its last one).", metavar="PATH")],
    maps: Annotated[
        Optional[list[Path]],  # noqa: UP045  typer on Python 3.10 evaluates this
        typer.Option("--maps", help="Folder of polish or backproject with maps of the clusters.", metavar="<folder>"),
    ] = None,
    epoch: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--epoch", help="Epoch of a run, counted from 1; nothing: the last one with an analysis."),
    ] = None,
    datadir: opt.Datadir = None,
) -> None:
    """Write the report of an analysis (again): report.html, one file that opens in any browser without network.

    `analyze` writes it at its end. Make it again when there is more to see:
    after `polish` or `backproject` of the clusters, trajectories or a
    landscape. particles.csv, one row per particle, is written with it.

        cryosuite report run/

        cryosuite report run/analyze.20 --maps cluster_maps/
    """
    from cryosuite.data.source import open_source
    from cryosuite.errors import InputError

    source = open_source(where, epoch=epoch, datadir=datadir)
    if source.analysis is None or source.run is None:
        raise InputError(f"{where}: has no analysis yet: run `cryosuite analyze {typed(where)}`")
    absent = [folder for folder in maps or () if not folder.is_dir()]
    if absent:
        raise InputError(f"--maps {absent[0]}: there is no such folder")
    make_report(
        source.analysis, source.particles, source.need_latents(), source.epoch, source.run, maps=maps or (), again=True
    )


def make_report(
    out: AnalysisDir,
    particles: ParticleSet | None,
    z: np.ndarray,
    epoch: int,
    run: RunDir,
    *,
    page: bool = True,
    maps: Sequence[Path] = (),
    again: bool = False,
) -> None:
    """particles.csv, confounds and (``page``) report.html of an analysis; ``again``: confounds found before stay."""
    from cryosuite.analysis.confound_files import columns_to_test, write_confounds
    from cryosuite.analysis.report import write_particles, write_report
    from cryosuite.analysis.report_read import RunFacts, read_analysis
    from cryosuite.console import say
    from cryosuite.training.logs import read_metrics

    method, command = _method(run)
    facts = RunFacts(
        z, epoch, particles, run.path.resolve().name, run.path, method, command, read_metrics(run.metrics), maps,
        _codes(run, epoch, len(z)),
    )  # fmt: skip
    found = read_analysis(out, z)
    columns = write_particles(found, facts)
    if not (again and out.confounds.is_file()):
        write_confounds(out.path, z, found.labels, columns_to_test(columns, particles))
    say(f"table: {out.particles}  (one row per particle; see select --where)")
    if page:
        written = write_report(found, facts, columns)
        say(f"report: {written}  ({written.stat().st_size / 1e6:.1f} MB; open it in a browser)")


def _method(run: RunDir) -> tuple[str, str]:
    """Name of the method and the command of a run's config, ours or cryoDRGN's."""
    import shlex

    config: dict[str, Any] = run.read_config() if run.exists() else {}
    if not config:
        return "", ""
    if "method" in config:
        return str(config["method"]), _typed(str(config.get("command", "")))
    words = config.get("cmd")
    return "cryoDRGN", shlex.join(map(str, words)) if isinstance(words, list) else str(words or "")


def _typed(command: str) -> str:
    """A command line with the program's name in place of its path."""
    first, _, rest = command.partition(" ")
    return f"cryosuite {rest}" if Path(first).name in ("cryosuite", "__main__.py") else command


def _codes(run: RunDir, epoch: int, count: int) -> np.ndarray | None:
    """The run's own class of each particle, where its method has them."""
    from cryosuite.errors import InputError
    from cryosuite.formats.pickles import read_labels

    try:
        return read_labels(run.labels(epoch), count, unlabelled=True) if run.labels(epoch).is_file() else None
    except InputError:
        return None
