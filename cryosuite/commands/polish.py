"""``cryosuite polish``: latents or classes of any program to the sharpest maps that their particles support."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cryosuite.commands.options import check_seed, say_without_effect
from cryosuite.commands.training_options import typed_values

if TYPE_CHECKING:
    import numpy as np

    from cryosuite.analysis.polished import PolishedClass
    from cryosuite.data.particles import ParticleSet
    from cryosuite.data.processes import Processes
    from cryosuite.data.results import PolishDir
    from cryosuite.reconstruct.weights import ClassWeights

INPUT, CLASSES, MAPS, MACHINE = "Particles (when PATH is not a run)", "Classes", "The maps", "Machine"


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    context: typer.Context,
    path: Path = typer.Argument(
        ..., help="Folder of a training run (ours or cryoDRGN's); or particles with --z or --labels.", metavar="PATH"
    ),
    outdir: Path = typer.Option(None, "-o", "--outdir", help="Folder to write; nothing: RUN/polish.EPOCH."),
    epoch: int = typer.Option(None, "--epoch", help="Epoch of the run, counted from 1; nothing: the last."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the maps that are in the folder."),
    z: Path = _option(None, "--z", help="Latents of another program, one row per particle (z.pkl).", panel=CLASSES),
    labels: Path = _option(
        None, "--labels", help="Classes instead of latents (labels.pkl), -1 leaves a particle out.", panel=CLASSES
    ),
    classes: int = _option(
        None,
        "--classes",
        "-k",
        help="Groups that latents are split into; nothing: one per 100 particles, at most 64. For mixtures give 1 to "
        "1.5 times the number of molecules.",
        panel=CLASSES,
    ),  # fmt: skip
    half_sets: bool = _option(
        False,
        "--half-sets",
        panel=CLASSES,
        help="For runs of train-kraqen: particles choose their codes again, each by maps of its own half set alone, so "
        "that the plain half maps are independent.",
    ),
    refine_shifts: bool = _option(
        True,
        "--refine-shifts/--no-refine-shifts",
        help="Where shifts turn out to be wrong by more than a tenth of a pixel, refine them against the maps of the "
        "classes, each half set by itself; poses.pkl has them.",
        panel=MAPS,
    ),
    seed: int = _option(0, "--seed", help="Random seed of the grouping.", panel=CLASSES, callback=check_seed),
    poses: Path = _option(None, "--poses", help="Poses as cryoDRGN writes them (poses.pkl).", panel=INPUT),
    ctf: Path = _option(None, "--ctf", help="CTF parameters as cryoDRGN writes them (ctf.pkl).", panel=INPUT),
    ind: Path = _option(None, "--ind", help="Use only these particles (a .pkl of indices).", panel=INPUT),
    datadir: Path = _option(None, "--datadir", help="Folder in which the image stacks lie.", panel=INPUT),
    apix: float = _option(None, "--Apix", help="Pixel size in Angstrom, where no file says it.", panel=INPUT),
    invert_data: bool = _option(False, "--invert-data", help="Particles are dark in the images.", panel=INPUT),
    downsample: int = _option(
        None,
        "-d",
        "--downsample",
        help="Box of the maps in pixels, smaller than the images'; nothing: theirs.",
        panel=MAPS,
    ),
    mode: str = _option(
        "modal",
        "--mode",
        help="How maps are made. modal: states help each other. kernel: particles weighed by distance in the latent. "
        "prior: a run's own volumes as starting point, trusted as far as the data bear them out.",
        panel=MAPS,
    ),
    passes: int = _option(
        2, "--passes", help="Rounds after the first, each starting from the maps so far.", panel=MAPS
    ),
    window: float = _option(
        12.5, "--window", help="Size (standard deviation, Angstrom) of the places that are judged apart.", panel=MAPS
    ),
    basis: str = _option(
        "auto",
        "--basis",
        help="What is assumed of states. modal: they resemble each other. class: unrelated molecules. auto: what fits.",
        panel=MAPS,
    ),
    sharpen: bool = _option(
        False,
        "--sharpen",
        help="Also write sharp_000.mrc ...: what lvm-sharpen makes of each map, a network's prediction.",
        panel=MAPS,
    ),
    memory: float = _option(
        4.0, "--memory", help="GiB for sums of classes; the rest goes to files in the output folder.", panel=MACHINE
    ),
    threads: int = _option(0, "--threads", min=0, help="Processor threads to use; 0: all.", panel=MACHINE),
) -> None:
    """Turn latents or classes into maps as sharp as the data allow.

    For each class the particles are backprojected in two halves; what the
    halves agree on, place by place and band by band, is kept, and classes
    that resemble each other help each other. Works on runs of every train
    command, on cryoDRGN's folders, and on any latents or labels.

    Writes vol_000.mrc ... (polished), raw/ (plain maps and half maps),
    local/ (local resolution, how much was kept), fsc.csv and classes.csv.
    Resolution is read from the plain half maps only: the polished halves
    share what was learnt from both.

        cryosuite polish run/

        cryosuite polish work/ --labels run/analyze.40/labels.pkl -o maps/

        cryosuite polish particles.mrcs --poses poses.pkl --ctf ctf.pkl --z z.19.pkl -o maps/
    """
    import torch

    from cryosuite.analysis.polished import MODES, polish_to
    from cryosuite.console import say
    from cryosuite.data.results import PolishDir, run_polish
    from cryosuite.errors import InputError
    from cryosuite.reconstruct.polish import PolishOptions
    from cryosuite.training.launch import join_processes

    if threads > 0:
        torch.set_num_threads(threads)
    if z is not None and labels is not None:
        raise InputError("give either --z or --labels, not both")
    if not memory > 0:
        raise InputError(f"--memory {memory}: expected GiB above 0")
    if mode not in MODES:
        raise InputError(f"--mode {mode}: expected one of {', '.join(MODES)}")
    idle = {"prior": ("passes", "window", "basis"), "kernel": ("passes", "basis")}.get(mode, ())
    typed = typed_values(context)[1]
    say_without_effect({name: f"with --mode {mode}" for name in idle if name in typed})
    if sharpen:
        weights_at_hand()
    options = PolishOptions(passes=passes, window_A=window, basis=basis)
    processes = join_processes()
    how = {"poses": poses, "ctf": ctf, "ind": ind, "datadir": datadir, "pixel_size": apix}
    source = _open(path, epoch, z, labels, how, -1 if invert_data else None)
    particles, number = source.particles, source.epoch
    if number is None and outdir is None:
        raise InputError("-o is missing: name the folder the maps are to be written to")
    out = PolishDir(outdir) if outdir is not None else run_polish(path, number)
    if out.summary.exists() and not overwrite:
        raise InputError(f"{out.path}: holds polished maps already. Add --overwrite, or choose another -o")
    box = downsample or particles.box_size
    if not 16 <= box <= particles.box_size or box % 2:
        raise InputError(f"--downsample {box}: an even box from 16 to {particles.box_size} is needed")
    if half_sets:
        if labels is not None or z is not None:
            raise InputError("--half-sets: is for a run of train-kraqen alone, without --labels or --z")
        particles, source.weights = _apart(path, source, datadir, seed, processes)
    weights, more = _classes(source, classes, seed, mode, box)
    origin = "labels" if labels else "latents" if source.weights is None else "shares of the codes"
    say(f"{int((weights.labels() >= 0).sum()):,} particles in {weights.n_classes} classes, from {origin} -> {out.path}")
    rows = polish_to(
        out, particles, weights, options, box=box if box != particles.box_size else None, memory_gib=memory, mode=mode,
        **more, processes=processes, refine_shifts=refine_shifts, source=str(path.absolute()), classes_from=origin,
        half_sets_apart=half_sets,
    )  # fmt: skip
    if not processes.first:
        return
    report(rows, out, latent_from_both=labels is None and not half_sets)
    if sharpen:
        sharpened([(out.map(row.number), out.sharp(row.number)) for row in rows], [row.resolution for row in rows])


def weights_at_hand() -> None:
    """Fail before the work, not behind it, where lvm-sharpen has no weights."""
    from cryosuite.data.map_weights import shipped_map_weights

    shipped_map_weights("sharpen")


def sharpened(files: list[tuple[Path, Path]], resolutions: list[float | None] | None = None) -> None:
    """What lvm-sharpen makes of (map, target), beside them, and what it is worth; targets are named alike.

    Resolutions (A) are those of the half maps, where there are any.
    """
    from cryosuite.console import say
    from cryosuite.methods.lvm_sharpen_files import sharpen_files

    if not files:
        return
    made = sharpen_files(files, resolutions=resolutions)
    folders = ", ".join(sorted({str(target.parent) for _, target in files}))
    say(f"sharpened by a network: {len(made)} maps, {files[0][1].name} and so on, in {folders}. Predictions, to look")
    say("at: resolution and FSC are those of the maps beside them, which are as they were.")


@dataclass
class Source:
    """What is polished: particles, latents or shares or both; of a run also its epoch and its decoder."""

    particles: ParticleSet
    z: np.ndarray | None = None
    weights: ClassWeights | None = None
    epoch: int | None = None
    decode: Callable[[np.ndarray], np.ndarray] | None = None


def _open(
    path: Path, epoch: int | None, z: Path | None, labels: Path | None, how: dict[str, Any], sign: int | None
) -> Source:
    """Open what PATH and the options name."""
    from cryosuite.data.cryodrgn_run import is_cryodrgn_run, open_cryodrgn_run
    from cryosuite.data.open import open_particles
    from cryosuite.data.workdir import RunDir
    from cryosuite.errors import InputError
    from cryosuite.formats.pickles import read_latent
    from cryosuite.reconstruct.weights import ClassWeights

    run = RunDir(path)
    theirs = path.is_dir() and is_cryodrgn_run(path)
    if run.exists() or theirs:
        own = ("pixel_size", "datadir") if theirs else ("datadir",)  # its config may name another machine's folders
        flags = {"pixel_size": "--Apix", "sign": "--invert-data"}
        every = how | {"sign": sign}
        given = [flags.get(name, f"--{name}") for name, value in every.items() if value and name not in own]
        if given:
            raise InputError(f"{', '.join(given)}: the run {path} says itself which particles it was trained on")
        if theirs:
            found = open_cryodrgn_run(path, epoch, how["pixel_size"], how["datadir"])
            source = Source(found.particles, found.z, epoch=found.epoch)
        else:
            source = _open_ours(run, epoch, datadir=how["datadir"])
    elif epoch is not None:
        raise InputError(f"--epoch: {path} is not a training run")
    else:
        if z is None and labels is None:
            raise InputError(
                f"{path}: is not a training run. For particles say what belongs together: --z latents.pkl or --labels "
                "labels.pkl"
            )
        source = Source(open_particles(path, **how, sign=sign))
    count = len(source.particles)
    if z is not None:
        source.z, source.weights, source.decode = read_latent(z, finite=False)[0], None, None
        if len(source.z) != count:
            raise InputError(f"{z}: {len(source.z)} latents for {count} particles: one row each is needed")
    if labels is not None:
        from cryosuite.commands.backproject import class_labels

        source.weights = ClassWeights.from_labels(class_labels(source.particles, labels, None, None, None))
    return source


def _open_ours(run: Any, epoch: int | None, datadir: Path | None) -> Source:
    """Particles, latents, shares (where the method has them), epoch and decoder of one of our runs."""
    from cryosuite.formats.pickles import safe_load
    from cryosuite.methods import load_run
    from cryosuite.reconstruct.weights import ClassWeights

    loaded = load_run(run.path, epoch, datadir=datadir)
    shares = run.shares(loaded.epoch)
    weights = ClassWeights.from_arrays(safe_load(shares)[0], str(shares)) if shares.is_file() else None
    # the maps of a voxel field are backprojections of these very images, of both half sets: no prior for them
    decode = None if loaded.config["options"].get("field") == "voxel" else loaded.decode
    return Source(loaded.particles, loaded.z, weights, loaded.epoch, decode)


def _apart(
    path: Path, source: Source, datadir: Path | None, seed: int, processes: Processes
) -> tuple[ParticleSet, ClassWeights]:
    """The particles with the shifts that came with them, and shares decided within each half set; where the method
    allows it."""
    from cryosuite.console import say
    from cryosuite.data.workdir import RunDir
    from cryosuite.errors import InputError

    config = RunDir(path).read_config() if RunDir(path).exists() else {}
    if source.weights is None or config.get("method") != "kraqen":
        raise InputError(
            f"--half-sets: {path} is not a run of train-kraqen. Latents of other methods were learnt from both half "
            "sets: train on each half alone (--ind) to hold them apart"
        )
    from cryosuite.methods.kraqen_halves import shares_apart
    from cryosuite.methods.kraqen_options import KraqenOptions
    from cryosuite.methods.kraqen_run import open_for
    from cryosuite.training.runs import particles_path

    particles = source.particles
    if config.get("poses_found"):
        say("particles go back to the shifts they came with: refined ones know the maps of the other half set")
        particles = open_for(particles_path(config, RunDir(path)), config | ({"datadir": datadir} if datadir else {}))
    say("particles choose their codes again within each half set")
    return particles, shares_apart(
        particles, source.weights, KraqenOptions.from_dict(config["options"]), seed, processes
    )


def _classes(
    source: Source, classes: int | None, seed: int, mode: str, box: int
) -> tuple[ClassWeights, dict[str, Any]]:
    """The shares, and what the mode needs besides: latents and the points of the classes, or a network's maps."""
    import numpy as np
    import torch

    from cryosuite.errors import InputError
    from cryosuite.reconstruct.bins import bins_of, class_means

    weights, means = source.weights, None
    if weights is None:
        weights, means = bins_of(source.z, classes, seed)
    elif classes is not None:
        raise InputError("--classes: is for latents; here the classes are given already")
    if mode == "modal":
        return weights, {}
    if source.z is None:
        raise InputError(f"--mode {mode}: needs latents (a run, or --z); labels alone do not tell distances")
    means = class_means(source.z, weights) if means is None else means
    if mode == "kernel":
        return weights, {"latents": (source.z, means)}
    if source.decode is None:
        raise InputError("--mode prior: needs a run of ours whose network makes volumes (a voxel field has none)")
    if box != source.particles.box_size:
        raise InputError("--mode prior: works at the box of the run only (leave out -d)")
    maps = [source.decode(point[None]) for point in means]
    return weights, {"prior": torch.from_numpy(np.concatenate(maps)).float()}


def report(rows: list[PolishedClass], out: PolishDir, latent_from_both: bool) -> None:
    """The table on screen, what the numbers mean, and what to do next."""
    import math

    from cryosuite.console import say, table

    def angstrom(value: float) -> str:
        return "-" if math.isnan(value) else f"{value:.1f}"

    shown = [
        [str(r.number), f"{r.particles:.0f}", f"{r.half_a:.0f} + {r.half_b:.0f}", angstrom(r.resolution),
         angstrom(r.resolution_half), angstrom(r.local_resolution), f"{r.gain:.2f}", str(out.map(r.number))]
        for r in rows
    ]  # fmt: skip
    columns = ["class", "particles", "half sets", "A at .143", "A at .5", "local A", "kept", "map"]
    if len(shown) > 60:
        shown = [*shown[:30], ["..."] * len(columns), *shown[-30:]]
    table(f"{out.path}: resolution of the plain half maps inside the mask", columns, shown)
    say("Polished half maps share their gains: read resolution from raw/ (as in this table), never from them.")
    if latent_from_both:
        say("The latents were learnt from both half sets, which flatters even the plain half maps a little.")
    say(f"look:  chimerax {out.path}/vol_*.mrc")
