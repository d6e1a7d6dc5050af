"""``cryosuite lvm-sharpen``: a trained map network makes a map easier to read, on the map's own grid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from cryosuite.data.map_grid import MapGrid
    from cryosuite.data.map_weights import MapWeights
    from cryosuite.methods.lvm_sharpen import Enhanced, EnhanceOptions
    from cryosuite.methods.lvm_sharpen_files import Inputs
    from cryosuite.metrics.model import ModelScores

NETWORK, GREY, MORE, WEDGE, MACHINE = (
    "Network", "The map", "What else is written", "Missing wedge (--task wedge)", "Machine",
)  # fmt: skip


def _option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def main(
    path: Path = typer.Argument(
        None, help="A map: .mrc, .map, .ccp4, also .gz; any voxel size, shape and axis order.", metavar="MAP"
    ),
    out: Path = typer.Option(..., "-o", "--out", help="Map to write.", show_default=False),
    half1: Path = typer.Option(None, "--half1", help="Instead of MAP: first half map; the mean of both is enhanced."),
    half2: Path = typer.Option(None, "--half2", help="Second half map, with --half1."),
    task: str = _option(
        None,
        "--task",
        help="sharpen (default), superres (more detail than the map has), or wedge (fills the missing wedge of a "
        "tomogram).",
        panel=NETWORK,
    ),
    weights: Path = _option(
        None, "--weights", help="Weights of train-lvm; nothing: those that come with us.", panel=NETWORK
    ),
    stride: int = _option(
        None, "--stride", help="Voxels from tile to tile; nothing: 24, half a tile. 16 is finer, slower.", panel=NETWORK
    ),
    tta: int = _option(
        None,
        "--tta",
        help="Average over this many rotations of the map (8 is usual, at most 24; wedge: 4): slower and steadier.",
        panel=NETWORK,
    ),
    no_skip: bool = _option(
        False, "--no-skip", help="Run the network on plain solvent too, which is else set to 0.", panel=NETWORK
    ),
    apix: float = _option(None, "--apix", "--Apix", help="Pixel size in Angstrom; nothing: the header's.", panel=GREY),
    resolution: float = _option(
        None,
        "--resolution",
        help="Of the map, Angstrom (FSC 0.143); nothing: of the half maps, or estimated from the map. Amplitudes are "
        "matched to it.",
        panel=GREY,
    ),
    contour: float = _option(
        None, "--contour", help="Level that shows the molecule, where it is not found by itself.", panel=GREY
    ),
    mask: Path = _option(
        None, "--mask", help="Mask (0 to 1): outside, the output is 0 (wedge: as the input).", panel=GREY
    ),
    norm: str = _option(
        None, "--norm", help="Scale of grey values: robust, paper, emready; nothing: as trained.", panel=GREY
    ),
    smooth: bool = _option(
        False,
        "--smooth",
        help="Sharpening: leave the blur that the network was taught (that of ChimeraX's molmap) on its map; else it "
        "is taken off, and the map ends at its resolution.",
        panel=GREY,
    ),
    match_scale: bool = _option(
        False, "--match-scale", help="Grey values as in the input instead of 0 to 1.", panel=GREY
    ),
    uncertainty: Path = _option(
        None, "--uncertainty", help="Map of the standard deviation over rotations (sets --tta 8; wedge: 4).", panel=MORE
    ),
    local_cc: Path = _option(
        None, "--local-cc", help="Map of the local correlation of input and output, windows of 12 A.", panel=MORE
    ),
    per_half: bool = _option(
        False, "--per-half", help="Also each half map by itself: OUT_half1 and OUT_half2.", panel=MORE
    ),
    model: Path = _option(
        None, "--model", "--model-pdb", help="Atomic model (.cif, .pdb): print scores before and after.", panel=MORE
    ),
    tilt_range: tuple[float, float] = _option(
        (-60.0, 60.0), "--tilt-range", help="Smallest and largest tilt, degrees.", panel=WEDGE
    ),
    tilt_axis: str = _option("y", "--tilt-axis", help="Axis that the specimen was tilted about: x or y.", panel=WEDGE),
    no_consistency: bool = _option(
        False, "--no-consistency", help="Do not put the measured Fourier coefficients back.", panel=WEDGE
    ),
    batch: str = _option("auto", "-b", "--batch", help="Tiles at a time; auto: what fits.", panel=MACHINE),
    precision: str = _option(
        "auto",
        "--precision",
        help="Precision of numbers: bf16, 32, or auto (what the machine is fast at).",
        panel=MACHINE,
    ),
    accelerator: str = _option(
        "auto", "--accelerator", "--device", help="Where to compute: cpu, gpu, or auto.", panel=MACHINE
    ),
    threads: int = _option(0, "--threads", min=0, help="Processor threads to use; 0: all.", panel=MACHINE),
) -> None:
    """Sharpen a map, add detail, or fill a missing wedge, with a network trained on simulated maps.

    Give the map as it comes from the refinement: not masked, not sharpened.
    The output lies on the same grid with the same header. It is a prediction
    that helps to see and to build; it is no measurement. Its resolution or FSC
    means nothing, and what it shows must be borne out by the original map.

        cryosuite lvm-sharpen map.mrc -o sharp.mrc

        cryosuite lvm-sharpen --half1 half1.mrc --half2 half2.mrc -o sharp.mrc --model model.cif

        cryosuite lvm-sharpen map.mrc -o out.mrc --task superres --uncertainty std.mrc --local-cc cc.mrc

        cryosuite lvm-sharpen tomogram.mrc -o filled.mrc --task wedge --tilt-range -60 60
    """
    import torch

    from cryosuite.errors import InputError, notice
    from cryosuite.methods.lvm_sharpen import EnhanceOptions
    from cryosuite.methods.lvm_sharpen_files import open_weights, read_inputs
    from cryosuite.training.launch import resolve_accelerator

    if threads > 0:
        torch.set_num_threads(threads)
    if per_half and half1 is None:
        raise InputError("--per-half: needs --half1 and --half2")
    outputs = {"-o": out, "--uncertainty": uncertainty, "--local-cc": local_cc}
    _check_outputs({**outputs, **_half_outputs(out, per_half)}, [path, half1, half2, mask, model, weights])
    network = open_weights(task, weights)
    several = 4 if network.task == "wedge" else 8
    turns = tta if tta is not None else several if uncertainty is not None else 1
    if uncertainty is not None and turns < 2:
        raise InputError(f"--uncertainty: needs at least 2 rotations: --tta {several}")
    options = EnhanceOptions(
        stride=stride, turns=turns, norm=norm, contour=contour, skip=not no_skip, match_scale=match_scale,
        resolution=resolution, flat=not smooth, local_cc=local_cc is not None,
        tilt_range=tilt_range, tilt_axis=tilt_axis, consistent=not no_consistency,
        batch=_batch(batch), precision=precision,
    )  # fmt: skip
    device = torch.device(resolve_accelerator(accelerator))
    inputs = read_inputs(path, half1, half2, mask, apix)
    before = None if model is None else _score(inputs.grid, model, resolution)
    options = _looked_at(inputs, network, options)
    found = _run(inputs, network, options, device, out, uncertainty, local_cc)
    if per_half:
        _halves(inputs, network, options, device, out)
    _report(found, inputs.grid, network, outputs, options.resolution is not None)
    if not float(found.map.data.std()) > 0:
        notice("the network made nothing of this map: the output has one value. Check its contrast, --mask, --contour")
    elif before is not None:
        _compare(before, _score(found.map, model, before.d_min), model)


def _batch(text: str) -> int | None:
    from cryosuite.errors import InputError

    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--batch {text}: expected auto or a whole number from 1")
    return int(text)


def _half_outputs(out: Path, per_half: bool) -> dict[str, Path]:
    """Names of the enhanced half maps: out.mrc -> out_half1.mrc, out_half2.mrc."""
    name = out.name
    ends = next((end for end in (".mrc.gz", ".map.gz", ".ccp4.gz") if name.lower().endswith(end)), out.suffix)
    stem = name[: len(name) - len(ends)]
    return {f"half map {h}": out.with_name(f"{stem}_half{h}{name[len(stem) :]}") for h in (1, 2)} if per_half else {}


def _check_outputs(outputs: dict[str, Path | None], inputs: list[Path | None]) -> None:
    """No output may be an input, or another output."""
    from cryosuite.errors import InputError

    taken = {path.resolve(): str(path) for path in inputs if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        if path.resolve() in taken:
            raise InputError(f"{name} {path}: is also {taken[path.resolve()]}; give another name")
        if path.is_dir():
            raise InputError(f"{name} {path}: is a folder; name the map to be written in it")
        if not path.parent.is_dir():
            raise InputError(f"{name} {path}: there is no folder {path.parent}")
        taken[path.resolve()] = f"the output of {name}"


def _looked_at(inputs: Inputs, network: MapWeights, options: EnhanceOptions) -> EnhanceOptions:
    """Tell what stands against enhancing the map; the options with the resolution of the half maps, if there are any.

    Raises InputError where the resolution is needed and cannot be read from the map: a mask cut off its noise, and no
    filter ends it.
    """
    from dataclasses import replace

    import torch

    from cryosuite.console import say
    from cryosuite.errors import InputError, notice
    from cryosuite.kernels.map_spectrum import COARSEST, filter_limit
    from cryosuite.methods.lvm_sharpen_checks import ZEROS, inspect_map
    from cryosuite.methods.lvm_sharpen_files import half_fsc

    grid = inputs.grid
    if inputs.halves is not None:
        curve = half_fsc(inputs.halves[0].data, inputs.halves[1].data, grid)
        fine, coarse = (curve.resolution(level) for level in (0.143, 0.5))
        say(f"half maps: FSC .143 at {fine:.2f} A, .5 at {coarse:.2f} A, without mask")
        if options.resolution is None and fine <= COARSEST:  # else the halves agree nowhere
            options = replace(options, resolution=fine)
    facts = inspect_map(grid, network.task, network.voxel, options.resolution)
    if network.spectrum == "matched" and options.resolution is None and facts.empty > ZEROS:
        end = filter_limit(torch.from_numpy(grid.data), grid.voxel[::-1])
        if not end:
            raise InputError(
                f"{grid.path}: the map was masked, so that its noise does not tell its resolution. Give it in Angstrom "
                "(--resolution 3.4; it stands in the deposition or the FSC of the half maps), or give the half maps"
            )
        notice(
            f"{grid.path}: a mask cut off the noise that tells the resolution; a filter ends the map at about "
            f"{end:.1f} A, which is taken for it. If you know better give --resolution"
        )
    return options


def _run(
    inputs: Inputs,
    network: MapWeights,
    options: EnhanceOptions,
    device: Any,
    out: Path,
    uncertainty: Path | None,
    local_cc: Path | None,
) -> Enhanced:
    """Enhance the map, write it and what belongs to it."""
    from cryosuite.data.map_grid import write_like
    from cryosuite.methods.lvm_sharpen import enhance
    from cryosuite.methods.lvm_sharpen_files import label

    grid = inputs.grid
    found = enhance(grid, network, options, device, inputs.mask, out.parent)
    write_like(out, found.map.data, grid, label(network.task))
    if uncertainty is not None:
        write_like(uncertainty, found.uncertainty, grid, f"cryosuite: standard deviation over {options.turns} turns")
    if local_cc is not None:
        write_like(local_cc, found.local_cc, grid, "cryosuite: local correlation of input and output")
    return found


def _halves(inputs: Inputs, network: MapWeights, options: EnhanceOptions, device: Any, out: Path) -> None:
    """Each half map by itself, and their FSC with what it is worth."""
    from dataclasses import replace

    from cryosuite.console import say
    from cryosuite.data.map_grid import write_like
    from cryosuite.methods.lvm_sharpen import enhance
    from cryosuite.methods.lvm_sharpen_files import half_fsc, label

    made = []
    options = replace(options, turns=1, local_cc=False)
    for half, target in zip(inputs.halves, _half_outputs(out, True).values(), strict=True):
        made.append(enhance(half, network, options, device, inputs.mask, out.parent).map.data)
        write_like(target, made[-1], half, label(network.task))
    curve = half_fsc(made[0], made[1], inputs.grid)
    say(
        f"enhanced half maps: FSC .143 at {curve.resolution(0.143):.2f} A. This is NOT a gold-standard resolution: one "
        "network made both halves look like what it was trained on, and skipped or masked solvent is 0 in both. Report "
        "the FSC of the half maps before."
    )


def _report(found: Enhanced, grid: MapGrid, network: MapWeights, outputs: dict[str, Path | None], known: bool) -> None:
    """What was done, where it lies and what it is worth."""
    import numpy as np

    from cryosuite.console import say, table

    shape = " x ".join(map(str, grid.data.shape[::-1]))
    said = "of the half maps or as given" if known else "estimated from the map: give --resolution if you know better"
    rows = [
        [
            "grid",
            f"{shape} voxels of {' x '.join(f'{size:.4g}' for size in grid.voxel)} A; network at {network.voxel:g} A",
        ],
        ["tiles", f"{found.run} of {found.tiles} run, the others are plain solvent"],
        *([["amplitudes", f"as of a model's map at {found.resolution:.2f} A, {said}"]] if found.resolution else []),
        ["grey values", f"{found.span[0]:.4g} to {found.span[1]:.4g} are 0 to 1 for the network"],
        ["seconds", f"{found.seconds:.1f}"],
    ]
    told = found.uncertainty is not None or found.local_cc is not None
    solid = _solid(found, grid, network) if told else np.zeros(1, bool)
    if found.uncertainty is not None and solid.any():
        rows.append(
            ["standard deviation", f"{float(np.mean(found.uncertainty[solid])):.4g}, mean where there is density"]
        )
    if found.local_cc is not None and solid.any():
        part = found.local_cc[solid]
        words = (
            f"{float(np.median(part)):.3f}, median where there is density; 5 % are below {np.percentile(part, 5):.3f}"
        )
        rows.append(["local correlation", words])
    names = {"-o": "written", "--uncertainty": "uncertainty", "--local-cc": "local correlation"}
    rows += [[names[name], str(path)] for name, path in outputs.items() if path is not None]
    table(f"lvm-sharpen, {network.task}", ["what", "value"], rows)
    say("The map is a network's prediction: build with it, check against the original, deposit both, and read no")
    say("resolution from it.")


def _solid(found: Enhanced, grid: MapGrid, network: MapWeights) -> Any:
    """Where the map given has density: above the middle of its grey values, (z, y, x) bool."""
    import torch

    from cryosuite.kernels.map_norm import grey_range

    span = found.span
    if found.resolution is not None:  # then the span is that of the map with other amplitudes
        span = grey_range(torch.from_numpy(grid.data), sum(grid.voxel) / 3, network.norm)
    return grid.data > sum(span) / 2


def _score(grid: MapGrid, model: Path, resolution: float | None) -> ModelScores:
    from cryosuite.formats.atoms import read_atoms
    from cryosuite.metrics.model import score_model

    return score_model(grid, read_atoms(model, waters=True), resolution)


def _compare(before: ModelScores, after: ModelScores, model: Path) -> None:
    """Scores of the map against an atomic model before and after, with one cut-off for the calculated map."""
    from cryosuite.console import say, table

    rows = [
        ["CC mask", f"{before.solvent.mask:.3f}", f"{after.solvent.mask:.3f}", "higher"],
        ["CC mask, 3 A", f"{before.plain.mask:.3f}", f"{after.plain.mask:.3f}", "higher"],
        ["CC peaks", f"{before.solvent.peaks:.3f}", f"{after.solvent.peaks:.3f}", "higher"],
        ["CC box", f"{before.solvent.box:.3f}", f"{after.solvent.box:.3f}", "removing solvent alone raises it"],
    ]
    for name in ("unmasked", "masked"):
        for limit in (0.5, 0.143):
            values = (scores.fsc[name].resolution(limit) for scores in (before, after))
            rows.append([f"FSC {limit}, {name} (A)", *(f"{value:.2f}" for value in values), "lower"])
    for i, sigma in enumerate((0.4, 0.6)):
        rows.append([f"Q, sigma {sigma}", *(f"{scores.mean_q()[i]:.3f}" for scores in (before, after)), "higher"])
    title = f"{model.name}: calculated map cut at {before.d_min:.2f} A ({before.d_min_from})"
    table(title, ["score", "before", "after", "better is"], rows)
    if after.solvent.mask < before.solvent.mask:
        say("note: inside the mask the map agrees with the model less than before")
