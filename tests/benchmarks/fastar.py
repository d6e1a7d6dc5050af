"""Poses by fastar-infer: errors per molecule, cost against the number of particles, time to a map beside searches.

    python tests/benchmarks/fastar.py --work DIR [--only quality,scaling,race] [--molecules 1xnr,5gjv,1t6b] [--box 32]
        [--seeds 0] [--images 2000] [--weights FILE] [--peer-epochs 30 [--peer-minutes 45]]

Molecules are of ``$CRYOSUITE_SHARED/data/atomic/bench``, which no network was trained on; the pixel size is such that
a molecule fills its picture as those do that networks are trained on. Images have a CTF and white noise, SNR 0.1
counted at their own box (variance of the whole clean images / variance of the noise).

quality: against the true map low-passed to 20 A: errors as predicted and after refinement, beside chance, symmetry
mates counted as right, and those of a full search against the same map without a network.
scaling: seconds of prediction from 256 to 16,384 particles. race: seconds to a map and its FSC with the truth,
beside cryoDRGN's (``CRYODRGN_VENV``) when --peer-epochs is given.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import CRYOSUITE, RESULTS, peer, save, timed

from cryosuite.data.open import open_particles
from cryosuite.data.results import PosesDir
from cryosuite.data.workdir import WorkDir
from cryosuite.formats.mrc import read_map
from cryosuite.formats.pickles import read_poses, write_pickle
from cryosuite.kernels import shells
from cryosuite.methods.fastar_reference import load_reference
from cryosuite.metrics.align import align_map
from cryosuite.metrics.poses import pose_report
from cryosuite.reconstruct.refine import search_everywhere
from cryosuite.simulate.beads import symmetry_mates
from cryosuite.simulate.sources import find_files, read_structure

MOLECULES = "1xnr,5gjv,1t6b"
FILL = 0.19  # radius of gyration / box
SNR = 0.1
PEER = "cryodrgn abinit_homo_old"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Case:
    """A simulated set of one molecule."""

    molecule: str
    box: int
    images: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.molecule}-d{self.box}-n{self.images}-s{self.seed}"

    def pixel_size(self) -> float:
        """Angstrom, such that the molecule fills its box as far as networks are trained on."""
        structure = read_structure(find_files(self.molecule)[0])
        xyz = structure.centred()
        gyration = float(np.sqrt(np.average((xyz**2).sum(1), weights=structure.weight)))
        reach = float(np.sqrt((xyz**2).sum(1).max()))
        return round(max(gyration / FILL, 2.1 * reach) / self.box, 2)

    def make(self, work: Path) -> Path:
        """The folder, simulated first when it is not there."""
        out = work / "sim" / self.name
        if not (out / "dataset.yaml").exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            options = ["--structures", self.molecule, "--recipe", "homogeneous", "-n", str(self.images)]
            options += ["-D", str(self.box), "--Apix", str(self.pixel_size()), "--snr", str(SNR), "--noise-at", "D"]
            timed([*CRYOSUITE, "simulate", "-o", str(out), *options, "--seed", str(self.seed)], env=ONE_THREAD)
        return out

    def mates(self) -> np.ndarray:
        """Rotations that leave the molecule as it is."""
        return symmetry_mates(read_structure(find_files(self.molecule)[0]))


def infer(source: Path, out: Path, *options: str) -> tuple[PosesDir, dict]:
    """One run of fastar-infer and its CPU and wall seconds (other work on the machine lengthens the latter)."""
    command = [*CRYOSUITE, "fastar-infer", str(source), "-o", str(out), "--overwrite", "--threads", "1", *options]
    timing = timed(command, env=ONE_THREAD)
    return PosesDir(out), {"cpu_s": round(timing.cpu_s, 1), "wall_s": round(timing.wall_s, 1)}


def network(arguments: argparse.Namespace) -> list[str]:
    """The weights to use, as options."""
    return ["--weights", str(arguments.weights)] if arguments.weights else []


def report(out: PosesDir, source: Path, mates: np.ndarray, box: int) -> dict:
    """Errors of a folder's poses against the truth."""
    rotation, shift = read_poses(out.poses)
    truth = read_poses(WorkDir(source).poses)
    score = np.load(out.confidence)[:, 0]
    return rounded(pose_report(rotation, truth[0], shift, truth[1], box, score, mates).plain())


