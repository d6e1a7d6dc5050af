"""Every command with a seed on a few small images, run twice in one process and compared bit for bit."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SEED = 3
HYPE = ["--dim", "16", "--depth", "1", "--heads", "2", "--patch", "4", "--groups", "2", "--inr-dim", "16",
        "--inr-layers", "2", "--knn", "4"]  # fmt: skip
DECO = ["--encoder", "random", "--encoder-size", "micro", "--zdim", "4", "--dim", "32", "--layers", "1",
        "--features", "16", "-k", "2"]  # fmt: skip
LVM = ["--structures", "phantom:3", "--hold-out", "1", "--size", "micro", "--crop", "24", "--volume", "32",
       "--crops-per-volume", "4", "--mix", "2", "--images", "8", "--every", "8", "-b", "4",
       "--accelerator", "cpu"]  # fmt: skip
BATCHES = ["--images", "32", "--every", "32", "-b", "16", "--accelerator", "cpu"]

# command -> (its words, the file or folder it makes); later ones start from what earlier ones made
COMMANDS: dict[str, tuple[list[str], str]] = {
    "simulate": (["-o", "sim", "-n", "48", "-D", "32", "--seed", str(SEED)], "sim"),
    "preprocess": (["sim/particles.star", "-o", "work", "-D", "24"], "work"),
    "backproject": (["sim", "-o", "maps"], "maps"),
    "train-hype": (["sim", "-o", "hype", "-n", "2", "-b", "16", "--precision", "32", *HYPE, "--seed", str(SEED)],
                   "hype"),
    "select": (["hype", "--random", "9", "--seed", str(SEED), "-o", "some.pkl"], "some.pkl"),
    "analyze": (["hype", "--ksample", "3", "--gmm", "2", "--pc", "1", "--n-per-pc", "2", "--no-report", "--seed",
                 str(SEED)], "hype/analyze.2"),
    "trajectory": (["hype", "--from", "0", "--to", "9", "-n", "2", "--no-movie", "--seed", str(SEED)],
                   "hype/analyze.2/trajectories"),
    "landscape": (["hype", "-N", "8", "-M", "2", "--seed", str(SEED)], "hype/analyze.2/landscape"),
    "polish": (["hype", "-o", "polished", "-k", "2", "--passes", "1", "--threads", "1"], "polished"),
    "train-kraqen": (["sim", "-o", "kraqen", "--n-codes", "3", "-i", "3", "--threads", "1", "--seed", str(SEED)],
                     "kraqen"),
    "deco-classify": (["sim", "-o", "deco", *DECO, "-n", "1", "-b", "16", "--threads", "1", "--precision", "32",
                       "--seed", str(SEED)], "deco"),
    "pretrain-iev": (["sim/particles.mrcs", "--Apix", "2", "-o", "iev", "--preset", "tiny", "--views", "4", *BATCHES,
                      "--seed", str(SEED)], "iev"),
    "train-fastar": (["-o", "fastar", "--preset", "micro", "--views", "8", *BATCHES, "--seed", str(SEED)], "fastar"),
    "fastar-infer": (["sim/particles.star", "-o", "posed", "--map", "sim/volumes/vol_000.mrc", "--weights",
                      "fastar/weights.safetensors", "--threads", "1"], "posed"),
    "pretrain-lvm": (["-o", "lvm0", *LVM, "--seed", str(SEED)], "lvm0"),
    "train-lvm": (["-o", "lvm", "--task", "sharpen", *LVM, "--seed", str(SEED)], "lvm"),
    "lvm-sharpen": (["sim/volumes/vol_000.mrc", "-o", "sharp.mrc", "--weights", "lvm", "--apix", "2"],
                    "sharp.mrc"),
}  # fmt: skip


def small_networks(patch: pytest.MonkeyPatch) -> None:
    """Networks of a size for tests under the names of the presets."""
    from cryosuite.nets import ief, multiview

    small = multiview.MultiviewSpec(32, 8, 32, 1, 2, 32, 1, 2, match_dim=32)
    patch.setitem(multiview.SPECS, "micro", small)
    encoder = ief.IefSpec("vit_tiny", dim=32, depth=2, heads=2, patch=14, image_size=56, norm2="ln")
    patch.setitem(ief.SPECS, "vit_tiny", encoder)


def run_twice(name: str, call: Callable[[list[str]], object]) -> list[str]:
    """Run a command twice in the present folder; the names of files that differ."""
    words, made = COMMANDS[name]
    out, kept = Path(made), Path("first") / made
    for aside in (kept, Path("before") / made):
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
    call([name, *words])
    first = contents(out)
    out.rename(kept)
    call([name, *words])
    second = contents(out)
    if not first or first.keys() != second.keys():
        return sorted(first.keys() ^ second.keys()) or ["nothing was written"]
    return [entry for entry in first if first[entry] != second[entry]]


def contents(made: Path) -> dict[str, str]:
    """What the files of a folder (or one file) say, by name; times, rates and pictures left out."""
    files = [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.is_file())
    found = {}
    for path in files:
        said = _said(path)
        if said is not None:
            found[str(path.relative_to(made.parent))] = hashlib.sha1(said).hexdigest()
    return found


def _said(path: Path) -> bytes | None:
    data, kind = path.read_bytes(), path.suffix
    if kind in (".mrc", ".mrcs"):
        return data[:220] + data[1024:]  # labels of maps hold the time
    if kind == ".safetensors":
        return data[8 + struct.unpack("<Q", data[:8])[0] :]
    if path.name == "metrics.jsonl":
        timed = ("rate", "per_s", "_s", "seconds", "eta", "memory", "gib")
        lines = [json.loads(line) for line in data.decode().splitlines()]
        return json.dumps([
            {key: value for key, value in line.items() if not any(part in key for part in timed)} for line in lines
        ]).encode()  # fmt: skip
    if path.name.startswith("weights.") and kind == ".pkl":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return b"".join(archive.read(one) for one in archive.namelist() if "/data/" in one)
    if kind in (".star", ".cs", ".csv", ".txt") or (kind == ".pkl" and _plain_pickle(data)):
        return data
    if kind == ".npz":
        with np.load(io.BytesIO(data)) as arrays:
            return b"".join(arrays[name].tobytes() for name in sorted(arrays.files))
    return None


def _plain_pickle(data: bytes) -> bool:
    return data[:1] == pickle.PROTO
