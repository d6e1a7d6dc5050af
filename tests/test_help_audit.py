"""The help texts, every option of every command: a plain sentence, what holds without it, and the unit."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cryosuite.cli import COMMANDS, app
from cryosuite.commands.options import SAYS_ITSELF
from cryosuite.errors import InputError

# names of options that are a physical quantity, and what of it their help has to name
ANGSTROM, PIXELS = r"\bAngstrom\b|\bA\b", r"\bpixels?\b|\b[Vv]oxels?\b"
UNITS = {
    r"apix|pixel_size": ANGSTROM,
    r"resolution|low_pass|particle_diameter|field_of_view|astigmatism|shift_error|defocus_error": ANGSTROM,
    r"box|box_size|render_box|downsample|crop|volume|patch|plane_size|cluster_box|boxes|stride": PIXELS,
    r"encoder_rmax|encoder_lowpass": PIXELS,
    r"shift|shift_extent": r"fraction of the box",
    r"voltage|voltage_kv|kv": r"\bkV\b",
    r"cs|cs_mm": r"\bmm\b",
    r"amplitude_contrast": r"fraction|0 to 1",
    r"defocus": r"micrometres",
    r"bfactor": r"A\^2",
    r"pose_error|cone|tilt_range": r"\b[Dd]egrees\b",
    r"mass_kda": r"\bkDa\b",
    r"memory|mem": r"\bGiB\b|64G",
    r"max_minutes|checkpoint_minutes": r"\b[Mm]inutes\b",
    r"max_hours": r"\bhours\b",
    r"time": r"hours:minutes:seconds",
}
# the same names, where they mean something else: dimensions of networks, films and words
OTHER = {("pretrain-iev", "field"), ("simulate", "shift")}
TRAINED = ("train-", "pretrain-", "deco-", "simulate")  # whose options are checked by their methods
STAGES = ("Prepare", "Reconstruct", "Train", "Look", "Run")
UNCLEAR = re.compile(r"^(Its|Their|It|They|That of|The same|These|This)\b")


def command(name: str) -> Any:
    """The command as the command line builds it."""
    return typer.main.get_command(app).get_command(None, name)


ALL = [(name, parameter) for name in COMMANDS for parameter in command(name).params]


def test_there_is_much_to_audit() -> None:
    assert len(ALL) > 600 and len({name for name, _ in ALL}) == len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_plain_sentence(name: str) -> None:
    for parameter in command(name).params:
        text = parameter.help or ""
        where = f"{name} {parameter.opts[0]}: {text!r}"
        assert len(text.split()) >= 3, where
        assert text.rstrip().endswith((".", '".')), where
        assert not UNCLEAR.match(text), f"{where}: means nothing when read alone"
        assert not re.search(r"TODO|FIXME|\bTBD\b|\.\.$", text), where


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_holds_without_it(name: str) -> None:
    """Required, a default that is shown, a flag (off unless given), or a word for "not given"."""
    for parameter in command(name).params:
        where = f"{name} {parameter.opts[0]}: {parameter.help!r}, default {parameter.default!r}"
        if parameter.required:
            continue
        if isinstance(parameter.default, bool):
            continue
        if parameter.default is None:
            said = SAYS_ITSELF.search(parameter.help or "")
            assert said or isinstance(parameter.show_default, str), where
        else:
            assert parameter.show_default, where


def test_the_words_for_an_option_that_is_not_given_are_printed() -> None:
    """What a user sees: required, a value, the preset's, none."""
    environment = {**os.environ, "COLUMNS": "300", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "cryosuite", "train-hype", "--help"], capture_output=True, text=True, env=environment
    )
    lines = {words[0]: line for line in done.stdout.splitlines() if (words := line.strip("│ *").split())}
    assert "[required]" in lines["--outdir"] and "[default: auto]" in lines["--preset"]
    assert "[default: (none)]" in lines["--poses"] and "[default: (set by the preset)]" in lines["--lr"]


def test_every_quantity_has_its_unit() -> None:
    found = 0
    for name, parameter in ALL:
        for pattern, unit in UNITS.items():
            if not re.fullmatch(pattern, parameter.name):
                continue
            if (name, parameter.name) in OTHER or not _is_number(parameter):
                continue
            found += 1
            assert re.search(unit, parameter.help or ""), f"{name} {parameter.opts[0]}: {parameter.help!r}"
    assert found > 80


