"""Quality of the map networks on structures never trained on: sharpen, superres, wedge, and what they must not do.

    CRYOSUITE_SHARED=../shared python tests/benchmarks/lvm.py sharpen superres wedge safety [--weights DIR] [--seeds 3]

Maps are simulated from the structures of ``atomic/bench``: global B-factor 30-250 A^2 (half of them partly sharpened
again), a B-factor field of 0-150 A^2, anisotropy, flat solvent, lipid-like blobs, tight masks, noise of a half-map FSC
that is .143 at the resolution d. Baselines: the map as it is, its best global B-factor found WITH the
model (oracle), and Guinier sharpening without it, both cut at d. The network's map is scored as it is and cut at d: the
calculated map of the correlations is cut at d, so that detail beyond d, true or not, only costs there. Oracles of the
network: its training target, as it is and cut at d. Writes results/lvm-<what>.json.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import save
from lvm_cases import STRUCTURES, Case, Judge, Structure, baselines, cut_at
from lvm_wedge import run_wedge

from cryosuite.data.map_weights import MapWeights, load_map_weights, shipped_map_weights
from cryosuite.errors import InputError, UserNotice
from cryosuite.methods.lvm_sharpen import EnhanceOptions, enhance
from cryosuite.simulate.map_options import PairOptions

BANDS = ((3.0, 4.0), (4.0, 5.0), (5.0, 6.0))  # A; each structure is in another one with another seed
NETWORK = {"ours": "ours", "ours_cut": "ours, cut at d"}
SHARPEN = PairOptions(
    noise=(1.0, 1.0),
    chance_local=1.0,
    local_b=(150.0, 150.0),
    clean=0.0,
    nothing=0.0,
    chance_missing=0.0,
    affine=(0.0, 0.0),
)
SUPERRES = replace(SHARPEN, task="superres", resolution=(6.0, 6.0))
CLEAN = 4  # structures whose clean maps are tried
MADE = "resolution b sharpened anisotropy centre solvent lipid tight source_voxel"


def weights_of(task: str, folder: Path | None) -> MapWeights | None:
    """Shipped weights, or those of a run, FOLDER/<task>/weights.safetensors; None where there are none."""
    try:
        path = shipped_map_weights(task) if folder is None else folder / task / "weights.safetensors"
    except InputError as error:
        print(f"{task}: {error}")
        return None
    return load_map_weights(path) if path.is_file() else None


def answer(weights: MapWeights, case: Case, **options: object) -> np.ndarray:
    """The network's map, grey values 0 .. 1; the resolution is known, as it is of deposited maps."""
    return enhance(case.grid, weights, EnhanceOptions(**{"resolution": case.resolution} | options)).map.data


def described(weights: MapWeights) -> dict:
    """What is worth saying of a network beside its scores."""
    notes = {name: value for name, value in weights.notes.items() if name in ("seed", "images_seen", "command")}
    if "command" in notes:
        notes["command"] = re.sub(r"\S*__main__\.py", "cryosuite", notes["command"])
    return {
        "parameters": sum(p.numel() for p in weights.net.parameters()),
        "norm": weights.norm,
        "spectrum": weights.spectrum,
        **notes,
    }


def sharpen_rows(case: Case, weights: MapWeights, kept: Path | None) -> dict[str, dict[str, float]]:
    """Scores of the input, the baselines, the network and the training target."""
    judge = Judge(case)
    ours = answer(weights, case)
    maps = {"ours": ours, "ours_cut": cut_at(ours, case.grid.voxel[0], case.resolution)}
    if weights.spectrum == "matched":
        maps["ours_estimated"] = answer(weights, case, resolution=None)
    return baselines(judge, kept) | {name: judge.scores(one) for name, one in maps.items()}


def superres_rows(case: Case, weights: MapWeights, sharpen: MapWeights | None, kept: Path | None) -> dict:
    """Scores at the target's resolution of the input, the best B, sharpening only, and super-resolution."""
    judge = Judge(case, SUPERRES.superres_target)
    maps = {} if sharpen is None else {"sharpen": answer(sharpen, case)}
    maps["ours"] = answer(weights, case)
    return baselines(judge, kept) | {name: judge.scores(one) for name, one in maps.items()}


def per_case(
    structures: list[Structure], seeds: int, options: Callable[[int, int], PairOptions], rows: Callable[[Case], dict]
) -> list[dict]:
    """One entry per structure and seed."""
    found = []
    for seed in range(seeds):
        for number, structure in enumerate(structures):
            case = structure.case(options(seed, number), 1000 * seed + number)
            drawn = {name: round(case.truth.drawn[name], 3) for name in MADE.split()}
            found.append({"structure": structure.name, "seed": seed, "drawn": drawn, "rows": rows(case)})
            shown = {n: f"{r['cc_mask']:.3f}/{r['q']:.3f}/{r['fsc']:.2f}" for n, r in found[-1]["rows"].items()}
            print(structure.name, seed, f"{case.resolution:.2f} A", shown, flush=True)
    return found


def banded(seed: int, number: int) -> PairOptions:
    """Every structure in another band of resolutions with another seed."""
    return replace(SHARPEN, resolution=BANDS[(seed + number) % len(BANDS)])


