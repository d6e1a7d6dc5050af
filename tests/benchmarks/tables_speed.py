"""The README table of every ratio that was asked for: one row per promise, from the results of bench_speed.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tables_maps import markdown, results

Row = tuple[str, str, str, bool | None]  # what, limit, measured, whether it held


def _times(value: float) -> str:
    return f"{value:.1f}x" if value < 20 else f"{value:.0f}x"


def _help(one: dict) -> Iterator[Row]:
    slowest = one["slowest_cpu_s"]
    commands = sum(name != "cryosuite" for name in one["commands"])
    yield f"`--help` of `cryosuite` and its {commands} commands", "< 0.5 s", f"{slowest:.2f} s", slowest < 0.5


def _peers(one: dict) -> Iterator[Row]:
    for name, title in (("preprocess", "`preprocess`"), ("backproject64x4", "`backproject`, D = 64, 20,000 images")):
        row = one["rows"].get(name, {})
        for peer, called in (("cryodrgn", "cryoDRGN"), ("relion", "RELION")):
            if peer in row:
                ratio = row[peer]["ratio"]
                yield f"{title} against {called}", "> 1x", _times(ratio), ratio > 1


def _kraqen(one: dict) -> Iterator[Row]:
    rows = one["rows"]
    net = rows["network"]
    title = f"`train-kraqen` tri-plane, K = {net['codes']}, D = {net['box']}, against `train-hype`"
    yield title, ">= 10x", _times(net["ratio"]), net["ratio"] >= 10
    first, last = rows["codes"]["codes"]
    growth = rows["codes"]["growth"]
    yield f"cost of a step from K = {first} to K = {last}", "< 1.5x", f"{growth:.2f}x", growth < 1.5
    voxel = rows["voxel"]
    visits = voxel["visits_per_s"][0]
    yield "image visits of the voxel field, D = 32, K = 24", ">= 1,700/CPU s", f"{visits:,}/CPU s", visits >= 1700
    held = voxel["growth"] <= voxel["codes_growth"]
    yield f"its cost when K grows {voxel['codes_growth']:.0f}x", "no faster", f"{voxel['growth']:.2f}x", held
    for each in rows["polish"]["sets"]:
        what = f"`polish`, 16 classes, {each['images']:,} images, D = {each['box']}: its rate over `backproject`'s"
        yield what, ">= 90 %", f"{each['ratio']:.0%}", each["ratio"] >= 0.9
    for each in rows.get("given", {}).get("sets", []):
        what = f"the same, {each['images']:,} images, D = {each['box']}, each round given its memory anew"
        yield what, ">= 90 %", f"{each['ratio']:.0%}", each["ratio"] >= 0.9
    large = [each for each in rows["polish"]["sets"] if each["box"] == 128]
    further = _further(large[0], large[-1])
    yield "the same for each further image (D = 128)", ">= 90 %", f"{further:.0%}", further >= 0.9


def _further(few: dict, many: dict) -> float:
    """Rate of polish over that of one map for the images that a larger set has more: without what it costs to begin."""
    seconds = [
        many["images"] / many[rate] - few["images"] / few[rate]
        for rate in ("backproject_images_per_s", "polish_images_per_s")
    ]
    return seconds[0] / seconds[1]


def _pose_search(one: dict) -> Iterator[Row]:
    ratios = [row["times_faster"] for row in one.values() if isinstance(row, dict) and "times_faster" in row]
    measured = f"{_times(min(ratios))} to {_times(max(ratios))}"
    yield (
        f"pose search, D = 64, against the published procedure, {len(ratios)} sets",
        ">= 10x",
        measured,
        min(ratios) >= 10,
    )


def _decoder(one: dict) -> Iterator[Row]:
    for row in one["results"]:
        ratio = row["times_plain"]
        yield (
            f"`deco-classify`'s decoder, D = {row['box_size']}, against the plain one",
            ">= 3x",
            _times(ratio),
            ratio >= 3,
        )


def _step(one: dict) -> Iterator[Row]:
    for row in one["results"]:
        ratio = max(row["times_plain"].values())
        yield f"its refinement step, preset {row['preset']}, against plain PyTorch", ">= 2x", _times(ratio), ratio >= 2


def _hype(one: dict) -> Iterator[Row]:
    for size, rows in one["sizes"].items():
        default = next(row for row in rows if "default" in row["variant"])
        yield (
            f"`train-hype`, {size.replace('-', ', D = ')}, against the published way",
            "> 1x",
            _times(default["ratio"]),
            (default["ratio"] > 1),
        )


def _fastar(one: dict) -> Iterator[Row]:
    for preset, row in one["rows"].items():
        share, rate = row["simulator"]["share"], row["inference"]["images_per_s"]
        yield f"simulator's share of a step of `train-fastar`, {preset}", "< 10 %", f"{share:.1%}", share < 0.1
        whole = row["inference"]["command_images_per_cpu_s"]
        text = f"{rate:.0f} images/s, with start, templates and map {whole:.0f}"
        yield f"`fastar-infer`, {preset}, D = 64, one core", ">= 30 images/s", text, whole >= 30


def _lvm(one: dict) -> Iterator[Row]:
    for row in one["rows"]:
        over = row["overhead"]
        yield (
            f"attention and norms of the map network, {row['dtype']}, over its convolutions",
            "< 30 %",
            f"{over:.0%}",
            over < 0.3,
        )


def _sharpen(one: dict) -> Iterator[Row]:
    title = f"`lvm-sharpen`, {one['size']}^3 voxels, against the published tiling"
    for name, ratio in one["ratio"].items():
        yield f"{title} in {name}", ">= 20x", _times(ratio), ratio >= 20


def _sharpen_memory(one: dict) -> Iterator[Row]:
    worst = max(one[name]["peak_GiB"] for name in one if isinstance(one[name], dict) and "peak_GiB" in one[name])
    yield f"its memory for {one['size']}^3 voxels, uncertainty included", "< 4 GiB", f"{worst:.1f} GiB", worst < 4


def _loader(one: dict) -> Iterator[Row]:
    rate = one["images_per_second"]
    share = rate["warm"]["processor"] / rate["memory"]["processor"]
    yield "shuffled loader, over one in memory", ">= 80 %", f"{share:.0%}", share >= 0.8


def _classes(one: dict) -> Iterator[Row]:
    titles = {
        "kraqen": "`train-kraqen`, {} particles, D = {}, K = {} ({} in use at the end)",
        "polish": "`polish`, {} particles, D = {}, {} classes",
    }
    for name, row in one["rows"].items():
        peak, limit = row["peak_gib"], row["limit_gib"]
        what = titles[name].format(f"{row['particles']:,}", row["box"], row["classes"], row["maps"])
        yield f"memory of {what}", f"< {limit:g} GiB", f"{peak:.1f} GiB", peak < limit


def _million(one: dict) -> Iterator[Row]:
    measured = one["measured"]
    seconds = measured["star"]["cpu_s"]
    yield "reading a star file of 1,000,000 particles", "< 60 s", f"{seconds:.0f} s", seconds < 60
    worst = (
        max(measured[name]["peak_mib"] for name in ("preprocess", "encode", "backproject") if name in measured) / 1024
    )
    yield "memory of `preprocess`, encoding, `backproject` of these", "< 2 GiB", f"{worst:.2f} GiB", worst < 2


def _report(one: dict) -> Iterator[Row]:
    yield (
        "report of 300,000 particles: drawn, then ready for clicks",
        "",
        (f"{one['drawn_ms'] / 1000:.1f} s, {one['ready_ms'] / 1000:.1f} s"),
        None,
    )


def _analyze(one: dict) -> Iterator[Row]:
    limits, wall, peak = one["limits"], one["wall_s"], one["peak_gib"]
    title = f"`analyze`, {one['particles']:,} particles, {one['volumes']} volumes of {one['box']}^3"
    yield title, f"< {limits['wall_s']:.0f} s", f"{wall:.0f} s", wall < limits["wall_s"]
    yield "its memory", f"< {limits['peak_gib']:.0f} GiB", f"{peak:.1f} GiB", peak < limits["peak_gib"]


MAKERS: dict[str, Callable[[dict], Iterator[Row]]] = {
    "help_speed": _help, "speed": _peers, "kraqen_speed": _kraqen, "classes_memory": _classes,
    "pose_search_speed": _pose_search, "deco_decoder_speed": _decoder, "deco_step_speed": _step,
    "hype_published_way": _hype, "fastar_speed": _fastar, "lvm_speed": _lvm,
    "lvm_sharpen_speed_cpu_default_300": _sharpen, "lvm_sharpen_memory_400": _sharpen_memory,
    "fire_loader": _loader, "fire_million": _million, "report_speed": _report, "analyze_speed": _analyze,
}  # fmt: skip


def ratios_table(folder: Path) -> str:
    """One row per promise; rows of another run than the newest one say of which day they are, and what has no result
    is named below."""
    found = {name: one[0] for name in MAKERS if (one := results(folder, f"{name}.json"))}
    newest = max((one["run"] for one in found.values() if "run" in one), default=None)
    rows, versions = [], None
    for name, one in found.items():
        same = newest is not None and one.get("run") == newest
        versions = one["versions"] if same or versions is None else versions
        for what, limit, measured, held in MAKERS[name](one):
            verdict = "" if held is None else "yes" if held else "**no**"
            rows.append(
                [
                    what,
                    limit,
                    measured,
                    verdict,
                    "" if same else one["date"],
                    f"`{Path(one['command'].split()[1]).name}`",
                ]
            )
    note = "\n\nRows without a date: " + (f"one run that began {newest}" if newest else "none yet")
    note += f"; torch {versions['torch']}, {versions['machine']}." if versions else "."
    if missing := [f"`{name}`" for name in MAKERS if name not in found]:
        note += f" Not measured yet: {', '.join(missing)}."
    return markdown(["", "asked for", "measured", "held", "of another run", "script"], rows) + note
