"""What proof.py found: a short table for the README, all of it as Markdown (with the spread over seeds), CSV (every
seed) and pictures."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from sets import FAMILIES
from tables_maps import grouped, markdown, spread

from cryosuite.metrics.truth import gain

METHODS = {
    "consensus": "consensus, one map for all",
    "labels": "true labels backprojected",
    "hype": "train-hype",
    "kraqen": "train-kraqen",
    "deco": "deco-classify",
    "cryodrgn": "cryoDRGN train_vae",
}
KINDS = {"phantom4": "quick, 4 phantoms"} | {
    f"{before}{kind}": f"mini-{kind}{after}"
    for kind in ("mix16", "mix100", "ribo16", "igg50")
    for before, after in (("", ""), ("phantom-", " (phantoms)"))
}
MAPS = ("bare", "polished")
IDENTITY = ("suite", "set", "kind", "seed", "images", "box", "snr", "snr_at_box", "states", "method", "maps")
# column of the CSV -> title in Markdown, digits
COLUMNS: dict[str, tuple[str, int]] = {
    "auc_masked": ("AUC per image, masked", 3),
    "auc_unmasked": ("unmasked", 3),
    "auc_masked_normalised": ("masked, normalised", 3),
    "class_auc_masked": ("AUC per class, masked", 3),
    "class_auc_unmasked": ("unmasked", 3),
    "gain_masked": ("gain, masked", 2),
    "resolution_masked_0.5_A": ("FSC .5, A", 1),
    "chamfer_A": ("Chamfer, A", 2),
    "viou": ("vIoU", 2),
    "kmeans_ari": ("ARI k-means", 2),
    "gmm_ari": ("ARI GMM", 2),
    "kmeans_ami": ("AMI k-means", 2),
    "gmm_ami": ("AMI GMM", 2),
    "labels_ari": ("ARI, own classes", 2),
    "knn10_accuracy": ("10-NN", 2),
    "cpu_min": ("CPU min", 1),
    "rss_gib": ("GiB", 1),
}
# of the short table: column of the CSV -> title; those of SHORT_PAIRS for bare and for polished maps
SHORT_PAIRS = {"auc_masked": "AUC per image", "gain_masked": "gain", "viou": "vIoU"}
SHORT = {
    "kmeans_ari": "ARI k-means", "labels_ari": "ARI, own classes", "knn10_accuracy": "10-NN", "cpu_min": "CPU min",
    "rss_gib": "GiB",
}  # fmt: skip
# in the CSV alone
MORE = (
    "auc_unmasked_normalised", "class_auc_masked_normalised", "class_auc_unmasked_normalised", "gain_unmasked",
    "gain_to_label_backprojection_masked", "gain_to_label_backprojection_unmasked", "resolution_unmasked_0.5_A",
    "auc_masked_std", "auc_unmasked_std", "wall_min", "continued",
)  # fmt: skip
PER_IMAGE = (
    *(f"auc_{curve}{end}" for curve in ("masked", "unmasked") for end in ("", "_normalised", "_std")),
    "resolution_masked_0.5_A", "resolution_unmasked_0.5_A", "chamfer_A", "viou",
)  # fmt: skip
PER_CLASS = tuple(f"auc_{curve}{end}" for curve in ("masked", "unmasked") for end in ("", "_normalised"))


def flat_rows(found: list[dict]) -> list[dict]:
    """One flat dict per set, seed, method and kind of maps; a value that was not measured is absent."""
    by = {(result["set"], result["seed"], result["method"]): result for result in found}
    return [
        flat_row(result, maps, lambda method, of=result: by.get((of["set"], of["seed"], method)))
        for result in found
        for maps in MAPS
        if maps in result
    ]


def flat_row(result: dict, maps: str, same_set: Callable[[str], dict | None]) -> dict:
    """One of them. same_set: method -> the result of that method on the same images, or None."""
    scores, costs = result[maps], result.get("training", {})
    row = {name: result[name] for name in IDENTITY if name in result} | {"maps": maps}
    row |= {name: scores["per_image"][name] for name in PER_IMAGE if name in scores["per_image"]}
    row |= {
        f"class_{name}": scores["per_conformation"][name] for name in PER_CLASS if name in scores["per_conformation"]
    }
    row |= gains(scores["per_image"], same_set("consensus"), same_set("labels"))
    if maps == "bare":  # polish leaves latents as they are
        row |= result.get("latents", {})
        row |= {"labels_ari": result["own_labels"]["ari"]} if "own_labels" in result else {}
    parts = [costs, scores] if maps == "polished" else [costs or result]
    if any("cpu_s" in part for part in parts):
        row["cpu_min"] = sum(part.get("cpu_s", 0) for part in parts) / 60
    if any("wall_s" in part for part in parts):
        row["wall_min"] = sum(part.get("wall_s", 0) for part in parts) / 60
    if memory := max((part.get("rss_mib", 0) for part in parts), default=0):
        row["rss_gib"] = memory / 1024
    return row | ({"continued": True} if costs.get("continued") else {})


def gains(scores: dict, consensus: dict | None, labels: dict | None) -> dict:
    """Share of the way from the consensus to the polished maps of the true labels, and to the plain ones."""
    out: dict = {}
    for curve in ("masked", "unmasked"):
        name = f"auc_{curve}"
        for title, maps in (("gain", "polished"), ("gain_to_label_backprojection", "bare")):
            if consensus and labels and maps in labels:
                floor, ceiling = consensus["bare"]["per_image"][name], labels[maps]["per_image"][name]
                if ceiling > floor:  # else there is no way to go: SNR 0.01, related states
                    out[f"{title}_{curve}"] = gain(scores[name], floor, ceiling)
    return out


def set_title(row: dict) -> str:
    """What a set is called in tables and pictures."""
    return f"{KINDS.get(row['kind'], row['kind'])}, D = {row['box']}, SNR {row['snr']:g}"


def proof_table(found: list[dict]) -> str:
    """One line per set, method and kind of maps, means and spread over seeds; blank: not measured, "-": not run."""
    rows, lines = flat_rows(found), []
    for of_set in grouped(sorted(rows, key=place), lambda row: row["set"]):
        for method, title in METHODS.items():
            for maps in MAPS[: 1 if method == "consensus" else 2]:
                seeds = [row for row in of_set if (row["method"], row["maps"]) == (method, maps)]
                what = title if method == "consensus" else f"{title}, {maps}"
                lines.append([set_title(of_set[0]), what, *cells(seeds)])
    table = markdown(["set", "method", "seeds", *(title for title, _ in COLUMNS.values())], lines)
    return "\n\n".join([table, notes(found), "\n".join(f"- {line}" for line in commands(found))])


def short_table(found: list[dict]) -> str:
    """One line per set and method that was run, bare -> polished; a set is named in its first line only."""
    rows, lines = flat_rows(found), []
    for of_set in grouped(sorted(rows, key=place), lambda row: row["set"]):
        title = set_title(of_set[0])
        for method, name in METHODS.items():
            bare, polished = ([row for row in of_set if (row["method"], row["maps"]) == (method, m)] for m in MAPS)
            if bare:
                pairs = [" -> ".join(filter(None, (cell(bare, key), cell(polished, key)))) for key in SHORT_PAIRS]
                seeds = ", ".join(str(row["seed"]) for row in bare)
                lines.append([title, name, seeds, *pairs, *(cell(bare, key) for key in SHORT)])
                title = ""
    titles = [f"{title}, bare -> polished" for title in SHORT_PAIRS.values()]
    table = markdown(["set", "method", "seeds", *titles, *SHORT.values()], lines)
    return f"{table}\n\n{notes(found)}"


def place(row: dict) -> tuple:
    """Where a row stands: mini before quick, sets in the order of the suite, little noise first."""
    kinds = list(KINDS)
    return row["suite"], kinds.index(row["kind"]) if row["kind"] in kinds else len(kinds), -row["snr"], row["seed"]


def cells(seeds: list[dict]) -> list[str]:
    """The cells of one line."""
    if not seeds:
        return ["-", *[""] * len(COLUMNS)]
    return [", ".join(str(row["seed"]) for row in seeds), *(cell(seeds, name) for name in COLUMNS)]


def cell(seeds: list[dict], name: str) -> str:
    """Mean and spread of one column over seeds; blank where it was not measured."""
    values = [row[name] for row in seeds if name in row]
    more = "> " if name == "cpu_min" and any("continued" in row for row in seeds) else ""
    return more + spread(values, COLUMNS[name][1]) if values else ""


def notes(found: list[dict]) -> str:
    """Sizes of the sets, and which sets of the suites were not run at all."""
    sizes = dict.fromkeys(
        f"{set_title(one)}: {one['images']:,} images of {one['states']} states, SNR {one['snr_at_box']:.2g} at D"
        for one in sorted(found, key=place)
    )
    text = "; ".join(sizes) + "."
    there = {one["set"].removeprefix("phantom-") for one in found}
    suites = dict.fromkeys(one["suite"] for one in found)
    missing = dict.fromkeys(set_title(vars(one)) for name in suites for one in FAMILIES[name] if one.title not in there)
    return text + (f" Not run yet: {'; '.join(missing)}." if missing else "")


def commands(found: list[dict]) -> list[str]:
    """How the results were made, each command once; a budget and a folder of results change no number."""
    made = [re.sub(r" --(budget-minutes|results) \S+", "", one["command"]) for one in found]
    where = [f"({one['date']}, {one['versions']['machine']})" for one in found]
    return list(dict.fromkeys(f"`{command}` {place}" for command, place in zip(made, where, strict=True)))


def write_tables(found: list[dict], folder: Path) -> None:
    """proof.md and proof.csv, all that was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "proof.md").write_text(proof_table(found) + "\n")
    with (folder / "proof.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*IDENTITY, *COLUMNS, *MORE], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(flat_rows(found), key=place))


def write(found: list[dict], folder: Path) -> None:
    """proof.md, proof.csv and a picture of every set."""
    write_tables(found, folder)
    for of_set in grouped(sorted(flat_rows(found), key=place), lambda row: row["set"]):
        picture(of_set, folder / f"proof_{of_set[0]['set']}.png")
    print(f"wrote {folder / 'proof.md'}, proof.csv and proof_*.png")


def picture(rows: list[dict], path: Path) -> None:
    """Bars of one set: AUC, overlap of shapes, agreement of the latents; the bars' ends span the seeds' deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    panels = ("auc_masked", "viou", "kmeans_ari", "knn10_accuracy")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 4), layout="constrained")
    for axis, name in zip(axes, panels, strict=True):
        for offset, maps, colour in ((-0.2, "bare", "#7f9bb3"), (0.2, "polished", "#d9822b")):
            for x, method in enumerate(methods):
                of = [r[name] for r in rows if (r["method"], r["maps"]) == (method, maps) and name in r]
                if of:
                    axis.bar(
                        x + offset, mean(of), 0.38, yerr=stdev(of) if len(of) > 1 else None, color=colour, capsize=3
                    )
        axis.set_xticks(range(len(methods)), methods, rotation=30)
        axis.set_xlim(-0.6, len(methods) - 0.4)
        axis.set_title(COLUMNS[name][0])
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in ("#7f9bb3", "#d9822b")]
    figure.legend(handles, MAPS, loc="outside right upper")
    seeds = sorted({row["seed"] for row in rows})
    figure.suptitle(f"{set_title(rows[0])}; seeds {', '.join(map(str, seeds))}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
