"""Write the README's tables from the JSON files under results/: python tests/benchmarks/tables.py"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean

from common import RESULTS
from tables_fastar import abinitio_table, quality_table, race_table, scaling_table
from tables_fire import fire_table
from tables_lvm import lvm_table
from tables_maps import (
    ablation_table,
    kraqen_speed_table,
    kraqen_table,
    limits_table,
    markdown,
    methods_table,
    modes_table,
    polish_table,
    results,
    shifts_table,
    spread,
)
from tables_poses import deco_table, encoder_table, search_table
from tables_proof import short_table, write_tables
from tables_speed import ratios_table

README = Path(__file__).resolve().parents[2] / "README.md"
SPEED = {
    "preprocess": "`preprocess` 128 -> 64, four times the images",
    "backproject64": "`backproject` with half maps and FSC, D = 64",
    "backproject64x4": "the same, four times the images",
    "backproject128": "`backproject` with half maps and FSC, D = 128",
    "fsc": "`eval-fsc`, two maps of 256^3",
    "help": "`cryosuite --help`",
}
MIX_COLUMNS = {
    "ARI k-means": "clustering.kmeans_ari",
    "ARI GMM": "clustering.gmm_ari",
    "10-NN accuracy": "clustering.knn10_accuracy",
    "per-image AUC": "per_image.auc_masked",
    "consensus (floor)": "oracle.consensus_masked",
    "label backprojection (ceiling)": "oracle.label_backprojection_masked",
    "gain": "oracle.gain_masked",
}


def speed_table() -> str:
    """Ours, each peer and the ratios."""
    result = json.loads((RESULTS / "speed.json").read_text())
    rows = []
    for name, title in SPEED.items():
        row = result["rows"].get(name)
        if row is None:
            continue
        rate = f" ({row['images_per_cpu_s']:,} images/CPU s)" if "images_per_cpu_s" in row else ""
        cells = [title, f"{row['cpu_s']:.1f} s{rate}", f"{row['rss_mib']} MiB"]
        for peer in ("cryodrgn", "relion"):
            found = row.get(peer)
            cells.append(f"{found['cpu_s']:.1f} s, {found['rss_mib']} MiB: **{found['ratio']:.1f}x**" if found else "")
        rows.append(cells)
    versions = result["versions"]
    note = f"\n\n{result['images']:,} images, torch {versions['torch']}, {versions['machine']}; {result['date']}."
    return markdown(["", "cryosuite, CPU time", "peak memory", "cryoDRGN", "RELION"], rows) + note


def hype_table() -> str:
    """Training rate against the published evaluation, and time to the loss of cryoDRGN's train_vae."""
    result = json.loads((RESULTS / "hype_published_way.json").read_text())
    steps = [row["variant"] for row in next(iter(result["sizes"].values()))]
    columns = ["change, each on top of those above", *(name.replace("-", ", D = ") for name in result["sizes"])]
    rows = []
    for number, step in enumerate(steps):
        cells = [rows_of[number] for rows_of in result["sizes"].values()]
        rows.append([step, *(f"{cell['images_per_s']:.0f} images/s, {cell['ratio']:.2f}x" for cell in cells)])
    text = markdown(columns, rows)
    path = RESULTS / "hype_vs_vae.json"
    if path.exists():
        vae = json.loads(path.read_text())
        peer = vae["cryodrgn"]
        text += (
            f"\n\ncryoDRGN `train_vae` (decoder {vae['width']} x {vae['depth']}, D = {vae['box']}, {vae['images']:,} "
            f"images, {len(peer['losses'])} epochs) took {peer['cpu_s']:.0f} CPU s to a loss of "
            f"{vae['target_loss']:.4f}; "
        )
        if vae["reached_cpu_s"]:
            text += (
                f"`train-hype` passes it after {vae['reached_cpu_s']:.0f} CPU s ({vae['time_fraction']:.0%} of that)."
            )
        else:
            last = vae["hype"]["curve"][-1]
            text += f"`train-hype` did not reach it: {last[1]:.4f} after {last[0]:.0f} CPU s."
    return text


