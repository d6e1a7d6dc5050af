"""Options that several commands share, with one wording. Only typer is imported: help must come at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

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
    typer.Option("--Apix", help="Pixel size in Angstrom.", rich_help_panel=INPUT),
]
Voltage = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--kv", help="Voltage in kV.", rich_help_panel=INPUT),
]
SphericalAberration = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--cs", help="Spherical aberration in mm.", rich_help_panel=INPUT),
]
AmplitudeContrast = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("-w", "--amplitude-contrast", help="Amplitude contrast, 0 to 1.", rich_help_panel=INPUT),
]
Threads = Annotated[int, typer.Option("--threads", help="Processor threads; 0: all.")]
