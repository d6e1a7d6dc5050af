"""The README tables of fastar-infer: from results (dicts) to Markdown."""

from __future__ import annotations

import math
from statistics import mean

from tables_maps import grouped, markdown, spread


def quality_table(found: list[dict]) -> str:
    """A row per molecule and box, over seeds: predicted, chance, refined, the map, and a search without a network."""
    rows = []
    found = sorted(found, key=lambda one: (one["box"], one["molecule"], one["seed"]))
    for runs in grouped(found, lambda one: (one["box"], one["molecule"], one["images"])):
        box, molecule, images = (runs[0][key] for key in ("box", "molecule", "images"))
        before, after = ([one[name]["errors"]["raw"] for one in runs] for name in ("predicted", "refined"))
        chance = mean(one["predicted"]["errors"]["chance_raw"]["median_deg"] for one in runs)
        plain = [one["search_without_network"] for one in runs]
        cpu = [mean(one[name]["cpu_s"] for one in runs) for name in ("predicted", "refined")]
        rows.append([
            f"{molecule}, D = {box}", f"{images:,}", ", ".join(str(one["seed"]) for one in runs),
            f"**{spread([one['median_deg'] for one in before], 1)}** ({chance:.0f})",
            f"{100 * mean(one['under_20_deg'] for one in before):.0f} %", f"{cpu[0]:.0f}, {cpu[1]:.0f}",
            f"**{spread([one['median_deg'] for one in after], 2)}**",
            f"{mean(one['shift_median_px'] for one in after):.2f}",
            f"{mean(one['refined']['map']['in_nyquist'] for one in runs):.2f}",
            f"{spread([one['errors']['median_deg'] for one in plain], 2)}, {mean(one['cpu_s'] for one in plain):.0f}",
        ])  # fmt: skip
    columns = [
        "bench molecule", "images", "seeds", "predicted, median deg (chance)", "within 20 deg",
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
    """CPU seconds to a map and what it is worth, by each way; a peer's time over ours where it was run."""
    rows = []
    for one in found:
        peer = next((way for name, way in one["ways"].items() if name.startswith("cryodrgn")), None)
        for name, way in one["ways"].items():
            stopped = "" if way.get("ended", True) else "stopped after "
            rows.append([
                f"{one['molecule']}, D = {one['box']}, {one['images']:,} images", name,
                f"{stopped}{way['cpu_s']:,.0f} s", _worth(way),
                _times_faster(way, peer) if peer and way is not peer else "",
            ])  # fmt: skip
    return markdown(["set", "", "CPU time", "map with truth, FSC 0.5", "cryoDRGN's time / this"], rows)


def _worth(way: dict) -> str:
    """Of a map."""
    return f"{way['fsc_0.5_A']:.1f} A ({way['in_nyquist']:.2f} x Nyquist)" if "fsc_0.5_A" in way else "no map"


def _times_faster(way: dict, peer: dict) -> str:
    """To a map as good as the peer's: at least so much where the peer was stopped or has a worse one."""
    equal = peer.get("ended", True) and peer.get("in_nyquist", math.inf) <= way["in_nyquist"]
    if peer.get("in_nyquist", math.inf) < way["in_nyquist"]:
        return "its map is better"
    return f"{'' if equal else '> '}{peer['cpu_s'] / way['cpu_s']:.0f}x"


def abinitio_table(result: dict) -> str:
    """Errors of sets of views of unknown molecules beside chance: a row per number of views, a column per SNR."""
    snrs = sorted({row["snr"] for row in result["rows"]}, reverse=True)
    rows = []
    for runs in grouped(result["rows"], lambda row: (row["molecules"], row["views"])):
        at = {row["snr"]: row for row in runs}
        cells = [f"{at[snr]['deg']:.0f} ({at[snr]['chance']:.0f})" for snr in snrs]
        rows.append([f"{runs[0]['molecules']}, {runs[0]['views']} views", *cells])
    trained = f" in {result['minutes']:g} minutes" if "minutes" in result else ""  # not where weights were only judged
    seen = f"{result['images_seen']:,} images{trained}, seed {result['seed']}"
    note = f"\n\nMedian degrees (chance). `{result['command']}`: {seen}."
    columns = ["molecules", *(f"SNR {snr:g}" for snr in snrs)]
    return markdown(columns, rows) + note


def _note(result: dict) -> str:
    versions = result["versions"]
    return f"\n\nOne thread, torch {versions['torch']}, {versions['machine']}; {result['date']}."