def look_up(scores: dict, key: str) -> float:
    """The number under a dotted key."""
    for part in key.split("."):
        scores = scores[part]
    return float(scores)  # type: ignore[arg-type]


def mix_table() -> str:
    """One row per variant and box: means over seeds."""
    groups: dict[tuple[int, str], list[dict]] = {}
    for path in sorted(RESULTS.glob("mix16_*.json")):
        result = json.loads(path.read_text())
        groups.setdefault((result["box"], result["variant"]), []).append(result)
    rows = []
    for (box, variant), found in sorted(groups.items()):
        seeds = ", ".join(str(result["seed"]) for result in found)
        minutes = mean(result["train_wall_s"] for result in found) / 60
        cells = [f"D = {box}, {variant}", seeds, f"{minutes:.0f} min"]
        for key in MIX_COLUMNS.values():
            cells.append(spread([look_up(result["scores"], key) for result in found]))
        rows.append(cells)
    return markdown(["", "seeds", "training", *MIX_COLUMNS], rows)


def replace(text: str, name: str, table: str) -> str:
    """Put a table between its markers."""
    pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"README.md has no markers for the table {name}")
    return pattern.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def latest() -> dict[str, str]:
    """Name of a table -> its text, for the tables whose results exist."""
    tables: dict[str, str] = {}
    if (RESULTS / "speed.json").exists():
        tables["speed"] = speed_table()
        tables["ratios"] = ratios_table(RESULTS)
    if (RESULTS / "hype_published_way.json").exists():
        tables["hype"] = hype_table()
    if list(RESULTS.glob("mix16_*.json")):
        tables["mix16"] = mix_table()
    if speed := results(RESULTS, "kraqen_speed.json"):
        tables["kraqen-speed"] = kraqen_speed_table(speed[0])
    if search := results(RESULTS, "pose_search_speed.json"):
        tables["pose-search"] = search_table(search[0])
    if scaling := results(RESULTS, "fastar_scaling_*.json"):
        tables["fastar-scaling"] = scaling_table(scaling[0])
    if probe := results(RESULTS, "fastar_abinitio_*.json"):
        tables["fastar-abinitio"] = abinitio_table(probe[0])
    quality = {name: results(RESULTS, f"lvm-{name}.json") for name in ("sharpen", "superres", "wedge", "safety")}
    if any(quality.values()):
        tables["lvm"] = lvm_table({name: found[0] for name, found in quality.items() if found})
    polished = results(RESULTS, "polish_*.json")
    if limits := results(RESULTS, "limits_*.json"):
        tables["limits"] = limits_table(limits, polished)
    for name, found, make in (
        ("kraqen", results(RESULTS, "kraqen_*_s*.json"), kraqen_table),
        ("polish", [one for one in polished if "true" in one["rows"]], polish_table),
        ("methods", [one for one in polished if set(one["rows"]) - {"true"}], methods_table),
        ("modes", results(RESULTS, "modes_*.json"), modes_table),
        ("shifts", results(RESULTS, "shifts_*.json"), shifts_table),
        ("deco", results(RESULTS, "deco_[ak]*_s*.json"), deco_table),
        ("deco-encoder", results(RESULTS, "deco_[fz]*_s*.json"), encoder_table),
        ("fastar-quality", results(RESULTS, "fastar_quality_*.json"), quality_table),
        ("fastar-race", results(RESULTS, "fastar_race_*.json"), race_table),
        ("ablation", results(RESULTS, "ablation_*.json"), ablation_table),
        ("fire", results(RESULTS, "fire_*.json"), fire_table),
        ("proof", results(RESULTS, "proof_*.json"), short_table),
    ):
        if found:
            tables[name] = make(found)
    return tables


def main() -> None:
    """Rewrite README.md with the tables whose results exist; the proof in full lies beside the results."""
    if proof := results(RESULTS, "proof_*.json"):
        write_tables(proof, RESULTS)
    text = README.read_text()
    for name, table in latest().items():
        text = replace(text, name, table)
    README.write_text(text)


if __name__ == "__main__":
    main()