def test_units_in_words_that_readers_know() -> None:
    """No symbol that a terminal may not show, and one spelling of each unit."""
    for name, parameter in ALL:
        text = parameter.help or ""
        assert text.isascii(), f"{name} {parameter.opts[0]}: {text!r}"
        assert not re.search(r"\bAngstroms\b|\bangstrom\b|\bkv\b|\bdegs?\b", text), f"{name} {parameter.opts[0]}"


def _is_number(parameter: Any) -> bool:
    annotation = str(parameter.type_descriptor.annotation)
    return any(kind in annotation for kind in ("int", "float")) or parameter.name in ("resolution", "boxes", "time")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    """A sentence, more of them, and an example that begins with the program's name."""
    text = command(name).help or ""
    first = text.strip().splitlines()[0]
    assert len(first.split()) >= 4, first
    assert f"cryosuite {name}" in text
    for line in re.findall(r"^ *cryosuite .*$", text, flags=re.M):
        assert line.split()[1] in COMMANDS, line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_seed_that_nothing_takes_is_refused(name: str) -> None:
    found = command(name)
    if not any("--seed" in parameter.opts for parameter in found.params) or name.startswith(TRAINED):
        return
    for seed in ("-1", str(1 << 32)):
        done = CliRunner().invoke(app, [name, "nowhere", "-o", "out", "--seed", seed])
        assert isinstance(done.exception, InputError) and f"--seed {seed}" in str(done.exception), done.output


def test_examples_in_help_take_their_options() -> None:
    """Every option that an example of a help text names is one of that command."""
    shown = 0
    for name in COMMANDS:
        text = re.sub(r"\\\n\s*", " ", command(name).help or "")
        for line in re.findall(r"^ *cryosuite (.*)$", text, flags=re.M):
            words = line.split()
            known = {option for p in command(words[0]).params for option in [*p.opts, *p.secondary_opts]}
            if words[0] == "slurm":
                continue  # the options of the command inside follow
            for word in words:
                if re.match(r"--?[A-Za-z]", word):
                    shown += 1
                    assert word.split("=")[0] in known, f"{name}: {line}"
    assert shown > 40


def test_commands_are_grouped_by_stage_without_arguments() -> None:
    done = subprocess.run([sys.executable, "-m", "cryosuite"], capture_output=True, text=True, timeout=60)
    text = done.stdout + done.stderr
    places = [text.index(f" {stage} ") for stage in STAGES]
    assert min(places) > text.index("Usage")
    stages = list(zip(places, STAGES, strict=True))
    for name, (_, stage) in COMMANDS.items():
        at = re.search(rf"^│ {name} ", text, flags=re.M).start()
        assert max(one for one in stages if one[0] < at)[1] == stage, name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("cryosuite ", set(COMMANDS)),
        ("cryosuite train-", {name for name in COMMANDS if name.startswith("train-")}),
        ("cryosuite backproject --mas", {"--mask"}),
        ("cryosuite train-kraqen --n-", {"--n-states", "--n-codes"}),
    ],
)
def test_bash_completes_commands_and_options(words: str, expected: set[str]) -> None:
    """As the script of `cryosuite --show-completion bash` asks for it."""
    parts = words.split(" ")
    environment = {
        **os.environ, "_CRYOSUITE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(parts) - 1),
        "_TYPER_COMPLETE_ARGS": words,
    }  # fmt: skip
    script = "import sys; sys.argv = ['cryosuite']; from cryosuite.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    found = {line for line in re.split(r"[\n\t ]+", done.stdout) if line}
    assert expected <= found, done.stderr
    assert len(found) < len(expected) + 3


def test_the_completion_script_of_bash_is_printed() -> None:
    """What `cryosuite --install-completion` puts into the shell's start-up files."""
    script = "import sys; sys.argv = ['cryosuite']; from cryosuite.cli import main; main()"
    environment = {**os.environ, "_CRYOSUITE_COMPLETE": "source_bash"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert re.search(r"^complete .* cryosuite$", done.stdout.strip(), flags=re.M), done.stdout + done.stderr


def public_names(tree: ast.Module | ast.ClassDef, inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public classes, functions and methods of a module, with their names."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield inside + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_names(node, f"{inside}{node.name}.")


def test_everything_public_has_a_docstring() -> None:
    """``forward`` of a network is described by its class."""
    names, bare = 0, []
    root = Path(sys.modules["cryosuite"].__file__).parent
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            bare.append(str(path.relative_to(root)))
        for name, node in public_names(tree):
            names += 1
            if not name.endswith(".forward") and not ast.get_docstring(node):
                bare.append(f"{path.relative_to(root)}: {name}")
    assert names > 2000 and not bare, bare
