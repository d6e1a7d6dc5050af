"""What an encoder is trained on and how its runs are opened: lists of sets, simulated molecules, held-out particles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.processes import ALONE, Processes
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.formats.config import read_yaml
from cryosuite.formats.pickles import read_latent
from cryosuite.methods import LoadedRun
from cryosuite.methods.iev_data import Corpus, PoolSource, Source, StackSource, eight_bits
from cryosuite.methods.iev_options import IevOptions
from cryosuite.nets.ief import SPECS
from cryosuite.simulate.pool import Imaging, PoolOptions, ProjectionPool, expose
from cryosuite.simulate.sources import find_files, load_structures
from cryosuite.simulate.states import State
from cryosuite.training.runs import particles_path

FITS = 0.47  # largest radius of a molecule that is imaged whole, of the field
GUARD_SNR, GUARD_BOX = 0.024, 64  # of the held-out particles: a nominal signal to noise ratio of 0.1
SMALLEST_GUARD = 8  # phantoms made for the guard where nothing else is held out


@dataclass(frozen=True)
class Entry:
    """One particle set of the corpus: weight None counts its images."""

    path: Path
    weight: float | None = None
    datadir: Path | None = None
    pixel_size: float | None = None
    sign: int | None = None


@dataclass(frozen=True)
class SimulateOptions:
    """What is simulated: structures as in ``cryosuite simulate``; molecules kept out; share of all images."""

    structures: str | None = None
    hold_out: str = "8"  # a number, or names separated by commas
    share: float | None = None  # None: all where there are no sets, else a half
    pool: PoolOptions = PoolOptions()
    imaging: Imaging = Imaging()
    seed: int = 0


def list_sets(paths: list[Path]) -> list[Entry]:
    """The sets meant by what the user gave: files, work folders, folders of files, YAML lists.

    A YAML list has entries {path, weight, datadir, pixel_size, sign}; relative paths are relative to the list.
    Raises InputError for what is none of these, or a folder without particles.
    """
    found: list[Entry] = []
    for path in map(Path, paths):
        if path.suffix.lower() in (".yaml", ".yml") and path.name != "dataset.yaml":
            found += _from_list(path)
        elif path.is_dir() and not (path / "dataset.yaml").is_file() and not (path / "config.yaml").is_file():
            inside = sorted(entry for entry in path.iterdir() if _is_set(entry))
            tables = [entry for entry in inside if entry.is_dir() or entry.suffix.lower() in (".star", ".cs")]
            if not inside:
                raise InputError(f"{path}: holds no particle sets (no .star, .cs, .mrcs and no work folders)")
            found += [Entry(entry) for entry in tables or inside]
        else:
            found.append(Entry(path))
    return found


def _is_set(path: Path) -> bool:
    if path.is_dir():
        return (path / "dataset.yaml").is_file()
    return path.suffix.lower() in (".star", ".cs", ".mrcs")


def _from_list(path: Path) -> list[Entry]:
    """Entries of a YAML list of sets."""
    content: Any = read_yaml(path)
    items = content.get("sets") if isinstance(content, dict) else content
    if not isinstance(items, list) or not items:
        raise InputError(f"{path}: expected a mapping with a list `sets:` of {{path, weight, datadir}}")
    entries = []
    for number, item in enumerate(items):
        item = {"path": item} if isinstance(item, str) else item
        known = ("weight", "datadir", "pixel_size", "sign")
        if not isinstance(item, dict) or "path" not in item or set(item) - {"path", *known}:
            raise InputError(f"{path}: set {number} (0-based): expected path and, if wanted, {', '.join(known)}")
        try:
            numbers = {
                key: kind(item[key])
                for key, kind in (("weight", float), ("pixel_size", float), ("sign", int))
                if item.get(key) is not None
            }
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{path}: set {number} (0-based): weight, pixel_size and sign must be numbers") from None
        datadir = None if item.get("datadir") is None else path.parent / str(item["datadir"])
        entries.append(Entry(path.parent / str(item["path"]), datadir=datadir, **numbers))
    return entries


def open_set(entry: Entry) -> ParticleSet:
    """A particle set for training an encoder: poses and CTF are not needed."""
    return open_particles(
        entry.path, datadir=entry.datadir, pixel_size=entry.pixel_size, sign=entry.sign,
        need_poses=False, need_ctf=False, mixed_boxes=True,
    )  # fmt: skip


def molecules(options: SimulateOptions) -> tuple[list[State], list[State]]:
    """(molecules to train on, molecules held out), each as atoms about its centre.

    Those that do not fit the field are left out, with a notice. Raises InputError where nothing is left, or a name that
    is to be held out is unknown.
    """
    rng = np.random.default_rng([options.seed, 2])
    states = [State(s.name, s.centred(), s.weight) for s in load_structures(options.structures, rng)]
    large = [state.name for state in states if state.radius > FITS * options.pool.field]
    if large:
        notice(f"too large for a field of {options.pool.field:g} A, left out: {', '.join(large)}")
    states = [state for state in states if state.name not in large]
    if options.hold_out.strip().isdigit():
        real = [s.name for s in states if not s.name.startswith("phantom")]
        real = real if len(real) > 1 else [s.name for s in states]  # of a lone one among phantoms nothing can be spared
        count = min(int(options.hold_out), len(real) // 2)
        kept = set(np.random.default_rng([options.seed, 3]).permutation(sorted(real))[:count].tolist())
    else:
        kept = {name.strip() for name in options.hold_out.split(",") if name.strip()}
        if unknown := kept - {state.name for state in states}:
            raise InputError(f"--hold-out: not among the molecules: {', '.join(sorted(unknown))}")
    train, held = [s for s in states if s.name not in kept], [s for s in states if s.name in kept]
    if len(train) < 2:
        raise InputError(f"--simulate {options.structures}: at least two molecules must be left to train on")
    return train, held


def make_corpus(
    entries: list[Entry], simulated: SimulateOptions, options: IevOptions, run: RunDir, epoch_images: int,
    cache: bool, device: str, processes: Processes = ALONE,
) -> tuple[Corpus, tuple[Tensor, np.ndarray] | None]:  # fmt: skip
    """The corpus of a run and its held-out particles (images (n, s, s) uint8, labels), made where they are missing.

    ``processes``: of the training; what is made once for all is made by the first.
    """
    size = SPECS[options.size].image_size
    sources: list[Source] = []
    for number, entry in enumerate(entries):
        path = Path(run.path) / f"images.{number}.u8" if cache else None
        # a set that one process cannot read ends all of them: the others would wait for it
        particles = processes.each(lambda entry=entry: open_set(entry))
        sources.append(StackSource(particles, size, options.prep, entry.weight, str(entry.path), path))
    folder, held = Path(run.path), SimulateOptions(f"phantom:{SMALLEST_GUARD}", "0", seed=simulated.seed + 1000)
    if simulated.structures:
        parts = lru_cache(lambda: molecules(simulated))  # read or built once, and only where a pool is missing
        text = _in_words(simulated)
        pool = ProjectionPool(
            folder / "pool.f16", lambda: parts()[0], simulated.pool, device, f"train {text}", processes
        )
        share = simulated.share if simulated.share is not None else (0.5 if sources else 1.0)
        weight = share / max(1 - share, 1e-9) * sum(source.weight for source in sources) if sources else 1.0
        sources.append(PoolSource(pool, size, options.prep, options.positives, simulated.imaging, weight, device))
    if simulated.structures and simulated.hold_out.strip() not in ("", "0"):
        labelled = (lambda: _tested_on(parts()[1], held), f"held out of {text}")
    else:
        labelled = (lambda: molecules(held)[0], _in_words(held))
    corpus = Corpus(sources, epoch_images, size)
    held_out = held_out_particles(
        *labelled, size, options.prep, folder / "heldout.f16", simulated.pool, processes=processes
    )
    return corpus, held_out


def _tested_on(kept: list[State], phantoms: SimulateOptions) -> list[State]:
    """The molecules held out; beside a lone one, whose neighbours could be of no other, phantoms."""
    if len(kept) > 1:
        return kept
    alone = f"{kept[0].name} alone is held out" if kept else "no molecule is held out"
    notice(f"{alone}: {SMALLEST_GUARD} made-up molecules are tested on too, to tell it from")
    return kept + molecules(phantoms)[0]


def _in_words(options: SimulateOptions) -> str:
    """What ``molecules`` depends on, with the sizes of the files."""
    files = [f"{path.name} {path.stat().st_size}" for path in find_files(options.structures)]
    return f"{options.structures}; {', '.join(files)}; without {options.hold_out}; seed {options.seed}"


def held_out_particles(
    states: list[State] | Callable[[], list[State]],
    source: str,
    size: int,
    prep: str,
    path: Path,
    pool: PoolOptions,
    box: int = GUARD_BOX,
    snr: float = GUARD_SNR,
    seed: int = 0,
    processes: Processes = ALONE,
) -> tuple[Tensor, np.ndarray]:
    """Labelled particles of molecules that are not trained on: (images (n, s, s) uint8, labels (n,)).

    ``states``, ``source``: as ``ProjectionPool`` takes them. snr at 128 pixels; box in pixels.
    """
    made = ProjectionPool(path, states, replace(pool, seed=pool.seed + 1), source=source, processes=processes)
    generator = torch.Generator().manual_seed(seed)
    imaging = Imaging(snr=(snr, snr), boxes=(box,), magnify=(1.0, 1.0))
    parts = []
    for start in range(0, len(made), 64):
        clean = torch.from_numpy(np.array(made.images[start : start + 64]))
        parts.append(eight_bits(expose(clean, pool.field, imaging, box, generator), size, prep))
    return torch.cat(parts), made.labels


def plain_sets(entries: list[Entry], datadir: Path | None, pixel_size: float | None, sign: int | None) -> list[dict]:
    """The sets for config.yaml: absolute paths; what the user gave for all fills in what an entry does not say."""
    return [
        {
            "path": str(entry.path.absolute()),
            "weight": entry.weight,
            "datadir": _absolute(entry.datadir or datadir),
            "pixel_size": entry.pixel_size or pixel_size,
            "sign": entry.sign or sign,
        }
        for entry in entries
    ]


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def sets_from(values: list[dict[str, Any]]) -> list[Entry]:
    """The sets of a config.yaml."""
    return [
        Entry(Path(v["path"]), v["weight"], Path(v["datadir"]) if v["datadir"] else None, v["pixel_size"], v["sign"])
        for v in values
    ]


def describe_simulated(values: dict[str, Any]) -> dict[str, Any]:
    """From the command's values to what config.yaml says of the simulation.

    Raises InputError for ranges and boxes that make no sense.
    """
    try:
        low, high = (float(part) for part in str(values["snr"]).split(":"))
        boxes = tuple(int(part) for part in str(values["boxes"]).split(","))
    except ValueError:
        raise InputError(
            f"--snr {values['snr']}, --boxes {values['boxes']}: expected such as 0.003:0.2 and 32,64"
        ) from None
    if not 0 < low <= high or any(box < 16 or box % 2 for box in boxes):
        raise InputError(f"--snr {values['snr']}, --boxes {values['boxes']}: above 0, from:to; even boxes from 16 on")
    share, views = values["share"], values["views"]
    if share is not None and not 0 < share <= 1:
        raise InputError(f"--share {share}: expected above 0 and at most 1")
    if views < 2 or not values["field"] > 0:
        raise InputError("--views: expected 2 or more; --field: above 0 Angstrom")
    return {
        "structures": values["simulate"], "hold_out": values["hold_out"], "share": share, "views": views,
        "field": values["field"], "snr": [low, high], "boxes": list(boxes), "seed": values["seed"],
    }  # fmt: skip


def simulated_from(values: dict[str, Any]) -> SimulateOptions:
    """The simulation of a config.yaml."""
    return SimulateOptions(
        values["structures"], str(values["hold_out"]), values["share"],
        PoolOptions(int(values["views"]), field=float(values["field"]), seed=int(values["seed"])),
        Imaging(snr=tuple(values["snr"]), boxes=tuple(values["boxes"])), int(values["seed"]),
    )  # fmt: skip


def load(run: RunDir, config: dict[str, Any], epoch: int) -> LoadedRun:
    """Open the features of ``pretrain-iev --encode`` for analyze: latents without volumes.

    Raises InputError for a run that trained an encoder: it has no features yet.
    """
    particles = open_particles(
        particles_path(config, run), need_poses=False, need_ctf=False, mixed_boxes=True,
        **{name: config.get(name) for name in ("ind", "datadir", "pixel_size", "sign")},
    )  # fmt: skip
    z = read_latent(run.z(epoch), finite=False)[0]
    if len(z) != len(particles):
        raise InputError(f"{run.z(epoch)}: {len(z)} features for {len(particles)} particles: did the set change?")

    pixel_size = float(np.median(particles.pixel_size))
    return LoadedRun("iev", particles, z, epoch, pixel_size, particles.box_size, None, config)
