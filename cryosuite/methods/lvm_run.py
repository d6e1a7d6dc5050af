"""What the map networks are trained on, and what a training leaves behind: weights, a card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cryosuite.data.map_weights import VOXELS, save_map_encoder, save_map_weights
from cryosuite.data.typed import typed
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import write_text
from cryosuite.methods.lvm import PretrainModel
from cryosuite.methods.lvm_loader import Crops
from cryosuite.methods.lvm_options import LvmOptions, PretrainOptions, TrainLvmOptions, size_name
from cryosuite.methods.lvm_train import MapModel
from cryosuite.methods.lvm_validate import SCORES, Examiner, PretrainExaminer, fired
from cryosuite.simulate.map_options import PairOptions
from cryosuite.simulate.map_pairs import MapPairs
from cryosuite.training.launch import process_rank, world
from cryosuite.training.logs import read_metrics
from cryosuite.training.signals import StopNow

EARLY = "early_stop"
LEARNT = 0.2  # part of a pre-training after which nothing learnt is worth a warning
HEADER = ["on structures never trained on", "the map given", "the network's answer"]
NAMES = {"cc_mask": "CC inside the molecule", "mse": "mean square error", "hist": "histogram divergence (nats)"}


def make_crops(options: LvmOptions, task: str, epoch_images: int, run: RunDir) -> Crops:
    """The endless stream of crops of a task ("pretrain" for pre-training); atoms are read once and kept in the run.

    Raises InputError where no usable structure, map or pair is found, or a name that is to be held out is unknown.
    """
    given = {"resolution": options.resolution, "nothing": options.noise_only, "clean": options.clean}
    how: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if isinstance(options, TrainLvmOptions):
        how["spectrum"] = options.spectrum
    try:
        wanted = PairOptions(
            task=task, crop=options.crop, norm=options.norm, volume=options.volume,
            crops_per_volume=options.crops_per_volume, **how,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"--volume {options.volume}, --crop {options.crop}: {error}") from None
    pairs = MapPairs.open(
        options.structures, wanted, pairs=None if options.pairs is None else Path(options.pairs),
        maps=[Path(path) for path in options.maps], hold_out=options.hold_out,
        cache=run.path / "structures.npz" if process_rank() == 0 else None,
    )  # fmt: skip
    return Crops(pairs, options.crop, options.crops_per_volume, options.mix, epoch_images)


def after_pretrain_epoch(
    run: RunDir, options: PretrainOptions, examiner: PretrainExaminer, notes: dict[str, Any], epoch_images: int
) -> Callable[[int, PretrainModel], None]:
    """What ``fit`` calls after an epoch of pre-training: scores, a warning, encoder.safetensors and its card."""

    def write(epoch: int, model: PretrainModel) -> None:
        scores = examiner.write(epoch, model)
        if process_rank() != 0:
            return
        found = fired(scores, options.objective)
        if found and epoch >= LEARNT * notes["epochs"]:
            notice(warning(epoch, scores, found))
        said = notes | {"images_seen": epoch * epoch_images, "norm": options.norm, "scores": rounded(scores)}
        said |= {"objective": options.objective, "crop": options.crop, "guards_fired": found}
        save_map_encoder(run.encoder, model.encoder, said)
        write_text(run.card, pretrain_card(options, said, scores))

    return write


def warning(epoch: int, scores: dict[str, float], found: list[str]) -> str:
    """What to tell the user of embeddings that say nothing."""
    said = {
        "target_std": f"all embeddings are nearly alike (spread {scores['heldout_target_std']:.2f}, below .3)",
        "target_rank": f"embeddings span {scores['heldout_target_rank']:.1f} directions only",
        "mean_ratio": f"the prediction is hardly better than the mean (ratio {scores['heldout_mean_ratio']:.2f})",
    }
    why = "; ".join(said[name] for name in found)
    state = "the training has collapsed" if set(found) & {"target_std", "target_rank"} else "nothing is learnt yet"
    return f"epoch {epoch}: {state}: {why}. A lower --lr, a larger batch or more varied structures help"


def after_train_epoch(
    run: RunDir, options: TrainLvmOptions, examiner: Examiner, notes: dict[str, Any], epoch_images: int
) -> Callable[[int, MapModel], None]:
    """What ``fit`` calls after an epoch of training: scores, weights.safetensors and its card.

    With ``patience`` the weights are those of the best epoch, and the training ends when it lies too far back.
    """

    def write(epoch: int, model: MapModel) -> None:
        before = history(run)
        scores = examiner.write(epoch, model)
        best = epoch
        if process_rank() == 0:
            if options.patience:
                best = best_epoch({**before, epoch: round(scores["cc_mask"], 6)})
            if best == epoch:
                said = notes | {"images_seen": epoch * epoch_images, "epoch": epoch, "scores": rounded(scores)}
                said |= {"crop": options.crop, "alpha": options.alpha, "hist_mask": options.hist_mask}
                save_map_weights(
                    run.network, model.net, task=options.task, voxel=VOXELS[options.task], norm=options.norm,
                    notes=said, spectrum=options.spectrum,
                )  # fmt: skip
                write_text(run.card, train_card(options, said, scores))
        if options.patience and _told(epoch - best >= options.patience):
            raise StopNow(EARLY)

    return write


def _told(decision: bool) -> bool:
    """What the first process decided, in every process."""
    if world()[1] == 1:
        return decision
    box = [decision]
    torch.distributed.broadcast_object_list(box, src=0)
    return bool(box[0])


def history(run: RunDir) -> dict[int, float]:
    """Held-out CC_mask by epoch, from metrics.jsonl."""
    found = [record for record in read_metrics(run.metrics) if "cc_mask" in record]
    return {int(record["epoch"]): record["cc_mask"] for record in found}


def best_epoch(scores: dict[int, float]) -> int:
    """The epoch with the highest score, the first of several."""
    return max(scores, key=lambda epoch: (scores[epoch], -epoch))


def rounded(scores: dict[str, float]) -> dict[str, float]:
    """Scores as they are shown."""
    return {name: round(value, 5) for name, value in scores.items()}


def last_scores(run: RunDir, key: str) -> dict[str, float]:
    """The last line of metrics.jsonl that holds a score of this name."""
    found = [record for record in read_metrics(run.metrics) if key in record]
    return found[-1] if found else {}


def score_rows(scores: dict[str, float]) -> list[list[str]]:
    """Rows of the table of a restoring network: score, of the input, of the answer."""
    return [[NAMES[name], f"{scores[f'{name}_input']:.4f}", f"{scores[name]:.4f}"] for name in SCORES]


def pretrain_rows(scores: dict[str, float]) -> list[list[str]]:
    """Rows of the table of a pre-trained encoder: what, value, what it must be."""
    wanted = {
        "loss": ("loss of the objective", ""),
        "mean_ratio": ("the same over that of always predicting the mean", "below .9"),
        "target_std": ("spread of the embeddings", "above .3"),
        "target_rank": ("directions they span", "above 4"),
        "probe_density": ("R2 of a linear map to the local density", "near 1"),
        "probe_mask": ("R2 of a linear map to the share of the molecule", "near 1"),
    }
    return [[text, f"{scores[f'heldout_{name}']:.3f}", need] for name, (text, need) in wanted.items()]


PRETRAIN_HEADER = ["on structures never trained on", "value", "wanted"]


def pretrain_card(options: PretrainOptions, notes: dict[str, Any], scores: dict[str, float]) -> str:
    """The model card of an encoder, Markdown."""
    masks = f"{options.mask_mode} masks at the {options.mask_at}"
    return (
        f"# Map encoder, {options.objective.upper()}\n\n"
        f"Encoder of a {size_name(options.net, options.spec)}; {masks}.\n\n"
        f"{_facts(options, notes)}\n{_markdown(PRETRAIN_HEADER, pretrain_rows(scores))}\n"
        "Not a network that changes maps: `cryosuite train-lvm --init` goes on from it.\n"
    )


def train_card(options: TrainLvmOptions, notes: dict[str, Any], scores: dict[str, float]) -> str:
    """The model card of a restoring network, Markdown."""
    start = "random weights" if options.start == "scratch" else "/".join(Path(options.start).parts[-2:])
    return (
        f"# Map network for {options.task}\n\n"
        f"{size_name(options.net, options.spec)} at {VOXELS[options.task]:g} A per voxel, grey values by "
        f"`{options.norm}`, amplitudes {options.spectrum}.\n\n{_facts(options, notes)}"
        f"- started from: {start}\n- loss: {loss_words(options)}\n\n{_markdown(HEADER, score_rows(scores))}\n"
        "Trained on simulated pairs only; the scores are those of simulated maps of held-out structures.\n"
    )


def loss_words(options: TrainLvmOptions) -> str:
    """What is minimised, in words."""
    words = f"{options.alpha:g} mean square error + {1 - options.alpha:.2g} histogram divergence ({options.hist_mask})"
    named = {"cc": "(1 - correlation)", "ssim": "(1 - SSIM)", "fsc": "(1 - mean FSC)"}
    more = [f" + {getattr(options, name):g} {text}" for name, text in named.items() if getattr(options, name)]
    return words + "".join(more)


def _facts(options: LvmOptions, notes: dict[str, Any]) -> str:
    held = f" (held out: {options.hold_out})"
    return (
        f"- command: `{notes['command']}`\n- seed: {notes['seed']}\n- crops seen: {notes['images_seen']:,} of "
        f"{options.crop}^3 voxels\n- structures: {options.structures}{held}\n"
    )


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def load(run: RunDir, config: dict[str, Any], epoch: int) -> None:
    """A training of a map network has no latents to open: raises InputError that says what to do with it."""
    if config["method"] == "lvm-pretrain":
        raise InputError(
            f"{run.path}: holds a map encoder: go on with `cryosuite train-lvm --init {typed(run.path)} -o run2/`"
        )
    raise InputError(
        f"{run.path}: holds a map network, not latents of particles: use it by `cryosuite lvm-sharpen map.mrc "
        f"--weights {run.network} -o out.mrc`"
    )
