"""The README's tables of train-kraqen and polish: pure functions from results (lists of dicts) to Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

KIND = {"ribo16": "assembly of 16", "igg24": "loop of 24", "mix16": "mix of 16", "phantom4": "four phantoms"}
FLAW = {
    "": "",
    "coloured": "coloured noise",
    "poses1": "shifts off by .5 pixel, angles by 1 degree",
    "poses3": "shifts off by .5 pixel, angles by 3 degrees",
}
# AUC of IgG-1D in the paper (single seeds); rows as ablation.py names them
PAPER = {
    "full": 0.375,
    "voxels instead of the tri-plane": 0.324,
    "Fourier features instead of the tri-plane": 0.368,
    "Gaussian kernel": 0.353,
    "no kernel": 0.336,
    "no annealing, low T": 0.309,
    "no annealing, high T": 0.339,
    "no triplet": 0.295,
}
MODE = {
    "consensus": "consensus",
    "labels": "backprojection with the true labels",
    "default": "**default: bins of the latent, then the modal filter**",
    "kernel": "kernel: bandwidth chosen in each window and band",
    "best fixed kernel": "kernel of one width, the one that the truth likes best",
    "prior": "prior: the consensus of each half in place of a network's map",
}
METHOD = {"true": "true labels", "kraqen": "train-kraqen", "hype": "train-hype", "cryodrgn": "cryoDRGN train_vae"}


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def spread(values: list[float], digits: int = 3) -> str:
    """Mean, and the standard deviation over seeds when there are several."""
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def results(folder: Path, pattern: str) -> list[dict]:
    """The result files that fit a pattern, in order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def grouped(found: list[dict], key: Callable[[dict], object]) -> list[list[dict]]:
    """Results with the same key together, in the order in which keys first come."""
    groups: dict[object, list[dict]] = {}
    for result in found:
        groups.setdefault(key(result), []).append(result)
    return list(groups.values())


def kraqen_table(found: list[dict]) -> str:
    """One row per set: what train-kraqen found, beside floor, ceiling and Bayes' rule."""
    rows = []
    for seeds in grouped(found, lambda result: (result["set"], result["variant"])):
        one = seeds[0]
        name = f"{one['set'].removesuffix('-noisy')}, D = {one['box']}, {one['images']:,} images, SNR {one['snr']:g}"
        name += f" ({one['snr_at_box']:.2f} at D)" + (f", {one['variant']}" if one["variant"] else "")
        states = one["merged"]["states"]
        rows.append(
            [
                name,
                ", ".join(str(result["seed"]) for result in seeds),
                f"{mean(result['training']['cpu_s'] for result in seeds) / 60:.1f} min",
                spread([result["merged"]["ari"] for result in seeds]),
                spread([result["bayes"]["ari"] for result in seeds]),
                ", ".join(f"{result['merged']['states_found']}" for result in seeds) + f" of {states}",
                ", ".join(f"{result['merged']['classes']}" for result in seeds),
                spread([result["knn10_accuracy"] for result in seeds]),
                spread([result["per_image"]["auc_masked"] for result in seeds]),
                spread([result["floors"]["labels"]["per_image_masked"] for result in seeds]),
                spread([result["floors"]["consensus"]["per_image_masked"] for result in seeds]),
            ]
        )
    columns = ["", "seeds", "CPU time", "ARI after merging", "Bayes ARI", "states found", "codes left"]
    columns += ["10-NN accuracy", "per-image AUC", "label backprojection", "consensus"]
    return markdown(columns, rows)


def losing(seeds: list[dict], row: str, other: str) -> str:
    """States, over all seeds, on which polish is not better: masked / unmasked."""
    counts = [result["rows"][row]["not_better"][other] for result in seeds]
    return f"{sum(c['masked'] for c in counts)} / {sum(c['unmasked'] for c in counts)}"


def pair(scores: list[dict]) -> str:
    """Masked / unmasked AUC, means over seeds."""
    return " / ".join(
        f"{mean(score[f'per_image_{curve}'] for score in scores):.3f}" for curve in ("masked", "unmasked")
    )


def set_title(result: dict) -> str:
    """What a set of the polish tables is."""
    title = f"{KIND.get(result['kind'], result['kind'])}, SNR {result['snr']:g}"
    if result["box"] != 64:
        title += f", D = {result['box']}"
    return title + (f", {FLAW[result['flaw']]}" if result["flaw"] else "")


