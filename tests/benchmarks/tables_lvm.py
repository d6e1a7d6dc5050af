"""README tables of the map networks, from results/lvm-*.json (see lvm.py)."""

from __future__ import annotations

from tables_maps import markdown

SCORES = {
    "cc_box": "CC_box", "cc_mask": "CC_mask", "cc_peaks": "CC_peaks", "q": "Q (sigma .4)", "fsc": "map-model FSC .5",
}  # fmt: skip
ROWS = {
    "input": "the map as it is",
    "best_b": "best global B-factor, found with the model (oracle)",
    "guinier": "Guinier sharpening, no model",
    "sharpen": "`--task sharpen` on the same map",
    "ours": "**network**",
    "ours_cut": "**network, cut at d**",
    "target": "what it is trained to give (oracle)",
    "target_cut": "the same, cut at d (oracle)",
}


def _value(key: str, value: float) -> str:
    return f"{value:.2f} A" if key == "fsc" else f"{value:.3f}"


def _means(means: dict[str, dict[str, float]], title: str, names: dict[str, str] = ROWS) -> str:
    rows = [[names[name], *(_value(key, means[name][key]) for key in SCORES)] for name in names if name in means]
    return markdown([title, *SCORES.values()], rows)


def _share(share: dict[str, float]) -> str:
    return f"CC_mask {share['cc_mask']:.0%}, Q {share['q']:.0%}, FSC .5 {share['fsc']:.0%}"


def sharpen_table(result: dict) -> str:
    """Means over all maps, shares of maps won, by resolution, and clean input."""
    count = len(result["maps"])
    text = _means(result["means"], f"sharpen, {count} maps, d = 3-6 A")
    beats = {name: _share(share) for name, share in result["beats"].items()}
    lines = [
        f"- Better than {words} on this share of the maps: as it is {beats[f'ours_{other}']}; cut at d "
        f"{beats[f'ours_cut_{other}']}."
        for other, words in (("best_b", "the oracle's best B"), ("guinier", "Guinier sharpening"))
    ]
    for name, share in result["beats_bands"].items():
        lines.append(f"- d = {name}, against the best B, cut at d: {_share(share['ours_cut'])}.")
    # of the others the command asks for d, but where it sees a filter
    free = [one["rows"] for one in result["maps"] if not one["drawn"]["tight"]]
    if free and "ours_estimated" in free[0]:
        known, guessed = (
            ", ".join(
                f"{name} {_value(key, sum(rows[row][key] for rows in free) / len(free))}"
                for key, name in (("cc_mask", "CC_mask"), ("q", "Q"), ("fsc", "FSC .5"))
            )
            for row in ("ours", "ours_estimated")
        )
        lines.append(
            f"- The {len(free)} maps without a tight mask, d known: {known}; d estimated from the map: {guessed}."
        )
    clean = result["clean"]["means"]
    before, after = clean["input"], clean["ours"]
    lines.append(
        f"- A clean map (molmap itself, {len(result['clean']['maps'])} structures) given to it: CC_mask "
        f"{before['cc_mask']:.3f} -> {after['cc_mask']:.3f}, Q {before['q']:.3f} -> {after['q']:.3f}, FSC .5 "
        f"{before['fsc']:.2f} -> {after['fsc']:.2f} A."
    )
    return text + "\n\n" + "\n".join(lines)


def superres_table(result: dict) -> str:
    """Means at the target's resolution and shares of maps won."""
    text = _means(
        result["means"],
        f"superres, {len(result['maps'])} maps of {result['input_A']:g} A, scored at {result['target_A']:g} A",
    )
    won = [f"{ROWS[name.removeprefix('ours_')]}: {_share(share)}" for name, share in result["beats"].items()]
    return text + "\n\n- Better on this share of the maps than " + "; ".join(won) + "."


def wedge_table(result: dict) -> str:
    """Fourier correlation with the whole scene, inside the missing and the measured coefficients."""
    low, high = result["shells_A"][0], result["shells_A"][-1]
    names = {
        "input": "zeros in the wedge (the input)",
        "network": "network alone",
        "ours": "**network, measured kept**",
    }
    head = [f"wedge, +-60 degrees, 10 A/px, {low:g}-{high:g} A"]
    columns, rows = [], [[title] for title in names.values()]
    for noise, means in result["levels"].items():
        for region in ("missing", "measured", "all"):
            columns.append(f"{region}, noise {noise}")
            for row, name in zip(rows, names, strict=True):
                row.append(f"{means[name][region][-1]:.3f}")
    return markdown(head + columns, rows)


def safety_lines(result: dict) -> str:
    """What the networks must not do, one line per task."""
    lines = []
    for task, found in result.items():
        if not isinstance(found, dict) or "noise" not in found:
            continue
        share = {kind: [o for o in found["noise"] if o["kind"] == kind] for kind in ("white", "of a map")}
        energy = ", ".join(
            f"{name} {max(o['share'] for o in some):.1%}" + (
                " (which the command refuses)" if all(o["refused"] for o in some) else ""
            ) for name, some in share.items() if some
        )  # fmt: skip
        phases = found["phases"]
        fsc = {key: sum(o[key] for o in phases) / len(phases) for key in phases[0]}
        frames = found["frames"][0]
        lines.append(
            f"- {task}: of the energy of noise comes out: {energy}. Phases random beyond {found['beyond_A']:g} A: FSC "
            f"with the model there {fsc['ours_random']:.3f} (true phases: {fsc['ours_true']:.3f}). CC of answers over "
            f"24 frames {frames['turns_mean']:.3f} (least {frames['turns_least']:.3f}), tiles moved by half a stride "
            f"{frames['tiles']:.4f}."
        )
    return "\n".join(lines)


def lvm_table(found: dict[str, dict]) -> str:
    """Everything there is, with what the numbers were made of."""
    makers = {"sharpen": sharpen_table, "superres": superres_table, "wedge": wedge_table, "safety": safety_lines}
    parts = [make(found[name]) for name, make in makers.items() if name in found]
    some = next(iter(found.values()))
    parts.append(f"Simulated maps of structures never trained on; torch {some['versions']['torch']}; {some['date']}.")
    return "\n\n".join(parts)
