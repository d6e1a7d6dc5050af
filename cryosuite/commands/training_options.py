"""Options that the trainings share, with one wording, and what becomes of them. Only typer is imported: help must come
at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from cryosuite.commands.options import INPUT

TRAINING, MACHINE = "Training", "Machine"
# option -> field of `TrainOptions`, of the options that every training has
ENGINE = {
    "batch_size": "batch_size", "lr": "lr", "seed": "seed", "max_minutes": "max_minutes",
    "checkpoint_minutes": "checkpoint_every_minutes", "accelerator": "accelerator", "devices": "devices",
    "num_nodes": "num_nodes", "requeue": "requeue",
}  # fmt: skip


def option(default: Any, *names: str, help: str, panel: str, **more: Any) -> Any:
    """An option of one command, in a panel of its help."""
    return typer.Option(default, *names, help=help, rich_help_panel=panel, show_default=default is not None, **more)


def shared(*names: str, help: str, panel: str) -> Any:
    """An option of several commands, for `Annotated`."""
    return typer.Option(*names, help=help, rich_help_panel=panel)


# --- options ---------------------------------------------------------------------------------------------------------

Particles = Annotated[
    Path,
    typer.Argument(
        help="Work folder of preprocess or simulate; or a .star, .cs or .mrcs file.", metavar="PARTICLES",
        show_default=False,
    ),
]  # fmt: skip
RunFolder = Annotated[
    Path, typer.Option("-o", "--outdir", help="Folder of the run, made by this command.", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run in this folder stopped.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")]
InvertData = Annotated[bool, shared("--invert-data", help="Particles are dark in the images.", panel=INPUT)]

NumEpochs = Annotated[
    Optional[int],  # noqa: UP045  typer on Python 3.10 evaluates this
    shared("-n", "--num-epochs", help="Epochs: how often all images are seen.", panel=TRAINING),
]
BatchSize = Annotated[
    Optional[int],  # noqa: UP045
    shared("-b", "--batch-size", help="Images per step, over all GPUs.", panel=TRAINING),
]
LearningRate = Annotated[
    Optional[float],  # noqa: UP045
    shared("--lr", help="Learning rate of the network.", panel=TRAINING),
]
Warmup = Annotated[
    Optional[float],  # noqa: UP045
    shared("--warmup", help="Fraction of the training in which the learning rate rises.", panel=TRAINING),
]
WeightDecay = Annotated[
    Optional[float],  # noqa: UP045
    shared("--wd", help="Weight decay of the matrices.", panel=TRAINING),
]
Ema = Annotated[
    Optional[float],  # noqa: UP045
    shared("--ema", help="Decay of the running average of the weights; 0: none.", panel=TRAINING),
]
MaxMinutes = Annotated[
    Optional[float],  # noqa: UP045
    shared("--max-minutes", help="Stop after so many minutes with a checkpoint; go on with --resume.", panel=TRAINING),
]
MaxHours = Annotated[
    Optional[float],  # noqa: UP045
    shared("--max-hours", help="Stop after so many hours with a checkpoint; go on with --resume.", panel=TRAINING),
]
Checkpoint = Annotated[
    Optional[int],  # noqa: UP045
    shared(
        "--checkpoint",
        help="Write latents and weights every so many epochs; default: four times in all.",
        panel=TRAINING,
    ),
]
CheckpointMinutes = Annotated[
    float,
    shared("--checkpoint-minutes", help="Minutes between two saves of what --resume needs.", panel=TRAINING),
]
LogInterval = Annotated[int, shared("--log-interval", help="Steps between two lines of metrics.jsonl.", panel=TRAINING)]
Seed = Annotated[
    int,
    shared("--seed", help="Random seed: the same seed gives the same result (on one machine).", panel=TRAINING),
]

Precision = Annotated[
    str,
    shared(
        "--precision",
        help="Precision of numbers: 32 or bf16; auto: bf16 where the machine is fast at it.",
        panel=MACHINE,
    ),
]
LowMemory = Annotated[
    Optional[bool],  # noqa: UP045
    shared("--low-memory/--keep-activations", help="Need less memory and a third more time.", panel=MACHINE),
]
Accelerator = Annotated[str, shared("--accelerator", help="Where to compute: auto, cpu or gpu.", panel=MACHINE)]
Devices = Annotated[int, shared("--devices", help="GPUs on each machine (processes without GPUs).", panel=MACHINE)]
NumNodes = Annotated[int, shared("--num-nodes", help="Machines that work together.", panel=MACHINE)]
Compile = Annotated[bool, shared("--compile", help="Use torch.compile, for long trainings on a GPU.", panel=MACHINE)]
Requeue = Annotated[bool, shared("--requeue", help="Under SLURM: put the job back into the queue.", panel=MACHINE)]


# --- what becomes of them --------------------------------------------------------------------------------------------


def typed_values(context: typer.Context) -> tuple[dict[str, Any], set[str]]:
    """All values of a command, and the names of those that the user typed."""
    values = dict(context.params)
    # by name: Typer may bring its own copy of click, whose enumeration is another class
    sources = {name: getattr(context.get_parameter_source(name), "name", "DEFAULT") for name in values}
    return values, {name for name, source in sources.items() if not source.startswith("DEFAULT")}


def shorter_budget(values: dict[str, Any]) -> float | None:
    """Minutes of --max-minutes or --max-hours, whichever is less."""
    both = [values["max_minutes"], None if values["max_hours"] is None else 60 * values["max_hours"]]
    return min((value for value in both if value is not None), default=None)


def typed_again(values: dict[str, Any], typed: set[str], engine: dict[str, str]) -> dict[str, Any]:
    """What a run that goes on takes anew: fields of `TrainOptions` by their options in ``engine``."""
    return {to: values[name] for name, to in engine.items() if name in typed} if values["resume"] else {}


def precision(values: dict[str, Any], of_preset: str | None, gpu: bool) -> str:
    """The precision asked for; auto: the preset's, else bf16 on a processor that is fast at it (GPUs decide later)."""
    from cryosuite.training.launch import fast_bf16

    if values["precision"] != "auto":
        return values["precision"]
    return of_preset or ("bf16" if not gpu and fast_bf16() else "auto")


