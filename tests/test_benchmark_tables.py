"""The README's tables are made from result files: what a table must say of results whose answer is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables_maps

    return tables_maps


def scores(masked: float, unmasked: float) -> dict:
    return {"per_image_masked": masked, "per_image_unmasked": unmasked}


def polish_result(seed: int, after: float, **more: object) -> dict:
    row = {
        "before": scores(0.3, 0.2), "after": {"scores": scores(after, after - 0.01)}, "training": {"cpu_s": 120.0},
        "agreement": {"ari": 0.9},
        "not_better": dict.fromkeys(
            ("before", "consensus", "label backprojection"), {"masked": seed, "unmasked": 0}
        ),
    }  # fmt: skip
    floors = {"consensus": scores(0.1, 0.1), "labels": scores(0.3, 0.2), "labels x mask": scores(0.31, 0.25)}
    result = {"kind": "mix16", "snr": 0.01, "box": 64, "flaw": "", "seed": seed, "states": 16, "floors": floors}
    return result | {"rows": {"true": row, "kraqen": row}} | more


def ablation_result(row: str, auc: float, seed: int, name: str = "loop") -> dict:
    return {"row": row, "set": name, "seed": seed, "per_image": {"auc_masked": auc}, "maps": scores(auc, 0),
            "agreement": {"ari": 0.5}}  # fmt: skip


def test_polish_tables_average_seeds_and_count_losing_states(tables):
    found = [polish_result(0, 0.39), polish_result(1, 0.41), polish_result(0, 0.2, flaw="poses3", box=128)]
    lines = tables.polish_table(found).splitlines()
    assert len(lines) == 4
    assert "mix of 16, SNR 0.01 |" in lines[2] and "**0.400 / 0.390**" in lines[2] and "1 / 0 of 32" in lines[2]
    assert "D = 128, shifts off by .5 pixel, angles by 3 degrees" in lines[3] and "0 / 0 of 16" in lines[3]
    methods = tables.methods_table(found[:2]).splitlines()
    assert len(methods) == 3 and "train-kraqen" in methods[2] and "2.0 min" in methods[2]


def test_ablation_says_what_reproduces_and_what_is_noise(tables):
    found = [ablation_result("full", auc, seed) for seed, auc in enumerate((0.40, 0.41, 0.42))]
    found += [ablation_result("no triplet", auc, seed) for seed, auc in enumerate((0.30, 0.31, 0.32))]
    found += [ablation_result("no kernel", auc, seed) for seed, auc in enumerate((0.40, 0.41, 0.43))]
    found += [ablation_result("no annealing, low T", auc, seed) for seed, auc in enumerate((0.46, 0.47, 0.46))]
    found += [ablation_result("ours", 0.45, 0), ablation_result("full", 0.2, 0, "mix16")]
    lines = {line.split(" | ")[0].strip("| "): line for line in tables.ablation_table(found).splitlines()}
    assert "as published" in lines["no triplet"]
    assert "within noise" in lines["no kernel"]
    assert "the other way round" in lines["no annealing, low T"]
    assert "0.450" in lines["ours"] and "0.200" in lines["full"]
    assert len({line.count("|") for line in lines.values()}) == 1  # no ragged row


def test_kraqen_table_has_a_row_per_set(tables):
    one = {
        "set": "mix16-noisy", "variant": "", "box": 64, "images": 32000, "snr": 0.01, "snr_at_box": 0.037, "seed": 0,
        "training": {"cpu_s": 600.0}, "merged": {"ari": 0.97, "states": 16, "states_found": 15, "classes": 18},
        "bayes": {"ari": 1.0}, "knn10_accuracy": 0.99, "per_image": {"auc_masked": 0.44},
        "floors": {"labels": scores(0.45, 0.4), "consensus": scores(0.1, 0.1)},
    }  # fmt: skip
    text = tables.kraqen_table([one, one | {"seed": 1}, one | {"set": "mix100"}])
    assert len(text.splitlines()) == 4
    assert "0, 1 | 10.0 min | 0.970 ± 0.000" in text and "15, 15 of 16 | 18, 18" in text


def test_fire_table_sorts_by_kind_and_keeps_cells_whole(tables):
    import tables_fire

    def result(name: str, *rows: tuple) -> dict:
        keys = ("kind", "what", "tried", "result", "detail")
        made = {"command": f"python tests/benchmarks/fire_{name}.py", "date": "2026-11-21", "seed": 3, "versions": {}}
        return made | {"rows": [dict(zip(keys, row, strict=False)) for row in rows]}

    found = [result("fuzz", ("input", "`mrc` a|b", 200000, "no traceback")), result("kill", ("fault", "k", 20, "same"))]
    found.append(result("million", ("load", "1,000,000 particles", 1, "held", "peak\n1.1 GiB")))
    lines = tables_fire.fire_table(found).splitlines()
    assert lines[2] == "| load held | 1,000,000 particles | 1 | held | peak 1.1 GiB |"
    assert lines[3] == "| fault survived | k | 20 | same |  |"
    assert lines[4] == "| bad input | `mrc` a\\|b | 200,000 | no traceback |  |"
    assert lines[6:9] == [f"- `{one['command']}` (2026-11-21, seed 3)" for one in found]
    same = [("fault", f"kill -9 of `{name}`, then", 20, "same", "4 s") for name in ("a", "b")]
    lines = tables_fire.fire_table([result("kill", *same, ("fault", "kill -9 of `c`, then", 3, "DIFFERS", "x"))])
    assert lines.splitlines()[2] == "| fault survived | kill -9 of `a`, `b`, then | 40 | same | 20 each |"
    assert lines.splitlines()[3] == "| fault survived | kill -9 of `c`, then | 3 | DIFFERS | x |"
    with pytest.raises(SystemExit, match="unknown kind flood"):
        tables_fire.fire_table([result("x", ("flood", "x", 1, "y"))])


def test_ratios_say_what_held_of_which_run_and_what_is_missing(tables, tmp_path):
    import tables_speed

    versions = {"torch": "2", "machine": "m"}
    one = {"command": "python tests/benchmarks/help_speed.py", "date": "2026-01-02", "versions": versions}
    made = {"commands": {"cryosuite": {}, "check": {}, "export": {}}, "slowest_cpu_s": 0.7, "run": "2026-01-02 10:00"}
    (tmp_path / "help_speed.json").write_text(json.dumps(one | made))
    share = {"warm": {"processor": 9}, "memory": {"processor": 10}}
    old = one | {"command": "python tests/benchmarks/fire_loader.py", "date": "2026-01-01", "images_per_second": share}
    (tmp_path / "fire_loader.json").write_text(json.dumps(old))
    lines = tables_speed.ratios_table(tmp_path).splitlines()
    first = "| `--help` of `cryosuite` and its 2 commands | < 0.5 s | 0.70 s | **no** |  | `help_speed.py` |"
    assert lines[2] == first
    assert lines[3].endswith("| >= 80 % | 90% | yes | 2026-01-01 | `fire_loader.py` |")
    assert "one run that began 2026-01-02 10:00" in lines[-1] and "`fastar_speed`" in lines[-1].split("Not measured")[1]
    assert "help_speed" not in lines[-1]


def test_readme_has_markers_for_every_table(tables, monkeypatch, tmp_path):
    import common
    import tables as writer

    text = writer.README.read_text()
    for name in (
        "speed",
        "hype",
        "mix16",
        "kraqen",
        "polish",
        "methods",
        "ablation",
        "kraqen-speed",
        "ratios",
        "fire",
        "proof",
    ):
        assert f"| {name} |" in writer.replace(text, name, f"| {name} |")
    monkeypatch.setattr(sys, "argv", ["bench.py", "--work", "/somewhere/mine"])
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    saved = common.save("one", {"command_of_run": "cryosuite x -o /somewhere/mine/run", "values": [1, 2.5, -3e-5]})
    assert "/somewhere" not in saved.read_text() and '"values": [ 1, 2.5, -3e-05 ]' in saved.read_text()
    assert json.loads(saved.read_text())["command_of_run"] == "cryosuite x -o WORK/run"


def test_every_result_says_when_and_with_what_it_was_made_and_names_no_folder_of_a_machine():
    found = sorted((BENCHMARKS / "results").glob("*.json"))
    assert found
    for path in found:
        result = json.loads(path.read_text())
        assert {"date", "versions"} <= set(result), path.name
        command = result.get("command", "")
        script = next((word for word in command.split() if word.endswith(".py")), None)
        assert script is None or (BENCHMARKS.parents[1] / script).is_file(), path.name
        assert not [root for root in ("/home/", "/root/", "/work/", "/Users/") if root in path.read_text()], path.name


def test_modes_stand_beside_what_has_no_latent(tables):
    def row(mode: str, error: float | None, masked: float) -> dict:
        return {
            "mode": mode,
            "error": error,
            "masked": masked,
            "unmasked": masked - 0.1,
            "cpu_s": 0 if error is None else 9,
        }

    rows = [row("consensus", None, 0.3), row("default", 0.0, 0.45), row("default", 0.3, 0.44), row("kernel", 0.3, 0.4)]
    lines = tables.modes_table([{"seed": seed, "snr": 0.01, "rows": rows} for seed in (0, 1)]).splitlines()
    assert lines[0].startswith("| mode | true angles | angles off by 0.3 rad |")
    assert lines[2] == "| consensus | 0.300 ± 0.000 / 0.200 ± 0.000 | 0.300 ± 0.000 / 0.200 ± 0.000 |  |"
    assert "0.450" in lines[3] and lines[3].endswith("| 9 s |")
    assert lines[4].split("|")[2].strip() == ""  # no kernel row at the true angles
    assert lines[-1].endswith("seeds 0, 1.")


def test_shifts_before_and_after_and_the_honesty_of_half_maps(tables):
    def row(error, half_maps):
        return {"error_px": error, "fsc": {"half_maps": half_maps, "by_the_truth": half_maps + 0.01}}

    rows = {"true": row(0.0, 0.4), "given": row(0.5, 0.3), "refined": row(0.13, 0.39)}
    facts = {"kind": "ribo16", "snr": 0.01, "box": 64, "flaw": "poses1", "measured_px": 0.52, "cpu_s": 11, "rows": rows}
    lines = tables.shifts_table([facts | {"seed": seed} for seed in (0, 1)]).splitlines()
    assert lines[2].startswith(
        "| assembly of 16, SNR 0.01, shifts off by .5 pixel, angles by 1 degree | 2 | 0.50 ± 0.00 "
    )
    assert "| **0.13 ± 0.00** | 11 s |" in lines[2] and "**0.390 ± 0.000 / 0.400 ± 0.000**" in lines[2]


def test_limits_stand_beside_what_was_found(tables):
    found = [polish_result(seed, 0.4) for seed in (0, 1)]
    facts = {"kind": "mix16", "snr": 0.01, "box": 64, "flaw": "", "bayes": {"ari": 0.95}, "from_the_truth": [0.8, 0.6]}
    lines = tables.limits_table([facts | {"seed": seed} for seed in (0, 1, 2)], found).splitlines()
    assert lines[2].split(" | ")[1:4] == ["0, 1", "0.95 ± 0.00", "0.60 ± 0.00"]  # seed 2 has no training
    assert lines[2].endswith("**0.90 ± 0.00** |")
    assert len(tables.limits_table([facts | {"seed": 0, "flaw": "coloured"}], found).splitlines()) == 2


def test_errors_of_unknown_molecules_stand_beside_chance(tables):
    from tables_fastar import abinitio_table

    result = {"command": "python x", "seed": 3, "images_seen": 12000, "minutes": 30.0, "rows": [
        {"molecules": "bench", "views": views, "snr": snr, "deg": 100 + snr, "chance": 120 + views}
        for views in (8, 32) for snr in (0.1, 10.0)
    ]}  # fmt: skip
    lines = abinitio_table(result).splitlines()
    assert lines[0] == "| molecules | SNR 10 | SNR 0.1 |"
    assert lines[2:4] == ["| bench, 8 views | 110 (128) | 100 (128) |", "| bench, 32 views | 110 (152) | 100 (152) |"]
    assert "12,000 images in 30 minutes, seed 3" in lines[-1]