def polish_table(found: list[dict]) -> str:
    """With the true labels: AUC masked / unmasked of everything that needs no training, and of polish."""
    rows = []
    for seeds in grouped(having(found, "true"), set_title):
        floors = [result["floors"] for result in seeds]
        row = [set_title(seeds[0]), str(len(seeds))]
        row += [pair([floor[name] for floor in floors]) for name in ("consensus", "labels", "labels x mask")]
        row.append(f"**{pair([result['rows']['true']['after']['scores'] for result in seeds])}**")
        states = sum(result["states"] for result in seeds)
        row += [f"{losing(seeds, 'true', other)} of {states}" for other in ("label backprojection", "consensus")]
        rows.append(row)
    columns = ["", "seeds", "consensus", "label backprojection", "the same x its own mask", "polish"]
    return markdown([*columns, "states where polish <= backprojection", "<= consensus"], rows)


def having(found: list[dict], row: str) -> list[dict]:
    """Results that hold a row."""
    return [result for result in found if row in result["rows"]]


def methods_table(found: list[dict]) -> str:
    """Before and after polish for the latents of every method, one line per set and method."""
    rows = []
    for method in list(METHOD)[1:]:
        for seeds in grouped(having(found, method), set_title):
            made = [result["rows"][method] for result in seeds]
            states = sum(result["states"] for result in seeds)
            rows.append(
                [
                    f"{METHOD[method]}, {set_title(seeds[0])}",
                    str(len(seeds)),
                    f"{mean(one['training']['cpu_s'] for one in made) / 60:.1f} min",
                    spread([one["agreement"]["ari"] for one in made], 2),
                    pair([one["before"] for one in made]),
                    f"**{pair([one['after']['scores'] for one in made])}**",
                    pair([result["floors"]["labels"] for result in seeds]),
                    f"{losing(seeds, method, 'before')} of {states}",
                    f"{losing(seeds, method, 'label backprojection')} of {states}",
                ]
            )
    columns = ["latents of", "seeds", "training", "ARI", "before polish", "after polish", "label backprojection"]
    return markdown([*columns, "states where after <= before", "<= label backprojection"], rows)


def modes_table(found: list[dict]) -> str:
    """The modes of polish side by side: AUC masked / unmasked by the error of the latents, means over seeds."""
    by: dict[tuple[str, float | None], list[dict]] = {}
    for row in (row for result in found for row in result["rows"]):
        by.setdefault((row["mode"], row["error"]), []).append(row)
    errors = sorted({error for _, error in by if error is not None})
    rows = []
    for mode in dict.fromkeys(mode for mode, _ in by):
        cells = [MODE.get(mode, mode)]
        for error in errors:
            ones = by.get((mode, error)) or by.get((mode, None), [])
            auc = [spread([one[curve] for one in ones]) for curve in ("masked", "unmasked") if ones]
            cells.append(" / ".join(auc))
        seconds = [one["cpu_s"] for key, ones in by.items() if key[0] == mode for one in ones]
        rows.append([*cells, f"{mean(seconds):.0f} s" if any(seconds) else ""])
    titles = [f"angles off by {error:g} rad" if error else "true angles" for error in errors]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(result["seed"] for result in found))
    return (
        markdown(["mode", *titles, "CPU time"], rows)
        + f"\n\nLoop of 24, D = 64, 2,400 images, SNR {found[0]['snr']:g}; seeds {seeds}."
    )


LIMITS_BOX = 64  # of the sets that train-kraqen's latents were polished of


def limits_table(limits: list[dict], polished: list[dict]) -> str:
    """ARI of train-kraqen beside that of two limits that know the truth, sets with both."""
    found = {
        (set_title(one), one["seed"]): one["rows"]["kraqen"]["agreement"]["ari"] for one in having(polished, "kraqen")
    }
    rows = []
    for seeds in grouped(limits, set_title):
        both = [one for one in seeds if (set_title(one), one["seed"]) in found and one["box"] == LIMITS_BOX]
        if both:
            cells = [set_title(both[0]), ", ".join(str(one["seed"]) for one in both)]
            cells.append(spread([one["bayes"]["ari"] for one in both], 2))
            cells.append(spread([one["from_the_truth"][-1] for one in both], 2))
            rows.append([*cells, f"**{spread([found[set_title(one), one['seed']] for one in both], 2)}**"])
    columns = ["", "seeds", "Bayes ARI, true maps", "begun from the true labels", "train-kraqen, begun from nothing"]
    return markdown(columns, rows)


