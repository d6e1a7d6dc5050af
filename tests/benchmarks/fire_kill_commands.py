"""The commands that are killed, small enough to be run many times, and what they start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fire_kill_process import work

MAPS = ["--structures", "phantom:3", "--hold-out", "1", "--size", "micro", "--crop", "24", "--volume", "32",
        "--crops-per-volume", "4", "--mix", "2", "--images", "32", "--every", "8", "-b", "4"]  # fmt: skip
NETWORK = ["--encoder", "random", "--encoder-size", "micro", "--zdim", "4", "--dim", "32", "--layers", "1",
           "--features", "16", "-n", "2", "-b", "32", "-k", "2", "--cluster", "gmm-direct"]  # fmt: skip
EVERY_STEP = ["--checkpoint-minutes", "0"]
CPU = ["--accelerator", "cpu"]
ONE = ["--threads", "1"]


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        words: its arguments, without the output. ``target`` turns the output folder into what -o takes.
        resumes: has --resume; the ``again`` arguments go with it. overwrites: has --overwrite.
        restart_s: CPU seconds before a continued run does new work.
    """

    name: str
    words: tuple[str, ...]
    resumes: bool = False
    overwrites: bool = True
    again: tuple[str, ...] = ()
    restart_s: float = 0.6
    target: Callable[[Path], Path] = Path

    def arguments(self, out: Path) -> list[str]:
        """To start it."""
        return [*self.words, "-o", str(self.target(out))]

    def resumed(self, out: Path) -> list[str]:
        """To go on with it."""
        return [self.words[0], *self.again, "-o", str(out), "--resume"]

    def can_resume(self, out: Path) -> bool:
        """Whether it has come to a first checkpoint."""
        return (out / "checkpoint.pt").is_file() or (out / "start.pt").is_file()

    def next_arguments(self, out: Path) -> list[str]:
        """What a user would type now: start, go on, or start over what had not come to a first checkpoint."""
        if self.resumes and self.can_resume(out):
            return self.resumed(out)
        return [*self.arguments(out), *(["--overwrite"] if out.exists() and self.overwrites else [])]

    def problem(self, out: Path, log: Path) -> str:
        """Let a run that broke off come to its end; what is wrong with that, or ""."""
        ended = work(self.next_arguments(out), log)
        return "" if ended.code == 0 else f"could not go on: {log.read_text()[-300:]}"

    @property
    def how(self) -> str:
        """How it goes on, for the table."""
        return "--resume" if self.resumes else "run again"


def make_inputs(base: Path) -> Path:
    """A simulated set, a work folder, labels, a map and a trained run; made once."""
    whole = base / "complete"
    if whole.is_file():
        return base
    base.mkdir(parents=True, exist_ok=True)
    simulated = ["simulate", "--structures", "phantom:2", "-n", "240", "-D", "32", "--snr", "0.5"]
    for words in (
        [*simulated, "-o", str(base / "sim")],
        ["preprocess", str(base / "sim"), "-D", "32", "-o", str(base / "work"), *ONE],
        ["backproject", str(base / "work"), "-o", str(base / "map"), *ONE],
        ["train-hype", str(base / "work"), "-o", str(base / "run"), "-n", "1", "--preset", "small", *CPU],
    ):
        ended = work(words, base / "log.txt")
        if ended.code != 0:
            raise SystemExit(f"{' '.join(words)}:\n{(base / 'log.txt').read_text()[-2000:]}")
    whole.write_text("")
    return base


def trainings(base: Path) -> Iterable[Command]:
    """Those with --resume."""
    particles = str(base / "work")
    logged = [*EVERY_STEP, *CPU, "--log-interval", "1"]

    def one(name: str, *words: str, again: tuple[str, ...] = (particles,), **more: float) -> Command:
        return Command(name, tuple(words), resumes=True, again=again, **more)

    yield one("train-hype", "train-hype", particles, "-n", "3", "-b", "32", "--checkpoint", "1", "--preset", "small",
              *logged)  # fmt: skip
    yield one("train-kraqen (voxel maps)", "train-kraqen", particles, "--n-codes", "4", "-i", "8", *ONE)
    yield one("train-kraqen (tri-plane)", "train-kraqen", particles, "--field", "triplane", "--n-codes", "4",
              "--rank", "4", "-n", "4", "-b", "40", "--em-finish", "2", *EVERY_STEP, *ONE)  # fmt: skip
    yield one(
        "deco-classify (known poses)", "deco-classify", particles, *NETWORK, *EVERY_STEP, *ONE, "--precision", "32"
    )
    yield one("deco-classify --ab-initio", "deco-classify", particles, "--ab-initio", "--starts", "1",
              "--classes", "1", *NETWORK, *EVERY_STEP, *ONE, "--precision", "32")  # fmt: skip
    yield one("pretrain-iev", "pretrain-iev", particles, "--preset", "tiny", "--images", "64", "--every", "32",
              "-b", "16", "--views", "4", *logged, again=())  # fmt: skip
    yield one("train-fastar", "train-fastar", "--preset", "micro", "--images", "32", "--every", "16", "-b", "8",
              "--views", "8", *logged, again=())  # fmt: skip
    yield one("pretrain-lvm", "pretrain-lvm", *MAPS, *logged, again=())
    yield one("train-lvm", "train-lvm", "--task", "sharpen", *MAPS, *logged, again=())


def others(base: Path) -> Iterable[Command]:
    """Those that are run again."""
    particles, sim = str(base / "work"), base / "sim"
    yield Command("preprocess", ("preprocess", str(sim), "-D", "24", *ONE))
    yield Command("backproject", ("backproject", particles, *ONE))
    yield Command("polish", ("polish", particles, "--labels", str(sim / "labels.pkl"), *ONE))
    yield Command("analyze", ("analyze", str(base / "run"), "--skip-umap", "--ksample", "3", "--pc", "1", "--n-per-pc",
                  "2"), overwrites=False)  # fmt: skip
    yield Command("fastar-infer", ("fastar-infer", particles, "--map", str(base / "map/backproject.mrc"), *ONE))
    sharpen = ("lvm-sharpen", str(base / "map/backproject.mrc"), "--apix", "1.2", "--stride", "24", *CPU, *ONE)
    yield Command("lvm-sharpen", sharpen, overwrites=False, target=lambda out: out / "sharp.mrc")
    yield Command("simulate", ("simulate", "--structures", "phantom:2", "-n", "120", "-D", "24"))


def commands(base: Path) -> list[Command]:
    """All of them, on these inputs."""
    return [*trainings(base), *others(base)]
