"""The README tables of deco-classify and the pose search: from results (lists of dicts) to Markdown."""

from __future__ import annotations

import re
from statistics import mean

from tables_maps import markdown, spread


def deco_table(found: list[dict]) -> str:
    """A row per set and way (known poses, ab initio), over seeds."""
    by: dict[tuple[str, str, str], list[dict]] = {}
    for result in found:
        name = re.sub(r"-s\d+$", "", result["set"])
        by.setdefault((result["family"], name, result.get("variant", "")), []).append(result)
    rows = []
    for (family, name, variant), runs in sorted(by.items(), reverse=True):
        poses = [row for run in runs for row in run.get("poses", [])]
        several = len({row["state"] for row in poses}) != 1  # else there is nothing to classify
        rows.append([
            "known poses" if family != "abinitio" else "ab initio", " ".join(filter(None, [name, variant])),
            ", ".join(str(run["seed"]) for run in runs), f"{mean(run['cpu_s'] for run in runs) / 60:.1f} min",
            *(spread([run[score] for run in runs]) if several else "" for score in ("ari", "ami")),
            ", ".join(str(run["classes"]) for run in runs), spread([run["knn"] for run in runs]) if several else "",
            _each_run(poses), _mean([(row["state"], row["chance_deg"]) for row in poses]),
            _mean([(row["state"], row["true_map"]["rotation_median_deg"]) for row in poses]),
        ])  # fmt: skip
    columns = ["poses", "set", "seeds", "CPU time", "ARI", "AMI", "classes found", "10-NN accuracy"]
    columns += ["median pose error of each molecule, deg", "by chance", "searched for in the true maps"]
    return markdown(columns, rows)


def _each_run(poses: list[dict]) -> str:
    """Median error of each molecule: that of every run in turn, since some end right and some wrong."""
    errors: dict[int, list[str]] = {}
    for row in poses:
        errors.setdefault(row["state"], []).append(f"{row['rotation_median_deg']:.1f}")
    return ", ".join(" / ".join(errors[state]) for state in sorted(errors))


def _mean(errors: list[tuple[int, float]]) -> str:
    """(molecule, degrees) of many runs: the mean of each molecule."""
    states = sorted({state for state, _ in errors})
    return ", ".join(f"{mean(error for at, error in errors if at == state):.1f}" for state in states)


ENCODERS = {
    "all": "all of it trained along", "last-3": "its last 3 blocks", "head": "only the projection to z",
    "none": "nothing of it", "random": "all of it, begun at random",
}  # fmt: skip


def encoder_table(found: list[dict]) -> str:
    """What fine-tuning the encoder and the length of the latent change, on one set with known poses."""
    by: dict[tuple[str, str], list[dict]] = {}
    for result in found:
        by.setdefault((result["family"], result["variant"]), []).append(result)
    rows = []
    for (family, variant), runs in sorted(by.items(), key=lambda item: (item[0][0], _order(item[0][1]))):
        what = f"encoder: {ENCODERS[variant]}" if family == "finetune" else f"length of z: {variant[1:]}"
        rows.append([
            what, ", ".join(str(run["seed"]) for run in runs), f"{mean(run['cpu_s'] for run in runs) / 60:.1f} min",
            *(spread([run[score] for run in runs]) for score in ("ari", "ami", "kmeans_ari", "knn")),
            ", ".join(str(run["classes"]) for run in runs),
        ])  # fmt: skip
    columns = ["", "seeds", "CPU time", "ARI", "AMI", "ARI of k-means with the true number", "10-NN accuracy"]
    sets = sorted({re.sub(r"-s\d+$", "", run["set"]) for run in found})
    return markdown([*columns, "classes found"], rows) + f"\n\nSet: {', '.join(sets)}; known poses."


def _order(variant: str) -> tuple[int, int]:
    """Lengths by size, the others in the order of ENCODERS."""
    return (1, int(variant[1:])) if variant[1:].isdigit() else (0, list(ENCODERS).index(variant))


def search_table(result: dict) -> str:
    """Rate and error of the pose search beside the published procedure, on the same images."""
    rows = []
    for name, one in result.items():
        if not isinstance(one, dict) or "times_faster" not in one:
            continue
        plain, ours = one["published"], one["cryosuite"]
        rows.append([
            name, f"{plain['images']}", f"{ours['images_per_s']:.0f} images/s, {ours['median_deg']:.2f} deg",
            f"{plain['images_per_s']:.1f} images/s, {plain['median_deg']:.2f} deg", f"**{one['times_faster']:.0f}x**",
        ])  # fmt: skip
    note = f"\n\nOne thread, torch {result['versions']['torch']}, {result['versions']['machine']}; {result['date']}."
    return markdown(["set", "images", "cryosuite, median error", "published procedure, plain", "ratio"], rows) + note
