"""Options that pretrain-lvm and train-lvm share, and what becomes of them. Only typer is imported."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from cryosuite.commands.options import say_not_used
from cryosuite.commands.training_options import (
    ENGINE,
    TRAINING,
    ends,
    longer,
    precision,
    shared,
    shorter_budget,
    typed_again,
    typed_values,
)

DATA, LEARNT = "Maps", "What is learnt"
METHOD = ("structures", "hold_out", "crop", "volume", "crops_per_volume", "mix", "norm", "schedule", "warmup")
TRAIN = ENGINE | {"log_interval": "log_every", "compile": "compile", "micro_batches": "micro_batches"}

Structures = Annotated[
    Optional[str],  # noqa: UP045  typer on Python 3.10 evaluates this
    shared(
        "--structures",
        help="Molecules to simulate maps of: phantom (made up, endless; default), a PDB or mmCIF file, a folder of "
        "them, or both:FOLDER.",
        panel=DATA,
    ),
]
HoldOut = Annotated[
    Optional[str],  # noqa: UP045
    shared("--hold-out", help="Structures kept out to test on: how many, or names.", panel=DATA),
]
Crop = Annotated[
    Optional[int],  # noqa: UP045
    shared("--crop", help="Edge of the crops in voxels; default: 48 on a GPU, else 32.", panel=DATA),
]
Volume = Annotated[
    Optional[int],  # noqa: UP045
    shared("--volume", help="Edge of what is simulated at once, in voxels.", panel=DATA),
]
CropsPerVolume = Annotated[
    Optional[int],  # noqa: UP045
    shared("--crops-per-volume", help="Crops cut from each simulated volume.", panel=DATA),
]
Mix = Annotated[
    Optional[int],  # noqa: UP045
    shared("--mix", help="Simulated volumes that are shuffled together.", panel=DATA),
]
Norm = Annotated[
    Optional[str],  # noqa: UP045
    shared("--norm", help="Grey values: robust (ours), paper or emready.", panel=DATA),
]
Resolution = Annotated[
    Optional[str],  # noqa: UP045
    shared("--resolution", help="Resolution of the maps in A, from:to, such as 2.5:8.", panel=DATA),
]
DropPath = Annotated[
    Optional[float],  # noqa: UP045
    shared(
        "--drop-path",
        help="Stochastic depth, a share of blocks left out; default 0 up to small, else 0.1.",
        panel=LEARNT,
    ),
]
Images = Annotated[
    Optional[str],  # noqa: UP045
    shared("--images", help="Crops seen in all, such as 100k or 2M.", panel=TRAINING),
]
Every = Annotated[
    Optional[str],  # noqa: UP045
    shared("--every", help="Test and write the weights every so many crops; default: 10 times.", panel=TRAINING),
]
BatchSize = Annotated[
    Optional[int],  # noqa: UP045
    shared("-b", "--batch-size", help="Crops per step, over all GPUs.", panel=TRAINING),
]
MicroBatches = Annotated[
    int, shared("--micro-batches", help="Pieces a batch is computed in, for less memory.", panel=TRAINING)
]
Schedule = Annotated[
    Optional[str],  # noqa: UP045
    shared(
        "--schedule",
        help="Learning rate over time: cosine, or flat (until the last fifth: --resume --images may move the end).",
        panel=TRAINING,
    ),
]


def values_of(context: typer.Context) -> tuple[dict[str, Any], set[str]]:
    """`typed_values` with the shorter time budget; says what is not used beside --resume."""
    values, typed = typed_values(context)
    values["max_minutes"] = shorter_budget(values)
    if values["resume"]:
        say_not_used(context, (*TRAIN, "images", "max_hours"))
    return values, typed


def common_options(values: dict[str, Any], gpu: bool) -> dict[str, Any]:
    """Options that both trainings have, of those that the user gave, and the size of the crops."""
    chosen = {name: values[name] for name in METHOD if values[name] is not None}
    chosen.setdefault("crop", 48 if gpu else 32)
    if values["structures"] is None:
        chosen["structures"] = "phantom"
    chosen["resolution"] = ends(values["resolution"], "--resolution")
    return chosen


def train_values(values: dict[str, Any], gpu: bool, **defaults: Any) -> dict[str, Any]:
    """Options of the training loop: the defaults, what the user gave, and the precision."""
    given = {to: values[name] for name, to in TRAIN.items() if values[name] is not None}
    return defaults | given | {"precision": precision(values, None, gpu)}


def again(values: dict[str, Any], typed: set[str], config: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(options that a continued training takes anew, its command as the card says it)."""
    longer_by, command = longer(values, config)
    return typed_again(values, typed, TRAIN) | {"max_minutes": values["max_minutes"]} | longer_by, command
