"""What pose prediction is trained on, and what a training leaves behind: molecules, weights, a card."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite.data.multiview_weights import save_multiview
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path, write_text
from cryosuite.formats.npz import read_npz
from cryosuite.methods.fastar import FastarModel
from cryosuite.methods.fastar_loader import Molecules
from cryosuite.methods.fastar_options import FastarOptions
from cryosuite.methods.fastar_validate import Examiner, verdict
from cryosuite.nets.multiview import SPECS, flops, parameter_count
from cryosuite.simulate.beads import Beads, find_structures, structure_beads
from cryosuite.training.launch import process_rank
from cryosuite.training.logs import read_metrics

STRUCTURE_BEADS = 288  # per atomic model: enough for a box of 64 pixels
HELD_SEED = 3


def weights_file(run: RunDir) -> Path:
    """The averaged weights of a run, half precision, as ``fastar-infer --weights`` takes them (or the folder)."""
    return Path(run.path) / "weights.safetensors"


def card_file(run: RunDir) -> Path:
    """What was trained, on what, and how good it is, in words."""
    return Path(run.path) / "model_card.md"


def make_molecules(options: FastarOptions, epoch_images: int, run: RunDir) -> tuple[Molecules, Beads | None]:
    """(what is trained on, structures held out or None); atomic models are read once and kept in the run's folder.

    Raises InputError where no usable structure is found, or a name that is to be held out is unknown.
    """
    size = SPECS[options.preset].size
    library, names, held = None, [], None
    spec = options.structures.removeprefix("both:")
    if spec != "phantom":
        every, names = _library(spec, Path(run.path) / "structures.npz")
        kept = _held_out(names, options.hold_out)
        held = every.rows(torch.tensor([name in kept for name in names])) if kept else None
        if len(kept) == len(names):
            raise InputError(f"--hold-out {options.hold_out}: leaves no structure to train on")
        library = every.rows(torch.tensor([name not in kept for name in names]))
        names = [name for name in names if name not in kept]
    target = None
    if options.map or options.finetune:
        from cryosuite.methods.fastar_target import open_target

        target = open_target(options, size)
    views = options.view_options(size, 1, library is not None)
    return Molecules(views, epoch_images, library, names, target), held


def _held_out(names: list[str], wanted: str) -> set[str]:
    """Names of the structures to test on: a number of them drawn once and for all, or those listed."""
    if wanted.strip().isdigit():
        count = min(int(wanted), len(names) // 2)
        return set(np.random.default_rng(HELD_SEED).permutation(sorted(names))[:count].tolist())
    kept = {name.strip() for name in wanted.split(",") if name.strip()}
    if unknown := kept - set(names):
        raise InputError(f"--hold-out: not among the structures: {', '.join(sorted(unknown))}")
    return kept


def _library(spec: str, path: Path) -> tuple[Beads, list[str]]:
    """Atomic models as beads, read from the files or from what an earlier start of the run kept."""
    files = find_structures(spec)
    said = " ".join(f"{file.name} {file.stat().st_size}" for file in files)
    key = np.array([zlib.crc32(said.encode()), STRUCTURE_BEADS], np.int64)
    if path.is_file():
        try:
            found = read_npz(path, ("key", "names", "xyz", "weight", "width", "mates"))
            if np.array_equal(found["key"], key):
                parts = (torch.from_numpy(found[n]) for n in ("xyz", "weight", "width", "mates"))
                return Beads(*parts), found["names"].tolist()
        except (InputError, TypeError):  # TypeError: numbers of a kind that torch has not
            path.unlink(missing_ok=True)
    notice(f"reading {len(files)} atomic models")
    beads, names = structure_beads(files, STRUCTURE_BEADS)
    if process_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            np.savez(
                stream, key=key, names=np.array(names), xyz=beads.xyz.numpy(), weight=beads.weight.numpy(),
                width=beads.width.numpy(), mates=beads.mates.numpy(),
            )  # fmt: skip
    return beads, names


def after_epoch(
    run: RunDir, options: FastarOptions, examiner: Examiner, notes: dict[str, Any], epoch_images: int
) -> Callable[[int, FastarModel], None]:
    """What ``fit`` calls after an epoch: scores, weights.safetensors and its card."""

    def write(epoch: int, model: FastarModel) -> None:
        scores = examiner.write(epoch, model)
        if process_rank() != 0:
            return
        said = notes | {"mode": options.mode, "images_seen": epoch * epoch_images, "scores": rounded(scores)}
        said |= {"answers": answers(options)}
        save_multiview(weights_file(run), model.net, said)
        write_text(card_file(run), card(options, said, scores))

    return write


def answers(options: FastarOptions) -> str:
    """Which of its answers the network was trained to give: "match", "match, map" or "star"."""
    if options.mode == "ab-initio":
        return "star"
    return "match, map" if options.map_weight else "match"


def rounded(scores: dict[str, float]) -> dict[str, float]:
    """Scores as they are shown."""
    return {name: round(value, 2) for name, value in scores.items()}


def last_scores(run: RunDir) -> dict[str, float]:
    """The scores of the last validation in metrics.jsonl."""
    found = [record for record in read_metrics(run.metrics) if any(name.endswith("_deg") for name in record)]
    return {k: v for k, v in found[-1].items() if "_snr" in k} if found else {}


def score_rows(scores: dict[str, float]) -> list[list[str]]:
    """Rows of a table: test set, median error, chance, share below 20 degrees, shift error."""
    names = [name.removesuffix("_deg") for name in scores if name.endswith("_deg")]
    return [
        [
            name.replace("_snr", ", SNR "), f"{scores[f'{name}_deg']:.1f}", f"{scores[f'{name}_chance']:.1f}",
            f"{scores[f'{name}_below']:.0f} %", f"{scores[f'{name}_shift']:.2f}",
        ]
        for name in names
    ]  # fmt: skip


HEADER = ["never seen in training", "median error (deg)", "chance (deg)", "below 20 deg", "shift error (px)"]


def card(options: FastarOptions, notes: dict[str, Any], scores: dict[str, float]) -> str:
    """The model card, Markdown."""
    spec = SPECS[options.preset]
    table = [HEADER, ["---"] * len(HEADER), *score_rows(scores)]
    rows = "\n".join("| " + " | ".join(row) + " |" for row in table)
    each = flops(spec, 0) if options.mode == "target" else flops(spec, options.views[1])
    molecules = f"{options.structures} (held out: {options.hold_out})"
    if options.map:
        molecules = f"the one of {options.map}" + (f", particles of {options.finetune}" if options.finetune else "")
    return (
        f"# {options.preset}, {options.mode} mode\n\n"
        f"{parameter_count(spec):,} parameters, {spec.size} x {spec.size} pixels, {each / 1e9:.2f} GFLOP per image\n\n"
        f"- command: `{notes['command']}`\n- seed: {notes['seed']}\n- images seen: {notes['images_seen']:,}\n"
        f"- molecules: {molecules}\n- answers trained: {notes['answers']}\n"
        f"- verdict: {verdict(scores, options.mode)}\n\n{rows}\n"
    )


def load(run: RunDir, config: dict[str, Any], epoch: int) -> None:
    """A training of poses has no latents to open: raises InputError that says what to do with it."""
    raise InputError(
        f"{run.path}: holds a pose network, not latents of particles: pose a set with it by `cryosuite fastar-infer "
        f"particles.star --weights {weights_file(run)} -o poses/`"
    )
