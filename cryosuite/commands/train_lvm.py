"""``cryosuite train-lvm``: a network that sharpens maps, raises their resolution, or fills in a missing wedge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cryosuite.commands.pretrain_lvm import (
    DATA,
    LEARNT,
    SPEED,
    TRAINING,
    _option,
    again,
    common_options,
    given,
    lengths,
    train_values,
)
from cryosuite.data.typed import typed

OWN = (
    "spectrum",
    "noise_only",
    "clean",
    "alpha",
    "hist_mask",
    "hist_sample",
    "cc",
    "ssim",
    "fsc",
    "frozen",
    "patience",
)
LR, ENCODER_LR, FROZEN = 3e-4, 1e-4, 0.1  # of the decoder, of an encoder that was trained before


def main(
    context: typer.Context,
    outdir: Path = typer.Option(..., "-o", "--outdir", help="Folder of the run, made by this command."),
    task: str = typer.Option(
        None,
        help="sharpen: a map as its model shows it. superres: at a better resolution than it has. wedge: a tomographic "
        "map (10 A voxels) without its missing wedge.",
        show_default=False,
    ),
    init: str = typer.Option(
        None,
        help="A pretrained encoder (a file or the folder of pretrain-lvm), or scratch (default).",
        show_default=False,
    ),  # fmt: skip
    weights: str = typer.Option(
        None,
        help="Go on from a whole network: a file, a run's folder, or sharpen, superres or wedge, as installed.",
        show_default=False,
    ),  # fmt: skip
    preset: str = typer.Option(
        "default", help="Choice of options: default, or paper (loss and grey values as CryoLVM describes them)."
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on where the run in this folder stopped."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the run that is in the folder."),
    structures: str = _option(
        None,
        help="Molecules to simulate maps of: phantom (made up, endless; default), a PDB or mmCIF file, a folder of "
        "them, or both:FOLDER.",
        panel=DATA,
    ),
    pairs: Path = _option(None, help="Your own pairs: a folder or table of maps and their models.", panel=DATA),
    hold_out: str = _option(None, help="Structures kept out to test on: how many, or names.", panel=DATA),
    crop: int = _option(None, help="Edge of the crops in voxels; default: 48 on a GPU, else 32.", panel=DATA),
    volume: int = _option(None, help="Edge of what is simulated at once, in voxels.", panel=DATA),
    crops_per_volume: int = _option(None, help="Crops cut from each simulated volume.", panel=DATA),
    mix: int = _option(None, help="Simulated volumes that are shuffled together.", panel=DATA),
    norm: str = _option(None, help="Grey values: robust (ours), paper or emready.", panel=DATA),
    spectrum: str = _option(
        None,
        help="Amplitudes of the maps given: matched (they fall as those of a model's map of the same resolution; "
        "default, not of tomograms) or as-is.",
        panel=DATA,
    ),
    resolution: str = _option(None, help="Resolution of the maps in A, from:to, such as 2.5:8.", panel=DATA),
    noise_only: float = _option(None, help="Chance of a volume of noise, whose target is empty.", panel=DATA),
    clean: float = _option(None, help="Chance of a map that needs no change.", panel=DATA),
    size: str = _option(
        None,
        help="micro, small, default, medium or large (d = 8, 16, 24, 32 channels); default: that of --init or "
        "--weights, else default on a GPU and small on a CPU.",
        panel=LEARNT,
    ),
    net: str = _option(None, help="Network: scunet (default), or vit to compare with.", panel=LEARNT),
    drop_path: float = _option(
        None, help="Stochastic depth, a share of blocks left out; default 0 up to small, else 0.1.", panel=LEARNT
    ),
    alpha: float = _option(
        None,
        help="Share of the mean square error in the loss (default 0.9); the rest is the histogram's.",
        panel=LEARNT,
    ),
    hist_mask: str = _option(
        None, help="Voxels of the histogram: union (molecule in either map, default) or whole.", panel=LEARNT
    ),
    hist_sample: int = _option(
        None, help="Voxels of each crop that the histogram is taken from; 0: all.", panel=LEARNT
    ),
    cc: float = _option(None, help="Weight of 1 - correlation inside the molecule.", panel=LEARNT),
    ssim: float = _option(None, help="Weight of a structural similarity loss.", panel=LEARNT),
    fsc: float = _option(None, help="Weight of a Fourier shell correlation loss.", panel=LEARNT),
    encoder_lr: float = _option(
        None, help="Learning rate of the encoder; default: 1e-4 if it was trained before, else --lr.", panel=LEARNT
    ),
    frozen: float = _option(
        None, help="Part of the training in which a pretrained encoder stays as it is (default 0.1).", panel=LEARNT
    ),
    patience: int = _option(
        None, help="End early after so many tests without a better CC; the best weights are kept.", panel=TRAINING
    ),
    images: str = _option(None, help="Crops seen in all, such as 60k or 1M.", panel=TRAINING),
    every: str = _option(
        None, help="Test and write the weights every so many crops; default: 10 times.", panel=TRAINING
    ),
    batch_size: int = _option(None, "-b", "--batch-size", help="Crops per step over all GPUs.", panel=TRAINING),
    micro_batches: int = _option(1, help="Pieces a batch is computed in, for less memory.", panel=TRAINING),
    lr: float = _option(None, help="Learning rate (of the decoder); default 3e-4.", panel=TRAINING),
    schedule: str = _option(
        None,
        help="Learning rate over time: cosine, or flat (until the last fifth: --resume --images may move the end).",
        panel=TRAINING,
    ),  # fmt: skip
    warmup: float = _option(None, help="Fraction of the training in which the learning rate rises.", panel=TRAINING),
    ema: float = _option(0.999, help="Decay of the averaged weights.", panel=TRAINING),
    max_minutes: float = _option(None, help="Stop after so many minutes; --resume goes on.", panel=TRAINING),
    max_hours: float = _option(None, help="Stop after so many hours; --resume goes on.", panel=TRAINING),
    checkpoint_minutes: float = _option(5.0, help="Minutes between two saves of what --resume needs.", panel=TRAINING),
    log_interval: int = _option(20, help="Steps between two lines of metrics.jsonl.", panel=TRAINING),
    seed: int = _option(0, help="Random seed: the same seed gives the same result (on one machine).", panel=TRAINING),
    precision: str = _option(
        "auto", help="Precision of numbers: 32 or bf16; auto: bf16 where the machine is fast at it.", panel=SPEED
    ),
    accelerator: str = _option("auto", help="Where to compute: auto, cpu or gpu.", panel=SPEED),
    devices: int = _option(1, help="GPUs on each machine (processes without GPUs).", panel=SPEED),
    num_nodes: int = _option(1, help="Machines that train together.", panel=SPEED),
    compile: bool = _option(False, "--compile", help="Use torch.compile, for long trainings on a GPU.", panel=SPEED),
    requeue: bool = _option(False, "--requeue", help="SLURM: put the job back into the queue.", panel=SPEED),
) -> None:
    """Train a network that restores density maps, on simulated pairs of maps or your own (CryoLVM).

    Writes weights.safetensors for lvm-sharpen and a card that says how good
    it is on structures never seen, beside the map it was given.

        cryosuite train-lvm --task sharpen --structures both:models/ -o run/

        cryosuite train-lvm --task wedge --init pretrained/ -o run/

        cryosuite train-lvm --task superres --weights sharpen -o run/

        cryosuite lvm-sharpen map.mrc --weights run/weights.safetensors -o out.mrc
    """
    raise typer.Exit(_train(*given(context)))


def _train(values: dict[str, Any], typed: set[str]) -> int:
    """Open, train, write, print; returns the exit code."""
    from cryosuite.commands.train_hype import tune_process
    from cryosuite.data.workdir import RunDir
    from cryosuite.methods.lvm_options import TrainLvmOptions
    from cryosuite.methods.lvm_run import after_train_epoch, make_crops
    from cryosuite.methods.lvm_train import TrainLvm
    from cryosuite.methods.lvm_validate import Examiner
    from cryosuite.training.launch import meet, process_rank
    from cryosuite.training.loop import fit
    from cryosuite.training.runs import begin_run, make_config, train_options

    tune_process()
    run = RunDir(values["outdir"])
    options, training, every = (TrainLvmOptions(), None, 1) if values["resume"] else _options(values)
    config = make_config("lvm", run.path, run, options, training, epoch_images=every)
    config = begin_run(run, config, training, resume=values["resume"], overwrite=values["overwrite"])
    fresh = not run.checkpoint.exists()
    if fresh and process_rank() == 0:
        for path in (run.network, run.card):  # of a run that was replaced
            path.unlink(missing_ok=True)
    chosen = TrainLvmOptions.from_dict(config["options"])
    changed, command = again(values, typed, config)
    wanted = train_options(config, **changed)
    # what one process cannot read ends all of them: the others would wait for it
    crops = meet(wanted).each(lambda: make_crops(chosen, chosen.task, config["epoch_images"], run))
    notes = {"command": command, "seed": wanted.seed, "trained_by": "cryosuite train-lvm"}
    result = fit(
        TrainLvm(chosen, load=fresh), crops, run, wanted, resume=values["resume"],
        on_epoch=after_train_epoch(run, chosen, Examiner(crops, run), notes, config["epoch_images"]),
    )  # fmt: skip
    if process_rank() == 0:
        _report(run, chosen, result)
    return result.exit_code


def _options(values: dict[str, Any]) -> tuple[Any, Any, int]:
    """(options of the method, of the training, crops between two validations)."""
    from cryosuite.errors import InputError
    from cryosuite.methods.lvm_options import PAPER_TRAIN, TASKS, TrainLvmOptions
    from cryosuite.training.launch import resolve_accelerator
    from cryosuite.training.options import TrainOptions

    if values["task"] is None:
        raise InputError(f"--task: say what is to be learnt: {', '.join(TASKS)}")
    if values["preset"] not in ("default", "paper"):
        raise InputError(f"--preset {values['preset']}: expected default or paper")
    gpu = resolve_accelerator(values["accelerator"]) == "cuda"
    paper = PAPER_TRAIN if values["preset"] == "paper" else {}
    chosen = paper | common_options(values, gpu) | {name: values[name] for name in OWN if values[name] is not None}
    lr = values["lr"] or LR
    chosen |= _network(values, gpu, chosen)
    trained = chosen["start"] != "scratch"
    encoder_lr = (ENCODER_LR / LR * lr if trained else lr) if values["encoder_lr"] is None else values["encoder_lr"]
    chosen["encoder_lr"] = encoder_lr / lr
    if values["pairs"] is not None:
        chosen["pairs"] = str(values["pairs"].absolute())
    options = TrainLvmOptions(task=values["task"], **chosen)
    batch = values["batch_size"] or (64 if gpu else 16)
    training = train_values(
        values, gpu, batch_size=batch, lr=lr, ema=values["ema"], grad_clip=1.0, weight_decay=0.05, betas=(0.9, 0.99)
    )
    epochs, every = lengths(values, 1_000_000 if gpu else 60_000, batch)
    return options, TrainOptions(epochs=epochs, **training), every


def _network(values: dict[str, Any], gpu: bool, chosen: dict[str, Any]) -> dict[str, Any]:
    """Kind and spec of the network, and where its weights come from."""
    from cryosuite.errors import InputError, notice
    from cryosuite.methods.lvm_options import net_spec, size_name
    from cryosuite.methods.lvm_start import find_start

    start = find_start(values["init"], values["weights"])
    if start is None:
        if values["frozen"]:
            raise InputError("--frozen needs --init: an encoder with random weights must learn")
        net = values["net"] or "scunet"
        size = values["size"] or ("default" if gpu else "small")
        return {"net": net, "spec": net_spec(net, size, values["drop_path"]), "start": "scratch"}
    if values["net"] not in (None, start.net):
        raise InputError(f"--net {values['net']}: {start.path} holds a {size_name(start.net, start.spec)}")
    if values["size"] is not None:
        wanted = net_spec(start.net, values["size"])
        if {**wanted, "drop_path": 0} != {**start.spec, "drop_path": 0}:
            raise InputError(
                f"--size {values['size']}: {start.path} holds a {size_name(start.net, start.spec)}; leave --size out"
            )
    spec = dict(start.spec)
    if values["drop_path"] is not None:
        net_spec(start.net, "small", values["drop_path"])  # is it one?
        spec["drop_path"] = values["drop_path"]
    norm = chosen.get("norm") or start.norm or "robust"
    if start.norm is not None and norm != start.norm:
        notice(f"{start.path} was trained on grey values by --norm {start.norm}; it is going to see {norm} now")
    spectrum = chosen.get("spectrum") or ("as-is" if values["task"] == "wedge" else start.spectrum or "matched")
    if start.spectrum is not None and spectrum != start.spectrum:
        notice(f"{start.path} was trained on amplitudes {start.spectrum}; it is going to see them {spectrum} now")
    frozen = (FROZEN if start.pretrained else 0.0) if values["frozen"] is None else values["frozen"]
    return {
        "net": start.net, "spec": spec, "start": start.path, "pretrained": start.pretrained, "norm": norm,
        "spectrum": spectrum, "frozen": frozen,
    }  # fmt: skip


def _report(run: Any, options: Any, result: Any) -> None:
    """How good it is, where it lies and what to do next."""
    from cryosuite.console import say, table
    from cryosuite.methods.lvm_run import EARLY, HEADER, last_scores, score_rows

    scores = last_scores(run, "cc_mask")
    if run.network.is_file() and scores:
        table(f"{result.epochs_done} rounds done", HEADER, score_rows(scores))
        if scores["cc_mask"] <= scores["cc_mask_input"]:
            say("verdict: not better than the map it is given: do not use it; train longer, or raise --lr")
        say(f"weights: {run.network}; card: {run.card}")
    if result.stopped == EARLY:
        say(f"ended early: no better CC for {options.patience} tests; the weights are those of the best")
    elif result.stopped:
        say(f"stopped by {result.stopped}; go on with: cryosuite train-lvm -o {typed(run.path)} --resume")
    if run.network.is_file():
        extra = " --task wedge" if options.task == "wedge" else ""
        say(f"next: cryosuite lvm-sharpen map.mrc --weights {typed(run.network)}{extra} -o out.mrc")