def rounded(value: object) -> object:
    """Numbers with four digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def map_scores(path: Path, source: Path, pixel_size: float, align: bool = False) -> dict:
    """FSC of a map with the truth inside the true mask; ``align``: after the best rotation, shift and hand."""
    truth = torch.from_numpy(read_map(WorkDir(source).volume(0)).data.copy())
    mask = torch.from_numpy(read_map(WorkDir(source).mask).data.copy())
    volume = torch.from_numpy(read_map(path).data.copy())
    volume = align_map(volume, truth).volume if align else volume
    curve = shells.fsc(volume, truth, mask)
    half = shells.resolution(curve, 0.5, truth.shape[-1], pixel_size)
    return {
        "fsc_0.5_A": half, "nyquist_A": 2 * pixel_size, "in_nyquist": half / (2 * pixel_size),
        "auc_normalised": float(shells.auc(curve, truth.shape[-1])) / ((truth.shape[-1] / 2 - 1) / truth.shape[-1]),
    }  # fmt: skip


def global_search(source: Path, mates: np.ndarray) -> dict:
    """Every particle searched for over all of SO(3) against the same low-passed map, without a network."""
    particles, began = open_particles(source), time.process_time()
    reference = load_reference(particles.box_size, float(particles.pixel_size[0]), WorkDir(source).volume(0))
    rotation, shift, _ = search_everywhere(particles, np.arange(len(particles)), reference.volume)
    seconds = time.process_time() - began
    truth = particles.rotation, particles.shift
    errors = pose_report(rotation[:, 0], truth[0], shift, truth[1], particles.box_size, mates=mates)
    return {"cpu_s": round(seconds, 1), "errors": rounded(errors.raw)}


def quality(case: Case, arguments: argparse.Namespace) -> dict:
    """Target mode on one set: predicted, refined, and without a network."""
    source, mates = case.make(arguments.work), case.mates()
    pixel = float(open_particles(source).pixel_size[0])
    known = ["--map", str(WorkDir(source).volume(0)), *network(arguments)]
    record: dict = {"molecule": case.molecule, "box": case.box, "images": case.images, "seed": case.seed}
    record |= {"pixel_size": pixel, "mates": len(mates), "snr_at_box": SNR}
    for name, rounds in (("predicted", 0), ("refined", arguments.rounds)):
        folder = arguments.work / f"{case.name}-{name}"
        out, costs = infer(source, folder, *known, "--refine", str(rounds), *arguments.options)
        timing = json.loads(out.timing.read_text())
        record[name] = {
            **costs, "errors": report(out, source, mates, case.box), "timing": timing,
            "map": rounded(map_scores(out.map, source, pixel)),
        }  # fmt: skip
    record["search_without_network"] = global_search(source, mates)
    return record


def print_quality(record: dict) -> None:
    """One line on screen."""
    one, two = (record[name]["errors"]["raw"] for name in ("predicted", "refined"))
    chance = record["predicted"]["errors"]["chance_raw"]["median_deg"]
    print(
        f"{record['molecule']} D={record['box']}: {one['median_deg']:.1f} deg, {one['under_20_deg']:.0%} < 20 "
        f"(chance {chance:.0f}) -> {two['median_deg']:.2f} deg, shift {two['shift_median_px']:.2f} px, map "
        f"{record['refined']['map']['in_nyquist']:.2f} x Nyquist; search {record['search_without_network']}",
        flush=True,
    )


def scaling(arguments: argparse.Namespace) -> dict:
    """Seconds of prediction against the number of particles; one set, its first n."""
    case = Case(arguments.molecules.split(",")[-1], arguments.box, arguments.largest, 0)
    source, rows = case.make(arguments.work), []
    known = ["--map", str(WorkDir(source).volume(0)), *network(arguments), "--refine", "0"]
    count = 256
    while count <= arguments.largest:
        index = arguments.work / f"first{count}.pkl"
        write_pickle(index, np.arange(count))
        out, costs = infer(source, arguments.work / f"scaling{count}", *known, "--ind", str(index))
        timing = json.loads(out.timing.read_text())
        predicting = sum(timing.get(key, 0.0) for key in ("load", "encode", "decode", "Kabsch", "grid"))
        rows.append({
            "particles": count, "predict_s": round(predicting, 3), "templates_s": timing["templates"],
            "ms_per_image": round(1000 * predicting / count, 3), "images_per_s": round(count / predicting, 1), **costs,
            "total_s": timing["total"],
        })  # fmt: skip
        print(rows[-1], flush=True)
        count *= 4
    return {"seed": case.seed, "molecule": case.molecule, "box": case.box, "rows": rows}


def race(case: Case, arguments: argparse.Namespace, before: Path) -> dict:
    """Wall seconds to a map, and what that map is worth, by each way; a peer's of before where it is not run again."""
    source = case.make(arguments.work)
    pixel = float(open_particles(source).pixel_size[0])
    ways = {
        "fastar-infer, known map": ["--map", str(WorkDir(source).volume(0)), "--refine", str(arguments.rounds)],
        "fastar-infer, nothing known": ["--refine", str(arguments.rounds)],
    }
    record: dict = {"molecule": case.molecule, "box": case.box, "images": case.images, "seed": case.seed, "ways": {}}
    for name, options in ways.items():
        folder = arguments.work / f"{case.name}-race{len(record['ways'])}"
        out, costs = infer(source, folder, *options, *network(arguments))
        scores = map_scores(out.map, source, pixel, align="nothing" in name)
        record["ways"][name] = {**costs, **rounded(scores)}
        print(name, record["ways"][name], flush=True)
    program = peer("cryodrgn", "", os.path.join(os.environ.get("CRYODRGN_VENV", "/nonexistent"), "bin", "cryodrgn"))
    if program and arguments.peer_epochs:
        record["ways"][PEER] = abinit_homo(program, source, pixel, case, arguments)
    elif before.exists():  # what a peer needed does not change with what we need
        found = json.loads(before.read_text())
        record["ways"] |= {PEER: {"command": found["command"], **found["ways"][PEER]}} if PEER in found["ways"] else {}
    return record


