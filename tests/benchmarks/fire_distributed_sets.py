"""The small set and the commands of fire_distributed.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forked import together
from hype_toy import blob_particles, blobs
from test_commands_train_fastar import TINY
from test_methods_iev import SMALL
from test_trainings_together import words

from cryosuite.data.encoder_weights import save_encoder
from cryosuite.data.multiview_weights import save_multiview
from cryosuite.formats.mrc import write_map
from cryosuite.formats.pickles import write_pickle
from cryosuite.formats.stacks import StackWriter
from cryosuite.nets.ief import IefEncoder
from cryosuite.nets.multiview import Multiview

TRAININGS = {
    "train-hype": "hype", "train-kraqen": "kraqen", "train-kraqen-voxel": "voxel", "deco-classify": "deco",
    "pretrain-iev": "iev", "train-fastar": "fastar", "train-fastar-star": "fastar-star", "pretrain-lvm": "jepa",
    "train-lvm": "lvm", "train-fastar-real": "fastar-real",
}  # fmt: skip
SEARCHES = {
    "deco-again": ["--refine-poses", "--re-search", 1],
    "deco-network": ["--ab-initio", "--start", "network", "--warmup-images", 40, "--search", "cached"],
    "deco-voxel": ["--ab-initio", "--classes", 1],
}  # fmt: skip
DETAIL = {"train-kraqen": " (network)", "train-kraqen-voxel": " (voxel field)", "train-fastar": " (target)",
          "train-fastar-star": " (ab initio)", "encode": " --encode",
          "train-fastar-real": " --finetune", "fastar-infer-search": " without a map",
          "deco-again": " --refine-poses --re-search 1", "deco-network": " --ab-initio --start network --search cached",
          "deco-voxel": " --ab-initio --classes 1"}  # fmt: skip
COUNT, FEW, BOX = 301, 78, 16  # neither fills its last batch


def shrink() -> None:
    """Networks tinier than the smallest preset, searches of seconds, and chunks of a few images, so that every process
    has some."""
    from cryosuite.data import preprocess
    from cryosuite.methods import deco_start, fastar_infer, fastar_target, fastar_validate, lvm_validate
    from cryosuite.nets import ief
    from cryosuite.nets.multiview import SPECS
    from cryosuite.reconstruct import abinitio

    ief.SPECS["vit_tiny"], SPECS["micro"] = SMALL, TINY
    fastar_validate.GRID, lvm_validate.EACH, fastar_target.FEWEST = 0, 1, 50
    preprocess.CHUNK_BYTES = 4 * 37 * BOX**2
    short = {
        "starts": 2,
        "iterations": 8,
        "batch": 60,
        "settle": 2,
        "radius": (3, 5),
        "rounds": ((5, True), (8, False)),
    }
    fastar_infer.options_for = lambda classes, seed: abinitio.AbInitioOptions(classes, seed=seed, **short)
    deco_start.options_of = lambda options, seed: abinitio.AbInitioOptions(options.classes, seed=seed, **short)
    abinitio.CHUNK = 20


def stack(folder: Path) -> Path:
    """301 images of two molecules with poses, CTF and labels (in ``few`` the first 78 of them), a map, an encoder and a
    pose network that are not trained."""
    import torch

    particles, labels = blob_particles([blobs(BOX, 0), blobs(BOX, 1)], COUNT, noise=0.3)
    for place, count in ((folder, COUNT), (folder / "few", FEW)):
        place.mkdir(parents=True, exist_ok=True)
        with StackWriter(place / "particles.mrcs", count, BOX, 6.0) as writer:
            writer.write(particles.read(np.arange(count)))
        write_pickle(place / "poses.pkl", (particles.rotation[:count], particles.shift[:count]))
        write_pickle(place / "ctf.pkl", particles.ctf[:count])
    write_pickle(folder / "labels.pkl", labels.astype(np.int64))
    write_map(folder / "ref.mrc", blobs(BOX, 0).numpy(), 6.0)
    torch.manual_seed(0)
    save_encoder(folder / "e.safetensors", IefEncoder(SMALL).eval(), "standard", 0.5, 0.15, {})
    save_multiview(folder / "w.safetensors", Multiview(TINY), {"mode": "target"})
    few = folder / "few"
    write_map(few / "ref.mrc", blobs(BOX, 0).numpy(), 6.0)
    posed = ["--poses", few / "poses.pkl", "--ctf", few / "ctf.pkl"]
    (made,) = together(few / "said", ["preprocess", few / "particles.mrcs", *posed, "-o", few / "work"], 1)
    if made.code:
        raise SystemExit(made.err)
    return folder


def commands(folder: Path) -> dict[str, list[object]]:
    """Name -> words, all but the output."""
    images, few = folder / "particles.mrcs", folder / "few"
    posed = [images, "--poses", folder / "poses.pkl", "--ctf", folder / "ctf.pkl"]
    labels, cpu = ["--labels", folder / "labels.pkl"], ["--accelerator", "cpu"]
    found: dict[str, list[object]] = {
        "preprocess": ["preprocess", *posed, "-D", 12, "--uninvert"],
        "backproject": ["backproject", *posed, *labels],
        "polish": ["polish", *posed, *labels],
        "fastar-infer": ["fastar-infer", few / "particles.mrcs", "--ctf", few / "ctf.pkl", "-b", 16, "--refine", 1,
                         "--map", folder / "ref.mrc", "--weights", folder / "w.safetensors", *cpu],
        "encode": ["pretrain-iev", images, "--encode", "--weights", folder / "e.safetensors", "-b", 32, *cpu],
    }  # fmt: skip
    bare = ["fastar-infer", few / "particles.mrcs", "--ctf", few / "ctf.pkl", "-b", 16, "--refine", 1, *cpu]
    found["fastar-infer-search"] = [*bare, "--weights", folder / "w.safetensors"]
    found |= {name: [*words("deco", few), "--log-interval", 1, *more] for name, more in SEARCHES.items()}
    return found | {name: words(short, few) for name, short in TRAININGS.items()}


def blind_second() -> None:
    """From now on the second process cannot read one of the images."""
    from cryosuite.data.particles import ParticleSet
    from cryosuite.errors import InputError
    from cryosuite.ranks import process_rank

    whole = ParticleSet.read

    def read(particles: ParticleSet, rows: np.ndarray) -> np.ndarray:
        if process_rank() == 1 and len(particles) - 10 in rows:
            raise InputError(f"{particles.path}: the file became shorter while it was read")
        return whole(particles, rows)

    ParticleSet.read = read