def run_baselines(structures: list[Structure], given: argparse.Namespace) -> None:
    """What needs no network, kept for later."""
    per_case(structures, given.seeds, banded, lambda case: baselines(Judge(case), given.keep))
    per_case(
        structures, given.seeds, lambda seed, number: SUPERRES,
        lambda case: baselines(Judge(case, SUPERRES.superres_target), given.keep),
    )  # fmt: skip


def means(found: list[dict]) -> dict[str, dict[str, float]]:
    """Mean of every score of every row."""
    rows = {name: [one["rows"][name] for one in found] for name in found[0]["rows"]}
    return {
        name: {key: round(float(np.mean([row[key] for row in some])), 4) for key in some[0]}
        for name, some in rows.items()
    }


def beaten(found: list[dict], ours: str, other: str) -> dict[str, float]:
    """Share of maps on which a row is better than another; FSC is better where it is lower."""
    signs = {"cc_box": 1, "cc_mask": 1, "cc_peaks": 1, "q": 1, "fsc": -1}
    return {
        key: round(float(np.mean([sign * (r[ours][key] - r[other][key]) > 0 for r in (o["rows"] for o in found)])), 3)
        for key, sign in signs.items()
    }


def run_sharpen(structures: list[Structure], given: argparse.Namespace) -> None:
    """Degraded maps, and maps that are as good as the target."""
    weights = weights_of("sharpen", given.weights)
    if weights is None:
        return
    found = per_case(structures, given.seeds, banded, lambda case: sharpen_rows(case, weights, given.keep))
    bands = {f"{low:g}-{high:g} A": [o for o in found if low <= o["drawn"]["resolution"] < high] for low, high in BANDS}
    clean = [clean_scores(structure, 3.5 + i % 2, weights) for i, structure in enumerate(structures[:CLEAN])]
    save("lvm-sharpen", {
        "network": described(weights), "structures": [s.name for s in structures], "seeds": given.seeds,
        "means": means(found), "bands": {name: means(some) for name, some in bands.items() if some},
        "beats": {f"{ours}_{other}": beaten(found, ours, other) for ours in NETWORK
                  for other in ("input", "best_b", "guinier")},
        "beats_bands": {name: {ours: beaten(some, ours, "best_b") for ours in NETWORK}
                        for name, some in bands.items() if some},
        "clean": {"maps": clean, "means": means(clean)}, "maps": found,
    })  # fmt: skip


def clean_scores(structure: Structure, resolution: float, weights: MapWeights) -> dict:
    """Scores of a map that is its own target, before and after."""
    case = structure.case(replace(SHARPEN, clean=1.0, resolution=(resolution, resolution)), 7)
    judge = Judge(case)
    rows = {"input": judge.scores(case.grid.data), "ours": judge.scores(answer(weights, case))}
    return {"structure": structure.name, "resolution": resolution, "rows": rows}


def run_superres(structures: list[Structure], given: argparse.Namespace) -> None:
    """Maps of 6 A, scored at 3 A."""
    weights, sharpen = weights_of("superres", given.weights), weights_of("sharpen", given.weights)
    if weights is None:
        return
    found = per_case(
        structures, given.seeds, lambda seed, number: SUPERRES,
        lambda case: superres_rows(case, weights, sharpen, given.keep),
    )  # fmt: skip
    others = [name for name in ("input", "best_b", "sharpen") if name in found[0]["rows"]]
    save("lvm-superres", {
        "network": described(weights), "structures": [s.name for s in structures], "seeds": given.seeds,
        "input_A": 6.0, "target_A": SUPERRES.superres_target, "means": means(found),
        "beats": {f"ours_{other}": beaten(found, "ours", other) for other in others}, "maps": found,
    })  # fmt: skip


def run_safety(structures: list[Structure], given: argparse.Namespace) -> None:
    """What a network must not do; see lvm_safety."""
    from lvm_safety import run_safety as run

    tasks = {task: weights_of(task, given.weights) for task in given.safety.split(",")}
    save("lvm-safety", {
        task: run(structures, weights) | {"network": described(weights)}
        for task, weights in tasks.items() if weights is not None
    })  # fmt: skip


def run_wedge_task(structures: list[Structure], given: argparse.Namespace) -> None:
    """Scenes at 10 A per voxel."""
    weights = weights_of("wedge", given.weights)
    if weights is not None:
        save(
            "lvm-wedge",
            {"network": described(weights), "seeds": given.seeds, **run_wedge(structures, given.seeds, weights)},
        )


RUNS = {
    "baselines": run_baselines,
    "sharpen": run_sharpen,
    "superres": run_superres,
    "wedge": run_wedge_task,
    "safety": run_safety,
}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=list(RUNS))
    parser.add_argument("--weights", type=Path, default=None, help="folder of runs; default: the shipped weights")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--safety", default="sharpen,superres", help="networks that `safety` looks at")
    parser.add_argument("--keep", type=Path, default=None, help="folder for scores that need no network")
    parser.add_argument("--structures", default=",".join(STRUCTURES))
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("CRYOSUITE_SHARED", "../shared")))
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserNotice)
    structures = [Structure(given.shared / "data/atomic/bench", name) for name in given.structures.split(",")]
    for what in given.what:
        RUNS[what](structures, given)


if __name__ == "__main__":
    main()