def abinit_homo(program: str, source: Path, pixel: float, case: Case, arguments: argparse.Namespace) -> dict:
    """cryoDRGN's homogeneous ab initio reconstruction, so many epochs of it, or what it has after so many minutes."""
    out = arguments.work / f"{case.name}-cryodrgn"
    options = ["--ctf", str(WorkDir(source).ctf), "--uninvert-data", "-n", str(arguments.peer_epochs), "--seed", "0"]
    options += ["--no-amp"]  # half precision is for GPUs
    command = [program, "abinit_homo_old", str(WorkDir(source).particles), *options, "-o", str(out)]
    timing = timed(command, env=ONE_THREAD, limit_s=60 * arguments.peer_minutes)
    maps = sorted(out.glob("reconstruct*.mrc"), key=lambda path: path.stat().st_mtime)
    scores = map_scores(maps[-1], source, pixel, align=True) if maps else {}
    costs = {"cpu_s": round(timing.cpu_s, 1), "wall_s": round(timing.wall_s, 1)}
    found = {**costs, "epochs": arguments.peer_epochs, "ended": timing.ended, **rounded(scores)}
    print("cryodrgn", found, flush=True)
    return found


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="quality,scaling,race")
    parser.add_argument("--molecules", default=MOLECULES)
    parser.add_argument("--box", type=int, default=32)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=16384)
    parser.add_argument("--peer-epochs", type=int, default=0, help="of cryoDRGN ($CRYODRGN_VENV); 0: leave it out")
    parser.add_argument("--peer-minutes", type=float, default=0, help="then cryoDRGN is stopped; 0: at its end")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("options", nargs="*", help="after --: more options of fastar-infer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    molecules, chosen = arguments.molecules.split(","), arguments.only.split(",")
    for seed in map(int, arguments.seeds.split(",")):
        for molecule in molecules:
            case = Case(molecule, arguments.box, arguments.images, seed)
            if "quality" in chosen:
                record = quality(case, arguments)
                print_quality(record)
                save(f"fastar_quality_{molecule}_d{case.box}_s{seed}", record)
        if "race" in chosen:
            case = Case(molecules[0], arguments.box, arguments.images, seed)
            name = f"fastar_race_{case.molecule}_d{case.box}_s{seed}"
            save(name, race(case, arguments, RESULTS / f"{name}.json"))
    if "scaling" in chosen:
        save(f"fastar_scaling_d{arguments.box}", scaling(arguments))


if __name__ == "__main__":
    main()