def count(text: str, name: str) -> int:
    """A number of images as people write it: 5000, 300k, 10M; ``name``: the option.

    Raises InputError for anything else.
    """
    from cryosuite.errors import InputError

    factors = {"k": 10**3, "m": 10**6, "g": 10**9}
    factor = factors.get(text[-1:].lower(), 1)
    try:
        number = int(round(float(text[:-1] if factor > 1 else text) * factor))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise InputError(f"{name} {text}: expected a number of images such as 5000, 300k or 10M")
    return number


def rounds(total: int, every: int, batch: int) -> tuple[int, int]:
    """(epochs, images of one) for ``total`` images, a multiple of the batch, and a test about every so many.

    Epochs are whole and as long as each other: they are made longer rather than that images are left out.
    """
    epochs = max(1, total // max(batch, every - every % batch))
    every = total // epochs
    return epochs, every - every % batch


def lengths(values: dict[str, Any], total: int, batch: int, tests: int = 10) -> tuple[int, int]:
    """(epochs, images of one) from --images and --every, or the defaults ``total`` and so many tests in all."""
    total = total if values["images"] is None else count(values["images"], "--images")
    total = max(batch, total - total % batch)
    every = max(total // tests, batch) if values["every"] is None else count(values["every"], "--every")
    return rounds(total, every, batch)


def longer(values: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, int], str]:
    """({"epochs": ...}, the command as the card says it) of a training that --resume --images gives another end."""
    if not values["resume"] or values["images"] is None:
        return {}, config["command"]
    epochs = max(1, count(values["images"], "--images") // config["epoch_images"])
    return {"epochs": epochs}, f"{config['command']} (then --resume --images {values['images']})"


def ends(text: str | None, name: str, kind: Callable[[str], float] = float) -> tuple | None:
    """``a:b``, or ``a`` for both ends; ``name``: the option.

    Raises InputError for anything else.
    """
    from cryosuite.errors import InputError

    if text is None:
        return None
    try:
        found = tuple(kind(part) for part in text.split(":"))
    except ValueError:
        found = ()
    if len(found) not in (1, 2):
        raise InputError(f"{name} {text}: expected a number, or from:to")
    return found[0], found[-1]
