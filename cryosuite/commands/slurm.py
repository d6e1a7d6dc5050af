"""``cryosuite slurm COMMAND ...``: the batch script that runs any other command on a SLURM cluster."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Optional

import typer

from cryosuite import ranks

SIGNAL_SECONDS = 180  # before the time limit a training is told to save
SHARED = ("devices", "num_nodes")  # options of commands that run on several GPUs
TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
NAME = re.compile(r"[\w.,+:@/=-]+")

# what belongs to the other command is left to it
context_settings = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


@dataclass(frozen=True)
class Job:
    """What is asked of the cluster; ``gpus`` and ``cpus`` are of each node and each process."""

    nodes: int
    gpus: int
    cpus: int
    memory: str
    time: str
    partition: str | None
    account: str | None
    name: str
    log: str
    requeue: bool
    directives: tuple[str, ...]
    setup: tuple[str, ...]


def main(
    context: typer.Context,
    command: Annotated[
        str,
        typer.Argument(
            help="The command to run, such as train-hype, with all of its options behind it.",
            metavar="COMMAND ...",
            show_default=False,
        ),
    ],
    submit: Annotated[bool, typer.Option("--submit", help="Hand the script to sbatch instead of printing it.")] = False,
    gpus: Annotated[
        Optional[int],  # noqa: UP045  typer on Python 3.10 evaluates this
        typer.Option("--gpus", help="GPUs per node; default 1 for trainings, else 0.", show_default=False),
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", help="Nodes; their processes share the work.")] = 1,
    cpus: Annotated[int, typer.Option("--cpus", help="Processor cores for each GPU (or for the whole job).")] = 8,
    memory: Annotated[str, typer.Option("--mem", help="Memory per node, such as 64G.")] = "64G",
    time: Annotated[
        str, typer.Option("--time", help="Time limit: hours:minutes:seconds, days-hours, or minutes.")
    ] = "24:00:00",
    partition: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("-p", "--partition", help="Partition (queue) of your cluster."),
    ] = None,
    account: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("-A", "--account", help="Account to charge."),
    ] = None,
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("-J", "--job-name", help="Name of the job; default: the command.", show_default=False),
    ] = None,
    log: Annotated[str, typer.Option("--log", help="File for what is printed; %j is the job's number.")] = "%x.%j.log",
    requeue: Annotated[
        bool,
        typer.Option(
            "--requeue/--no-requeue",
            help="Trainings: save before the time limit or a pre-emption, go back into the queue and resume there.",
        ),
    ] = True,
    directive: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--sbatch", help="One more option of sbatch, such as --sbatch=--constraint=a100.", metavar="TEXT"),
    ] = None,
    setup: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--setup", help="A line to run first, such as 'module load cuda'.", metavar="LINE"),
    ] = None,
) -> None:
    """Print (or submit) the SLURM script that runs a command.

    Options of the job come before the command, those of the command behind
    it. The command's options are checked now, not after a night in the
    queue. Trainings save their state before the time limit and before a
    pre-emption, go back into the queue and resume where they stopped.

        cryosuite slurm train-hype work/ -o run/

        cryosuite slurm --gpus 4 --nodes 2 --time 12:00:00 -p gpu --submit
        train-kraqen work/ -o run/

        cryosuite slurm --cpus 32 preprocess run_data.star -D 128 -o work/
    """
    shared, training = _inspect(command, context.args)
    if gpus is None:
        gpus = int(training)
    _check(command, context.args, nodes, gpus, cpus, shared)
    job = Job(nodes, gpus, cpus, memory, time, partition, account, name or command, log, requeue and training,
              tuple(directive or ()), tuple(setup or ()))  # fmt: skip
    _check_text(job)
    text = script(job, command, list(context.args), shared)
    if submit:
        _submit(text)
    else:
        sys.stdout.write(text)


def _inspect(command: str, arguments: list[str]) -> tuple[bool, bool]:
    """(runs on several GPUs, is a training) of a command whose arguments it has taken without complaint."""
    from cryosuite.errors import InputError

    module = command.replace("-", "_")
    if command == "slurm" or not re.fullmatch(r"[a-z][a-z-]*", command) or not _is_command(module):
        raise InputError(f"{command}: no command of cryosuite; see `cryosuite --help`")
    from importlib import import_module

    single = typer.Typer(add_completion=False)
    function = import_module(f"cryosuite.commands.{module}").main
    single.command(command, context_settings=getattr(function, "context_settings", None))(function)
    target = typer.main.get_command(single)
    try:
        with target.make_context(command, list(arguments)):
            pass
    except typer.Exit as error:  # --help
        raise typer.Exit(error.exit_code) from error
    names = {parameter.name for parameter in target.params}
    return set(SHARED) <= names, "requeue" in names


def _is_command(module: str) -> bool:
    spec = find_spec(f"cryosuite.commands.{module}")
    return spec is not None and spec.origin is not None and "def main(" in Path(spec.origin).read_text()


def _check(command: str, arguments: list[str], nodes: int, gpus: int, cpus: int, shared: bool) -> None:
    """Refuse sizes that cannot be, and options that would be given twice."""
    from cryosuite.errors import InputError

    for option, value, least in (("--nodes", nodes, 1), ("--gpus", gpus, 0), ("--cpus", cpus, 1)):
        if value < least:
            raise InputError(f"{option} {value}: expected {least} or more")
    if (nodes > 1 or gpus > 1) and not shared and command not in ranks.SHARED:
        raise InputError(f"{command} runs in one process: ask for one node and at most one GPU")
    for option in ("--devices", "--num-nodes", "--requeue"):
        if shared and any(word.split("=")[0] == option for word in arguments):
            raise InputError(
                f"{option} is set by the script: leave it out and use --gpus, --nodes, --no-requeue instead"
            )


def _check_text(job: Job) -> None:
    """Refuse what would break out of its line of the script."""
    from cryosuite.errors import InputError

    for option, value, rule in (
        ("--time", job.time, TIME), ("--mem", job.memory, MEMORY), ("--partition", job.partition, NAME),
        ("--account", job.account, NAME), ("--job-name", job.name, NAME),
    ):  # fmt: skip
        if value is not None and not rule.fullmatch(value):
            raise InputError(f"{option} {value!r}: not something SLURM takes; see `cryosuite slurm --help`")
    for option, values in (("--sbatch", job.directives), ("--setup", job.setup), ("--log", (job.log,))):
        for value in values:
            if not value.strip() or "\n" in value or "\r" in value:
                raise InputError(f"{option} {value!r}: expected one line of text")


def script(job: Job, command: str, arguments: list[str], shared: bool) -> str:
    """The text of the batch script.

    One process per GPU, started by srun; SIGUSR1 reaches the processes themselves, not the shell, so that they can
    save. A job that comes back from the queue resumes by itself (SLURM_RESTART_COUNT).
    """
    processes = max(job.gpus, 1)
    lines = [f"job-name={job.name}", f"nodes={job.nodes}", f"ntasks-per-node={processes}"]
    if job.gpus:
        lines.append(f"gpus-per-node={job.gpus}")
    lines += [f"cpus-per-task={job.cpus}", f"mem={job.memory}", f"time={job.time}", f"output={job.log}"]
    lines += [f"{key}={value}" for key, value in (("partition", job.partition), ("account", job.account)) if value]
    if job.requeue:
        lines += [f"signal=USR1@{SIGNAL_SECONDS}", "requeue", "open-mode=append"]
    directives = [f"--{line}" for line in lines] + [line if line.startswith("-") else f"--{line}"
                                                     for line in job.directives]  # fmt: skip
    words = ["cryosuite", command, *arguments]
    if shared:
        words += ["--devices", str(processes), "--num-nodes", str(job.nodes)]
    if job.requeue:
        words.append("--requeue")
    before = [*job.setup]
    if sys.prefix != sys.base_prefix:
        before.append(f"source {shlex.quote(str(Path(sys.prefix) / 'bin' / 'activate'))}")
    before.append("export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK")
    run = "srun --cpus-per-task=$SLURM_CPUS_PER_TASK"
    return "\n".join([
        "#!/bin/bash", *[f"#SBATCH {line}" for line in directives], "",
        *before, f"cd {shlex.quote(str(Path.cwd()))}", f"exec {run} {shlex.join(words)}", "",
    ])  # fmt: skip


def _submit(text: str) -> None:
    """Hand the script to sbatch through its standard input, and say what it answered."""
    import subprocess

    from cryosuite.console import say
    from cryosuite.errors import InputError

    try:
        done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True, timeout=120)
    except FileNotFoundError as error:
        raise InputError("--submit: sbatch is not on this machine; without --submit the script is printed") from error
    except subprocess.TimeoutExpired as error:
        raise InputError("--submit: sbatch did not answer within two minutes") from error
    if done.returncode:
        raise InputError(f"--submit: sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}")
    say(done.stdout.strip())


main.context_settings = context_settings  # type: ignore[attr-defined]
