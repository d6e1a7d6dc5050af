"""Options that the commands which decode a run's volumes share, with one wording. Only typer is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

VOLUMES, PLACE = "Volumes", "Where and how"

Run = Annotated[
    Path, typer.Argument(help="Folder of a training run, ours or cryoDRGN's.", metavar="RUN", show_default=False)
]
Apix = Annotated[
    Optional[float],  # noqa: UP045  typer on Python 3.10 evaluates this
    typer.Option(
        "--Apix", help="Pixel size in Angstrom of the trained box; nothing: the run's.", rich_help_panel=VOLUMES
    ),
]
Flip = Annotated[bool, typer.Option("--flip", help="Mirror the volumes (the other hand).", rich_help_panel=VOLUMES)]
Invert = Annotated[bool, typer.Option("--invert", help="Multiply the volumes by -1.", rich_help_panel=VOLUMES)]
Downsample = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "-d",
        "--downsample",
        help="Crop the volumes to this box size in pixels; nothing: the run's box.",
        rich_help_panel=VOLUMES,
    ),
]
LowPass = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--low-pass",
        help="Filter the volumes to this resolution in Angstrom; nothing: not filtered.",
        rich_help_panel=VOLUMES,
    ),
]
VolStartIndex = Annotated[
    int,
    typer.Option(
        "--vol-start-index", help="Number of the first volume file; 1 as in cryoDRGN.", rich_help_panel=VOLUMES
    ),
]
MassKda = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option("--mass-kda", help="Mass in kDa that the shown surface is to enclose.", rich_help_panel=VOLUMES),
]
Epoch = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--epoch", help="Epoch, counted from 1; nothing: the last whole one.", rich_help_panel=PLACE),
]
Datadir = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--datadir", help="Folder of the image stacks, where they were moved.", rich_help_panel=PLACE),
]
