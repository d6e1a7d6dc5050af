"""Options that several commands share, with one wording. Only typer is imported: help must come at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

INPUT = "What the particle file does not say"

ParticlesArgument = Annotated[
    Path,
    typer.Argument(
        help="A .star, .cs or .mrcs file, a .txt list of stacks, or a work folder.", metavar="PARTICLES",
        show_default=False,
    ),
]  # fmt: skip
Outdir = Annotated[Path, typer.Option("-o", "--outdir", help="Folder to write.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
Ind = Annotated[
    Optional[Path],  # noqa: UP045  typer on Python 3.10 evaluates this
    typer.Option("--ind", help="Use only these particles: a .pkl of positions in the original set, counted from 0."),
]
Poses = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--poses", help="Orientations as cryoDRGN writes them (poses.pkl).", rich_help_panel=INPUT),
]
Ctf = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--ctf", help="CTF parameters as cryoDRGN writes them (ctf.pkl).", rich_help_panel=INPUT),
]
Datadir = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--datadir", help="Folder in which the image stacks lie.", rich_help_panel=INPUT),
]
Passthrough = Annotated[
    Optional[list[Path]],  # noqa: UP045
    typer.Option(
        "--passthrough",
        help="cryoSPARC passthrough .cs; may be given several times.",
        metavar="<path>",
        rich_help_panel=INPUT,
    ),
]
Apix = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--Apix", help="Pixel size in Angstrom, where no file says it.", rich_help_panel=INPUT),
]
Voltage = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--kv", help="Voltage of the microscope in kV, where no file says it.", rich_help_panel=INPUT),
]
SphericalAberration = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--cs", help="Spherical aberration in mm, where no file says it.", rich_help_panel=INPUT),
]
AmplitudeContrast = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "-w", "--amplitude-contrast", help="Amplitude contrast, a fraction from 0 to 1.", rich_help_panel=INPUT
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=0, help="Processor threads to use; 0: all.")]
Sources = Annotated[
    list[str],
    typer.Argument(
        help="A training run, an analysis, a work folder, or a .star or .cs file.", metavar="RUN", show_default=False
    ),
]
Labels = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--labels", help="Cluster of each particle (labels.pkl); nothing: that of the newest analysis."),
]
Analysis = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--analysis", help="Folder that analyze wrote; nothing: the newest of the run."),
]
Epoch = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--epoch", help="Epoch of the run, counted from 1; nothing: that of the analysis."),
]
Binned = Annotated[bool, typer.Option("--binned", help="The cropped images of the work folder, not the original ones.")]
Relion = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--relion",
        help="RELION that is to read the .star: 3.0, 3.1, 4 or 5 (3.1 to 5 read the same); nothing: as the source.",
        metavar="<version>",
    ),
]

NONE, PRESET = "none", "set by the preset"
SAYS_ITSELF = re.compile(r"\bdefault\b|\bnothing\b|\(usual\)", re.IGNORECASE)
GIVEN = ("max_minutes", "max_hours", "pixel_size", "weights", "simulate", "patience")  # what no preset knows


def say_defaults(command: Any) -> None:
    """Make the help of a command say what holds where an option without a value of its own is not given.

    Typer prints nothing for a default of None. Those options say it in their sentence ("nothing: ..."); of the others
    files and limits are not there unless given, and the rest of a training's options are set by its preset.
    """
    preset = command.name.startswith(("train-", "pretrain-", "deco-"))
    for parameter in command.params:
        if parameter.required or parameter.default is not None or SAYS_ITSELF.search(parameter.help or ""):
            continue
        annotation = str(parameter.type_descriptor.annotation)
        given = "Path" in annotation or parameter.name in GIVEN or not preset
        parameter.show_default = NONE if given else PRESET


def check_seed(value: int | None) -> int | None:
    """The value of --seed; raises InputError where numpy and scikit-learn take none such."""
    from cryosuite.errors import InputError

    if value is not None and not 0 <= value < 1 << 32:
        raise InputError(f"--seed {value}: expected a whole number from 0 to {(1 << 32) - 1}")
    return value


def say_not_used(context: typer.Context, used: Iterable[str]) -> None:
    """A notice for options that were typed beside --resume and change nothing; ``used``: those that do."""
    from cryosuite.errors import notice

    idle = typed_beside(context, {"resume", "outdir", *used})
    if idle:
        notice(f"{', '.join(idle)}: not used, a run goes on with the options it began with")


def typed_beside(context: typer.Context, used: Iterable[str]) -> list[str]:
    """Options as --words, in order, that the user typed and whose names are not among ``used``."""
    known = set(used)
    return sorted(
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.param_type_name == "option"
        and parameter.name not in known
        # by name: Typer may bring its own copy of click, whose enumeration is another class
        and not getattr(context.get_parameter_source(parameter.name), "name", "DEFAULT").startswith("DEFAULT")
    )


def say_without_effect(idle: Mapping[str, str], renamed: Mapping[str, str] | None = None) -> None:
    """A notice for options that were typed and change nothing: by name of each the reason.

    ``renamed``: option as typed -> its name among the reasons, where these differ.
    """
    from cryosuite.errors import notice

    typed_as = {to: name for name, to in (renamed or {}).items()}
    for why in sorted(set(idle.values())):
        names = sorted(typed_as.get(name, name) for name in idle if idle[name] == why)
        flags = [f"--{name.replace('_', '-')}" for name in names]
        notice(f"{', '.join(flags)}: no effect {why}")


def run_and_clusters(arguments: list[str], clusters: list[str] | None) -> tuple[Path, list[int]]:
    """What RUN and --cluster say; numbers behind a cluster's number belong to it (``--cluster 3 5``)."""
    from cryosuite.errors import InputError

    more = [text for text in arguments if text.isdigit()] if clusters and len(arguments) > 1 else []
    paths = [text for text in arguments if text not in more]
    if len(paths) != 1:
        raise InputError(f"give one RUN, found {len(paths)}: {', '.join(paths) or 'none'}")
    numbers: list[int] = []
    for word in " ".join([*(clusters or []), *more]).replace(",", " ").split():
        if not word.isdigit():
            raise InputError(f"--cluster {word}: clusters are whole numbers that count from 0")
        numbers.append(int(word))
    return Path(paths[0]), list(dict.fromkeys(numbers))
