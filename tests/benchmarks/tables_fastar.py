"""The README tables of fastar-infer: from results (dicts) to Markdown."""

from __future__ import annotations

from tables_maps import markdown


def quality_table(found: list[dict]) -> str:
    """A row per molecule and box: as predicted, chance, refined, the map, and a search without a network."""
    rows = []
    for one in sorted(found, key=lambda r: (r["box"], r["molecule"], r["seed"])):
        before, after = (one[name]["errors"]["raw"] for name in ("predicted", "refined"))
        chance, plain = one["predicted"]["errors"]["chance_raw"], one["search_without_network"]
        rows.append([
            f"{one['molecule']}, D = {one['box']}", f"{one['images']:,}, seed {one['seed']}",
            f"**{before['median_deg']:.1f}** ({chance['median_deg']:.0f})",
            f"{100 * before['under_20_deg']:.0f} %", f"{one['predicted']['cpu_s']:.0f}, {one['refined']['cpu_s']:.0f}",
            f"**{after['median_deg']:.2f}**", f"{after['shift_median_px']:.2f}",
            f"{one['refined']['map']['in_nyquist']:.2f}",
            f"{plain['errors']['median_deg']:.2f}, {plain['cpu_s']:.0f}",
        ])  # fmt: skip
    columns = [
        "bench molecule", "images", "predicted, median deg (chance)", "within 20 deg",
        "CPU s of the command without, with refinement",
        "refined, median deg", "shift, px", "map with truth, FSC 0.5 (x Nyquist)",
        "search without network: deg, CPU s",
    ]  # fmt: skip
    return markdown(columns, rows)


def scaling_table(result: dict) -> str:
    """Cost of a prediction against the number of particles."""
    rows = [
        [f"{n['particles']:,}", f"{n['predict_s']:.1f} s", f"{n['ms_per_image']:.2f} ms", f"{n['cpu_s']:.0f} s"]
        for n in result["rows"]
    ]
    return markdown(["particles", "prediction", "per image", "whole command, CPU time"], rows) + _note(result)


def race_table(found: list[dict]) -> str:
    """CPU seconds to a map and what it is worth, by each way."""
    rows = [
        [
            f"{one['molecule']}, D = {one['box']}, {one['images']:,} images", name, f"{way['cpu_s']:.0f} s",
            f"{way['fsc_0.5_A']:.1f} A ({way['in_nyquist']:.2f} x Nyquist)" if "fsc_0.5_A" in way else "no map",
        ]
        for one in found
        for name, way in one["ways"].items()
    ]  # fmt: skip
    return markdown(["set", "", "CPU time", "map with truth, FSC 0.5"], rows)


def _note(result: dict) -> str:
    versions = result["versions"]
    return f"\n\nOne thread, torch {versions['torch']}, {versions['machine']}; {result['date']}."