def shifts_table(found: list[dict]) -> str:
    """Errors of shifts before and after, and the half maps' FSC beside what the true maps say it must be."""
    rows = []
    for seeds in grouped(found, set_title):

        def of(name: str, seeds: list[dict] = seeds) -> str:
            said = [[one["rows"][name]["fsc"][which] for one in seeds] for which in ("half_maps", "by_the_truth")]
            return " / ".join(spread(values) for values in said)

        errors = [spread([one["rows"][name]["error_px"] for one in seeds], 2) for name in ("given", "refined")]
        measured = spread([one["measured_px"] for one in seeds], 2)
        cost = f"{mean(one['cpu_s'] for one in seeds):.0f} s"
        rows.append([set_title(seeds[0]), str(len(seeds)), errors[0], measured, f"**{errors[1]}**", cost,
                     of("given"), f"**{of('refined')}**", of("true")])  # fmt: skip
    columns = ["", "seeds", "error, px", "as measured", "refined", "CPU time", "FSC as given", "refined", "true shifts"]
    return markdown(columns, rows)


def verdict(values: list[float], full: list[float], paper: float) -> str:
    """Whether a row's distance from the full method is that of the paper: same sign and beyond the seeds' spread."""
    if len(values) < 2 or len(full) < 2:
        return "one seed"
    distance = mean(values) - mean(full)
    noise = 2 * ((stdev(values) ** 2 / len(values)) + (stdev(full) ** 2 / len(full))) ** 0.5
    if abs(distance) <= noise:
        return "within noise"
    return "as published" if (distance < 0) == (paper < PAPER["full"]) else "the other way round"


def ablation_table(found: list[dict]) -> str:
    """The paper's rows, and ours, on both sets."""
    sets = list(dict.fromkeys(result["set"] for result in found))
    by: dict[tuple[str, str], list[dict]] = {}
    for result in found:
        by.setdefault((result["row"], result["set"]), []).append(result)
    names = [*PAPER, *dict.fromkeys(result["row"] for result in found if result["row"] not in PAPER)]

    def auc(row: str, name: str) -> list[float]:
        found = by.get((row, name), [])
        if row in PAPER:
            return [result["per_image"]["auc_masked"] for result in found]
        return [result["maps"]["per_image_masked"] for result in found]  # ours ends with maps, not with the network

    rows = []
    for row in names:
        cells = [row, f"{PAPER[row]:.3f}" if row in PAPER else ""]
        for name in sets:
            values = auc(row, name)
            cells.append(spread(values) if values else "")
            judged = values and row in PAPER and row != "full" and auc("full", name)
            cells.append(verdict(values, auc("full", name), PAPER[row]) if judged else "")
            if name != "loop":
                cells.append(spread([r["agreement"]["ari"] for r in by[row, name]], 2) if values else "")
        rows.append(cells)
    columns = ["row", "paper, IgG-1D"]
    for name in sets:
        columns += [f"{name}: AUC", "against full"] + ([f"{name}: ARI"] if name != "loop" else [])
    return markdown(columns, rows)


def kraqen_speed_table(result: dict) -> str:
    """Rates of train-kraqen and polish beside what they are compared with."""
    rows, found = [], result["rows"]
    if one := found.get("network"):
        what = f"train-kraqen, tri-plane, {one['codes']} codes of rank {one['rank']}, D = {one['box']}"
        text = f"{one['kraqen_images_per_s']:.1f} images/s; train-hype, default preset: {one['hype_images_per_s']:.2f}"
        rows.append([what, text, f"**{one['ratio']:.1f}x**"])
    if one := found.get("codes"):
        few, many = one["codes"]
        text = f"{one['seconds'][0]:.2f} s, {one['seconds'][1]:.2f} s per 8 images"
        rows.append([f"the same step with {few} and with {many} codes", text, f"**{one['growth']:.2f}x**"])
    if one := found.get("voxel"):
        rates = ", ".join(
            f"{rate:,} with {codes} codes" for codes, rate in zip(one["codes"], one["visits_per_s"], strict=True)
        )
        what = f"train-kraqen, voxels, D = {one['box']}: image visits per CPU s, scores and insertion"
        rows.append([what, rates, f"**{one['growth']:.1f}x** the time for {one['codes_growth']:.0f}x the codes"])
    for one in found.get("polish", {}).get("sets", []):
        what = f"polish, sums of {found['polish']['classes']} classes, {one['images']:,} images, D = {one['box']}"
        text = f"{one['polish_images_per_s']:,} images/CPU s; one map: {one['backproject_images_per_s']:,}"
        rows.append([what, text, f"**{one['ratio']:.2f}x**"])
    note = f"\n\nOne thread, torch {result['versions']['torch']}, {result['versions']['machine']}; {result['date']}."
    if one := found.get("polish"):
        large = one["sets"][-1]
        note += (
            f" The sums lie in memory that the process keeps; to be given it (D = {large['box']}) costs "
            f"{large['pages_at_once_s']:g} s where the machine has it, {large['pages_after_idling_s']:g} s where this "
            "virtual machine fetches it from its host."
        )
    return markdown(["", "rate", "ratio"], rows) + note
