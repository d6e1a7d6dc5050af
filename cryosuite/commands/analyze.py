"""``cryosuite analyze``: latents of a trained run to clusters, volumes, pictures and ChimeraX scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands import volume_options as shared
from cryosuite.commands.options import check_seed
from cryosuite.data.typed import typed

GROUPS, VOLUMES, PLOTS = "Clusters and paths", "Volumes", "Where and how"


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    run: shared.Run,
    epoch_number: int = typer.Argument(None, help="Epoch, as cryoDRGN takes it; the same as --epoch.", metavar="EPOCH"),
    epoch: int = typer.Option(None, "--epoch", help="Epoch, counted from 1; -1 or nothing: the last whole one."),
    outdir: Path = _option(None, "-o", "--outdir", help="Folder to write to; nothing: RUN/analyze.EPOCH.", panel=PLOTS),
    ksample: int = _option(20, "--ksample", help="Clusters of k-means, one volume each.", panel=GROUPS),
    gmm: int = _option(
        None, "--gmm", help="Groups of the Gaussian mixture; nothing: as many as the data ask for.", panel=GROUPS
    ),
    cluster: str = _option(
        None,
        "--cluster",
        help="Other clusters than k-means of --ksample: gmm-umap16, gmm-direct or kmeans, with --k.",
        panel=GROUPS,
    ),
    k: str = _option(
        None,
        "--k",
        help="Number of the clusters of --cluster, or auto (as many as are found again and again).",
        panel=GROUPS,
    ),
    pc: int = _option(2, "--pc", help="Principal components to walk along.", panel=GROUPS),
    n_per_pc: int = _option(
        10, "--n-per-pc", help="Volumes along each, from the 5th to the 95th percentile.", panel=GROUPS
    ),
    skip_umap: bool = _option(False, "--skip-umap", help="Leave out UMAP, the slowest plot.", panel=PLOTS),
    skip_vol: bool = _option(False, "--skip-vol", help="Leave out the volumes.", panel=VOLUMES),
    apix: shared.Apix = None,
    flip: shared.Flip = False,
    invert: shared.Invert = False,
    downsample: shared.Downsample = None,
    low_pass: shared.LowPass = None,
    vol_start_index: shared.VolStartIndex = 0,
    mass_kda: shared.MassKda = None,
    polish: bool = _option(
        False, "--polish", help="Also backproject and polish the particles of each cluster (see polish).", panel=VOLUMES
    ),
    sharpen: bool = _option(
        False,
        "--sharpen",
        help="Also write sharp_000.mrc ...: what lvm-sharpen makes of each volume (and polished map), a prediction.",
        panel=VOLUMES,
    ),
    datadir: shared.Datadir = None,
    no_report: bool = _option(
        False, "--no-report", help="Leave out report.html (`cryosuite report` writes it later).", panel=PLOTS
    ),
    seed: int = _option(
        0, "--seed", help="Random seed: the same seed gives the same result.", panel=PLOTS, callback=check_seed
    ),
) -> None:
    """Look at a trained run, ours or cryoDRGN's: a map of its particles, their clusters, a volume of each.

    Writes RUN/analyze.EPOCH: PCA, UMAP and cluster plots, volumes (.mrc)
    with pictures, particle lists per cluster, and view.cxc for ChimeraX in
    the colours of the plots. report.html shows it all in a browser: one
    file that needs no network. Clusters, volumes and rows count from 0.

        cryosuite analyze run/

        cryosuite analyze run/ 20 --ksample 10 --flip

        cryosuite analyze run/ --cluster gmm-umap16 --k auto

        cryosuite analyze run/ --epoch 5 --skip-umap -o quick_look/
    """
    from cryosuite.errors import InputError, notice

    if epoch is not None and epoch_number is not None and epoch != epoch_number:
        raise InputError(f"two epochs were given, {epoch_number} and --epoch {epoch}: give one.")
    epoch = epoch if epoch is not None else epoch_number

    from cryosuite.analysis.run import AnalyzeOptions, analyze
    from cryosuite.analysis.volumes import VolumeOptions
    from cryosuite.commands.polish import weights_at_hand
    from cryosuite.commands.report import make_report
    from cryosuite.console import say
    from cryosuite.data.workdir import AnalysisDir, RunDir
    from cryosuite.methods import load_run
    from cryosuite.training.logs import read_metrics

    folder = RunDir(run)
    volumes = VolumeOptions(apix, flip, invert, downsample, low_pass, vol_start_index, mass_kda)
    options = AnalyzeOptions(
        ksample=ksample, gmm=gmm, cluster=cluster or ("kmeans" if k else None), k=_number(k),
        components=pc, per_component=n_per_pc, skip_umap=skip_umap, skip_volumes=skip_vol, seed=seed, volumes=volumes,
    )  # fmt: skip
    loaded = load_run(run, epoch, **({} if datadir is None else {"datadir": datadir}))
    if polish and loaded.particles is None:
        raise InputError(f"--polish: the images of {run} are not there: say where they are (--datadir)")
    if sharpen:
        weights_at_hand()
    out = AnalysisDir(outdir) if outdir is not None else folder.analysis(loaded.epoch)
    say(f"epoch {loaded.epoch}: {loaded.z.shape[0]:,} particles, {loaded.z.shape[1]} latent numbers each -> {out.path}")
    result = analyze(
        loaded.z, loaded.decode, out, loaded.pixel_size, loaded.box_size, options,
        particles=loaded.particles, epoch=loaded.epoch, records=read_metrics(folder.metrics),
        run=run,
    )  # fmt: skip
    polished: list[Any] = []
    if polish:
        if flip or invert or downsample or low_pass:
            notice("--flip, --invert, --downsample and --low-pass change the decoded volumes, not the polished maps")
        polished = _polish(result, loaded.particles)
    if sharpen:
        _sharpen(result, polished)
    make_report(out, loaded.particles, loaded.z, loaded.epoch, folder, page=not no_report)
    _report(result, folder, not no_report)
    if polish and folder.shares(loaded.epoch).is_file():
        say(f"These are clusters of the latents. This run's own codes: cryosuite polish {typed(run)}")


def _number(k: str | None) -> int | str:
    """--k: a number or auto."""
    from cryosuite.errors import InputError

    if k is None or k == "auto":
        return "auto"
    if not k.isdigit() or int(k) < 1:
        raise InputError(f"--k {k}: expected auto or a whole number from 1.")
    return int(k)


def _sharpen(result: Any, polished: list[Any]) -> None:
    """Sharpened maps beside the cluster volumes and, where there are any, beside the polished maps."""
    from cryosuite.commands.polish import sharpened
    from cryosuite.data.results import PolishDir
    from cryosuite.errors import notice

    files = [(file.path, result.folder.sharp(file.number)) for file in result.files]
    resolutions = [None] * len(files) + [row.resolution for row in polished]
    folder = PolishDir(result.out.path / "polish")
    files += [(folder.map(row.number), folder.sharp(row.number)) for row in polished]
    if not files:
        notice("--sharpen: this analysis has no volumes (--skip-vol, or a run that decodes none)")
    sharpened(files, resolutions)


def _polish(result: Any, particles: Any) -> list[Any]:
    """Polished maps of the clusters, in a folder of the analysis; a row of each."""
    from cryosuite.analysis.polished import polish_to
    from cryosuite.commands.polish import report
    from cryosuite.data.results import PolishDir
    from cryosuite.formats.pickles import read_labels
    from cryosuite.reconstruct.polish import PolishOptions
    from cryosuite.reconstruct.weights import ClassWeights

    out = PolishDir(result.out.path / "polish")
    weights = ClassWeights.from_labels(read_labels(result.out.labels, unlabelled=True), len(result.colours))
    rows = polish_to(out, particles, weights, PolishOptions(), source=str(result.out.path), classes_from="clusters")
    report(rows, out, latent_from_both=True)
    return rows


def _report(result: Any, run: Any, page: bool) -> None:
    """Where things lie and what to do next."""
    from cryosuite.console import say, table

    out = result.out
    shown = "umap" if result.umap is not None else "z_pca" if len(result.pca.ratio) > 1 else "z"
    rows: list[list[object]] = [["everything in one page, for a browser", out.report]] if page else []
    rows.append(["map of the particles", out.plot(shown)])
    if result.files:
        rows += [
            ["UMAP and volumes in one picture", out.plot("overview")],
            [f"{len(result.files)} cluster volumes", result.folder.path],
            ["all of them on one sheet", result.folder.plot("volumes")],
            ["for ChimeraX", out.chimerax],
        ]
        rows += [[f"walk along principal component {i}", walk.chimerax] for i, walk in enumerate(result.walks, start=1)]
    rows += [
        ["cluster of each particle, from 0", out.labels],
        ["particles of each cluster", out.cluster_indices(0).parent],
    ]
    if result.mixture is not None:
        rows.append([f"Gaussian mixture: {result.mixture.count} groups", out.gmm(result.mixture.count).path])
    table(f"{len(result.colours)} clusters of {len(result.rows):,} particles", ["what", "where"], rows)
    if result.files:
        say(f"look:  chimerax {out.chimerax}")
    largest = int(result.clusters.sizes.argmax())
    say(f"next:  cryosuite export {typed(out.path)} --cluster {largest} -o cluster{largest}.star")
