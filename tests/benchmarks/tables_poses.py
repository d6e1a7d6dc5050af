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
        rows.append([
            "known poses" if family != "abinitio" else "ab initio", " ".join(filter(None, [name, variant])),
            ", ".join(str(run["seed"]) for run in runs), f"{mean(run['cpu_s'] for run in runs) / 60:.1f} min",
            spread([run["ari"] for run in runs]), spread([run["ami"] for run in runs]),
            ", ".join(str(run["classes"]) for run in runs), spread([run["knn"] for run in runs]),
            _per_state(poses), _per_state([row | {"rotation_median_deg": row["chance_deg"]} for row in poses]),
            _per_state([row["true_map"] | {"state": row["state"]} for row in poses]),
        ])  # fmt: skip
    columns = ["poses", "set", "seeds", "CPU time", "ARI", "AMI", "classes found", "10-NN accuracy"]
    columns += ["median pose error of each molecule, deg", "by chance", "searched for in the true maps"]
    return markdown(columns, rows)


def _per_state(poses: list[dict]) -> str:
    """Median errors of each molecule, mean of the runs."""
    states = sorted({row["state"] for row in poses})
    return ", ".join(f"{mean(row['rotation_median_deg'] for row in poses if row['state'] == s):.1f}" for s in states)


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
