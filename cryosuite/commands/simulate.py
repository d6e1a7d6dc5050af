"""``cryosuite simulate``: a particle set whose truth is known."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import typer

from cryosuite.commands.options import Overwrite
from cryosuite.data.typed import typed

WHAT, IMAGING, NOISE, ROBUST = "What is imaged", "Microscope", "Noise", "Imperfections (for tests of robustness)"


def main(
    context: typer.Context,
    out: Path = typer.Option(..., "-o", "--outdir", help="Folder to write; all commands take it as a particle set."),
    structures: str = typer.Option(
        "phantom:16",
        help="phantom:N for N made-up proteins; a folder of PDB/mmCIF files; files or names; or several of these "
        "separated by commas (1igy,6vxx,pdbs/,phantom:4). Or .mrc maps.",
        rich_help_panel=WHAT,
    ),
    recipe: str = typer.Option(
        "mix",
        help="mix: unrelated molecules. assembly: one molecule in nested stages that share a core. loop: one domain "
        "turning through 360 degrees. homogeneous: one molecule.",
        rich_help_panel=WHAT,
    ),
    preset: str = typer.Option(
        None, help="A set of the benchmark: mini-mix16, mini-ribo16, mini-igg10, mini-igg50.", rich_help_panel=WHAT
    ),
    n: int = typer.Option(4800, "-n", help="Number of particle images.", rich_help_panel=WHAT),
    states: int = typer.Option(
        None,
        help="Number of states; default: 16 of an assembly, 10 of a loop.",
        rich_help_panel=WHAT,
        show_default=False,
    ),
    occupancies: str = typer.Option(
        "equal",
        help="How often each state occurs: equal, random, ribosembly, or numbers separated by commas (3,1,1).",
        rich_help_panel=WHAT,
    ),
    min_images: int = typer.Option(0, help="Fewest images that a state gets.", rich_help_panel=WHAT),
    blocks: str = typer.Option(
        None,
        help="Parts of an assembly: domain, chain, a number of equal runs, residue ranges (1-200,201-450), or "
        "selections (A,B;C:1-90).",
        rich_help_panel=WHAT,
    ),
    moving: str = typer.Option(None, help="Part that turns in a loop, e.g. A,B:1-208.", rich_help_panel=WHAT),
    hinge: str = typer.Option(None, help="Residues the axis goes through, e.g. B:206-212.", rich_help_panel=WHAT),
    towards: str = typer.Option(None, help="Residues whose centre the axis goes to.", rich_help_panel=WHAT),
    box_size: int = typer.Option(64, "-D", "--box", help="Box size in pixels.", rich_help_panel=IMAGING),
    apix: float = typer.Option(
        None, "--Apix", help="Pixel size in Angstrom. Default: 320 / D.", rich_help_panel=IMAGING, show_default=False
    ),
    resolution: float = typer.Option(
        None,
        help="Resolution of the molecules in Angstrom, as ChimeraX molmap counts it. Default: the pixel size.",
        rich_help_panel=IMAGING,
        show_default=False,
    ),
    render_box: int = typer.Option(
        None,
        help="Box in pixels in which images are made and noise is added, before the crop to D. Default: 2 D.",
        rich_help_panel=IMAGING,
        show_default=False,
    ),
    voltage: float = typer.Option(300.0, help="Voltage of the microscope in kV.", rich_help_panel=IMAGING),
    cs: float = typer.Option(2.7, help="Spherical aberration in mm.", rich_help_panel=IMAGING),
    amplitude_contrast: float = typer.Option(
        0.1, help="Amplitude contrast, a fraction from 0 to 1.", rich_help_panel=IMAGING
    ),
    defocus: tuple[float, float] = typer.Option(
        (0.8, 2.5), help="Smallest and largest defocus in micrometres.", rich_help_panel=IMAGING
    ),
    astigmatism: float = typer.Option(500.0, help="Largest astigmatism in Angstrom.", rich_help_panel=IMAGING),
    shift: float = typer.Option(0.078, help="Largest shift, as a fraction of the box.", rich_help_panel=IMAGING),
    bfactor: float = typer.Option(
        0.0, help="B-factor of the images in A^2 (the CTF table omits it).", rich_help_panel=IMAGING
    ),
    snr: float = typer.Option(
        0.1, help="Signal-to-noise ratio: variance of all pixels, before the crop to D.", rich_help_panel=NOISE
    ),
    noise_at: str = typer.Option(
        "2D", help="2D: the SNR is meant before the crop. D: after it.", rich_help_panel=NOISE
    ),
    noise_scope: str = typer.Option(
        "global",
        help="global: one noise level for all. per-structure: each state has the same SNR.",
        rich_help_panel=NOISE,
    ),
    colored: bool = typer.Option(
        False, "--colored", help="Noise that is stronger at low resolution.", rich_help_panel=NOISE
    ),
    neighbours: float = typer.Option(0.0, help="Mean number of other particles in an image.", rich_help_panel=ROBUST),
    ice_gradient: float = typer.Option(0.0, help="Brightness ramps, in units of the noise.", rich_help_panel=ROBUST),
    pose_error: float = typer.Option(0.0, help="Error of the written angles in degrees.", rich_help_panel=ROBUST),
    shift_error: float = typer.Option(0.0, help="Error of the written shifts in Angstrom.", rich_help_panel=ROBUST),
    defocus_error: float = typer.Option(0.0, help="Error of the written defocus in Angstrom.", rich_help_panel=ROBUST),
    compat: str = typer.Option(
        None,
        help="cryobench: D 128 at 3 A, SNR 0.01, B-factor 100, sorted by state (their CTF table is not included).",
    ),
    sorted_by_state: bool = typer.Option(
        False, "--sorted", help="Leave the particles sorted by state instead of shuffling them."
    ),
    keep_clean: bool = typer.Option(False, "--keep-clean", help="Keep clean.mrcs, the images before noise."),
    float16: bool = typer.Option(False, "--float16", help="Write half-precision images."),
    seed: int = typer.Option(
        0, help="Random seed: the same seed gives the same set; the noise level changes nothing else."
    ),
    device: str = typer.Option("cpu", help="Where to compute: cpu or cuda."),
    overwrite: Overwrite = False,
) -> None:
    """Make a particle set whose truth is known: images from atoms, with poses, CTF, labels and true maps.

    The noise of the images has a standard deviation of 1 and particles are white. Needs no download:

        cryosuite simulate -o sim

        cryosuite simulate -o sim --recipe loop -n 2400 -D 64 --snr 0.05

        cryosuite simulate -o sim --structures my_pdbs/ -n 10000 -D 128 --Apix 3
    """
    values = _with_presets(context, dict(context.params))
    _run(values)


def _with_presets(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """Values of --preset and --compat in place of defaults; what the user typed wins."""
    from cryosuite.errors import InputError
    from cryosuite.simulate.presets import CRYOBENCH, preset

    changes: dict[str, Any] = {}
    if values["compat"] is not None:
        if values["compat"] != "cryobench":
            raise InputError(f"--compat {values['compat']}: unknown; there is cryobench.")
        changes |= CRYOBENCH
    if values["preset"] is not None:
        changes |= preset(values["preset"])
    for name, value in changes.items():
        source = context.get_parameter_source(name)
        if source is None or source.name.startswith("DEFAULT"):
            values[name] = value
    if values["apix"] is None:
        values["apix"] = 320.0 / values["box_size"]
    for name, allowed in {"noise_at": ("2D", "D"), "noise_scope": ("global", "per-structure")}.items():
        if values[name] not in allowed:
            raise InputError(f"--{name.replace('_', '-')} {values[name]}: expected {' or '.join(allowed)}.")
    return values


def _run(v: dict[str, Any]) -> None:
    """Build the states, image them, print the table."""
    from cryosuite.simulate.build import RecipeOptions, build_states
    from cryosuite.simulate.dataset import simulate
    from cryosuite.simulate.imaging import SimulateOptions

    options = SimulateOptions(
        n_particles=v["n"], box_size=v["box_size"], pixel_size=v["apix"], render_box=v["render_box"],
        resolution=v["resolution"], snr=v["snr"], noise_at=v["noise_at"], noise_scope=v["noise_scope"],
        coloured=v["colored"], bfactor=v["bfactor"], voltage_kv=v["voltage"], cs_mm=v["cs"],
        amplitude_contrast=v["amplitude_contrast"], defocus_um=tuple(v["defocus"]), astigmatism=v["astigmatism"],
        shift=v["shift"], min_images=v["min_images"], sorted_by_state=v["sorted_by_state"],
        neighbours=v["neighbours"], ice_gradient=v["ice_gradient"], pose_error_deg=v["pose_error"],
        shift_error=v["shift_error"], defocus_error=v["defocus_error"], seed=v["seed"], float16=v["float16"],
        keep_clean=v["keep_clean"], device=v["device"],
    )  # fmt: skip
    options.check()
    recipe = RecipeOptions(
        recipe=v["recipe"], structures=v["structures"], n_states=v["states"], blocks=v["blocks"],
        moving=v["moving"], hinge=v["hinge"], towards=v["towards"], occupancies=v["occupancies"],
    )  # fmt: skip
    _require_inputs_elsewhere(v["structures"], v["out"])
    states = build_states(recipe, options.seed, options.optics.render_pixel)
    record = simulate(states, options, v["out"], shlex.join(["cryosuite", *sys.argv[1:]]), v["overwrite"])
    _table(record, states, v["out"])


def _require_inputs_elsewhere(structures: str, out: Path) -> None:
    """InputError when a map that is to be imaged would itself be replaced by the maps written."""
    from cryosuite.errors import InputError
    from cryosuite.simulate.sources import find_files

    written = out.resolve()
    lost = [path for path in find_files(structures) if path.resolve().parent in (written, written / "volumes")]
    lost = [path for path in lost if path.name == "mask.mrc" or path.match("volumes/vol_*.mrc")]
    if lost:
        raise InputError(f"{out}: simulate would write over {lost[0].name}, which it reads from. Choose another -o.")


def _table(record: dict[str, Any], states: Any, out: Path) -> None:
    """What was made, one line per state (the first and last ones when there are many)."""
    from cryosuite.console import say, table

    rows = []
    masses = record["states"].get("mass_kda", [])
    for k, state in enumerate(states.states):
        mass = f"{masses[k]:.0f}" if len(masses) == len(states) else ""
        rows.append(
            [k, state.name, mass, len(state.xyz), f"{2 * state.radius:.0f}", record["images_per_state"][k],
             f"{record['snr_effective_per_state'][k]:.3f}"]
        )  # fmt: skip
    if len(rows) > 40:
        rows = [*rows[:20], ["..."] * 7, *rows[-20:]]
    table(
        f"{record['n_particles']} images of {record['n_states']} states in {out}: D = {record['box_size']}, "
        f"{record['pixel_size']:g} A per pixel, SNR {record['snr_nominal']:g} (at D {record['snr_effective']:.3f})",
        ["state", "name", "kDa", "atoms", "size (A)", "images", "SNR at D"],
        rows,
    )
    say(f"next: cryosuite train-hype {typed(out)} -o run    (or first: cryosuite check {typed(out)})")
