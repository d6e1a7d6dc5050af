"""The Typer application: one line per command, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import errno
import os
import sys
import time
import warnings
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from cryosuite import __version__, ranks
from cryosuite.console import complain, hush, say
from cryosuite.errors import InputError, UserNotice

# name -> (module, stage shown in --help); in the order of a day's work
COMMANDS = {
    "simulate": ("simulate", "Prepare"),
    "preprocess": ("preprocess", "Prepare"),
    "check": ("check", "Prepare"),
    "backproject": ("backproject", "Reconstruct"),
    "train-hype": ("train_hype", "Train"),
    "train-kraqen": ("train_kraqen", "Train"),
    "train-fastar": ("train_fastar", "Train"),
    "pretrain-iev": ("pretrain_iev", "Train"),
    "deco-classify": ("deco_classify", "Train"),
    "pretrain-lvm": ("pretrain_lvm", "Train"),
    "train-lvm": ("train_lvm", "Train"),
    "fastar-infer": ("fastar_infer", "Reconstruct"),
    "polish": ("polish", "Reconstruct"),
    "lvm-sharpen": ("lvm_sharpen", "Reconstruct"),
    "analyze": ("analyze", "Look"),
    "trajectory": ("trajectory", "Look"),
    "landscape": ("landscape", "Look"),
    "report": ("report", "Look"),
    "eval-fsc": ("eval_fsc", "Look"),
    "select": ("select", "Look"),
    "export": ("export", "Look"),
    "slurm": ("slurm", "Run"),
}


PATIENCE = 3.0  # seconds in which the first process may tell an error that all have; a launcher then ends the others


NO_MEMORY = "End what else uses it (nvidia-smi shows it), give a smaller batch, or run with --accelerator cpu."


class LazyGroup(TyperGroup):
    """Imports a command's module only when it is asked for, so that help and start-up stay fast."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All command names in the order of a day's work."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, built by Typer from its module; None when unknown."""
        if cmd_name not in COMMANDS:
            return None
        module, panel = COMMANDS[cmd_name]
        from cryosuite.commands.options import say_defaults

        function = import_module(f"cryosuite.commands.{module}").main
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        settings = getattr(function, "context_settings", None)
        single.command(cmd_name, rich_help_panel=panel, context_settings=settings)(function)
        command = typer.main.get_command(single)
        command.name = cmd_name
        say_defaults(command)
        return command


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Add --debug to any command to see the traceback behind an error.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"cryosuite {__version__}")
        raise typer.Exit()


@app.callback()
def cryosuite(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """From cryo-EM particle images to the many 3D shapes behind them."""


def _print_notices() -> None:
    """Print each notice of ours once; leave other libraries' warnings out of the user's way."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserNotice) and str(message) not in seen:
            seen.add(str(message))
            say(f"note: {message}")

    warnings.showwarning = show
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", UserNotice)


def _describe_os_error(error: OSError) -> str:
    """One sentence for an operating-system error, naming the file."""
    if error.errno == errno.ENOSPC:
        if error.filename:
            from cryosuite.formats.atomic import write_error

            return str(write_error(error.filename, error))
        return "the disk is full; nothing was written in place of the old file. Free some space and run again."
    name = f"{error.filename}: " if error.filename else ""
    return f"{name}{error.strerror or error}"


def _take_part(arguments: list[str]) -> bool:
    """Whether this process has work to do; where several were started, only the first one speaks."""
    rank, count = ranks.process_rank(), ranks.process_count()
    if rank > 0:
        hush()
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    if count == 1 or name not in COMMANDS or name in ranks.SHARED:
        return True
    if rank == 0:
        say(f"note: {name} works in one process: the other {count - 1} that were started end at once")
    return rank == 0


def _leave(message: str, code: int) -> None:
    """End with an error, told by one process where several have it; never returns.

    The first process tells at once. Another one waits: the launcher (or the end of the process that started it) shows
    that the first has told and left.
    """
    if ranks.process_rank() > 0:
        parent = os.getppid()
        time.sleep(PATIENCE)
        if os.getppid() != parent:
            sys.exit(code)
    complain(message)
    sys.exit(code)


def _lost_another(error: RuntimeError) -> bool:
    """Whether this error of torch says that another process of this command is gone."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "TCPStore")
    return any(sign in str(error) for sign in signs)


def main() -> None:
    """Run the command line; exit code 0, 2 for bad input, 130 when interrupted."""
    # read when torch is loaded: waiting threads sleep instead of spinning, which costs several times the CPU time
    # wherever the cores are shared with other work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    _print_notices()
    if not _take_part(arguments):
        return
    try:
        app(args=arguments, prog_name="cryosuite")
    except InputError as error:
        if debug:
            raise
        _leave(f"error: {error}", 2)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    except OSError as error:
        if debug:
            raise
        _leave(f"error: {_describe_os_error(error)}", 2)
    except (MemoryError, RuntimeError) as error:
        if debug:
            raise
        if words := _no_memory(error):
            _leave(f"error: {words}", 2)
        if not _lost_another(error):
            raise
        _stay_behind()


def _no_memory(error: MemoryError | RuntimeError) -> str:
    """One sentence where an error says that there is no memory left; "" for any other."""
    machine = isinstance(error, MemoryError)
    if not machine:
        if "torch" not in sys.modules:  # whose errors they are
            return ""
        from cryosuite.kernels.memory import out_of_memory

        if not out_of_memory(error):
            return ""
        machine = "CPUAllocator" in str(error)
    if machine:
        return "this machine has not enough memory for that: use fewer --threads, or a machine with more"
    return f"the GPU has not enough memory for this step ({_first_line(error)}). {NO_MEMORY}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split(". ")[0].splitlines()[0][:160] if str(error).strip() else type(error).__name__


def _stay_behind() -> None:
    """End after another process has ended; never returns. The launcher ends this one before it repeats the news."""
    time.sleep(2 * PATIENCE)
    say("error: another process of this command has ended, and this one cannot go on without it; see what it said")
    sys.exit(2)
