"""proof.py, the side-by-side table: its numbers mean what they say, nothing is made twice, a budget holds."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
CURVES = ("masked", "unmasked")


@pytest.fixture
def proof(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import proof

    return proof


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tables_proof

    return tables_proof


def scores(masked: float, unmasked: float) -> dict:
    """Scores of one kind of maps."""
    return {
        "per_image": {"auc_masked": masked, "auc_unmasked": unmasked, "viou": 0.5},
        "per_conformation": {"auc_masked": masked + 0.01, "auc_unmasked": unmasked + 0.01, "auc_masked_std": 0.1},
    }


def result(method: str, seed: int, bare: tuple[float, float], polished: tuple[float, float] | None, **more) -> dict:
    """A result of a set whose scores are known."""
    row = {
        "command": "python proof.py", "date": "2026-11-21", "versions": {"machine": "m"}, "suite": "quick",
        "set": "phantom4-d32-snr0.1-n600", "kind": "phantom4", "seed": seed, "images": 600, "box": 32, "snr": 0.1,
        "snr_at_box": 0.4, "states": 4, "method": method, "bare": scores(*bare),
    }  # fmt: skip
    if polished:
        row["polished"] = scores(*polished) | {"cpu_s": 60.0, "rss_mib": 2048}
    return row | more


def known_results() -> list[dict]:
    """Floor .1, plain labels .3, oracle .5 masked; unmasked the plain labels lie below the floor."""
    found = []
    for seed in (0, 1):
        found.append(result("consensus", seed, (0.1, 0.2), None, cpu_s=6.0))
        found.append(result("labels", seed, (0.3, 0.15), (0.5, 0.4), cpu_s=6.0))
        training = {"cpu_s": 120.0, "wall_s": 240.0, "rss_mib": 1024} | ({"continued": True} if seed else {})
        latents = {"kmeans_ari": 0.8 + 0.1 * seed, "kmeans_ami": 0.9, "knn10_accuracy": 0.95}
        found.append(result("hype", seed, (0.2, 0.2), (0.4, 0.3), training=training, latents=latents))
    return found


def test_gain_lies_between_the_consensus_and_the_polished_true_labels(tables):
    rows = {(r["method"], r["maps"]): r for r in tables.flat_rows(known_results()) if r["seed"] == 0}
    assert rows["consensus", "bare"]["gain_masked"] == pytest.approx(0)
    assert rows["labels", "polished"]["gain_masked"] == pytest.approx(1)
    assert rows["hype", "bare"]["gain_masked"] == pytest.approx(0.25)
    assert rows["hype", "polished"]["gain_masked"] == pytest.approx(0.75)
    assert rows["hype", "bare"]["gain_to_label_backprojection_masked"] == pytest.approx(0.5)
    # plain labels below the consensus leave no way to measure along
    assert "gain_to_label_backprojection_unmasked" not in rows["hype", "bare"]
    assert rows["hype", "bare"]["cpu_min"] == pytest.approx(2) and rows["hype", "bare"]["rss_gib"] == pytest.approx(1)
    assert rows["hype", "polished"]["cpu_min"] == pytest.approx(3)
    assert rows["hype", "polished"]["rss_gib"] == pytest.approx(2)
    assert "kmeans_ari" in rows["hype", "bare"] and "kmeans_ari" not in rows["hype", "polished"]


def test_no_gain_without_floor_and_oracle(tables):
    assert tables.gains({"auc_masked": 0.2, "auc_unmasked": 0.2}, None, known_results()[1]) == {}
    assert tables.gains({"auc_masked": 0.2, "auc_unmasked": 0.2}, known_results()[0], None) == {}


def test_table_has_blanks_for_what_was_not_run(tables):
    text = tables.proof_table(known_results())
    lines = [line for line in text.splitlines() if line.startswith("| quick")]
    assert len(lines) == 11  # consensus once, five methods bare and polished
    by = {line.split(" | ")[1]: [cell.strip() for cell in line[1:-1].split("|")] for line in lines}
    assert by["train-hype, bare"][2:6] == ["0, 1", "0.200 ± 0.000", "0.200 ± 0.000", ""]
    assert "0.85 ± 0.07" in by["train-hype, bare"] and "> 2.0 ± 0.0" in by["train-hype, bare"]
    assert by["cryoDRGN train_vae, polished"][2:] == ["-", *[""] * len(tables.COLUMNS)]
    assert len({line.count("|") for line in lines}) == 1
    assert "Not run yet" not in text  # the only set of that suite was


def test_short_table_has_what_was_run_from_bare_to_polished(tables):
    lines = tables.short_table(known_results()).splitlines()
    by = {line.split(" | ")[1]: [cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:5]}
    assert list(by) == ["consensus, one map for all", "true labels backprojected", "train-hype"] and lines[5] == ""
    assert by["train-hype"][2:5] == ["0, 1", "0.200 ± 0.000 -> 0.400 ± 0.000", "0.25 ± 0.00 -> 0.75 ± 0.00"]
    assert by["consensus, one map for all"][0].startswith("quick") and by["train-hype"][0] == ""
    assert by["consensus, one map for all"][3] == "0.100 ± 0.000"  # there is nothing to polish
    assert "0.85 ± 0.07" in by["train-hype"] and "> 2.0 ± 0.0" in by["train-hype"]


def test_csv_has_every_seed_and_pictures_are_drawn(tables, tmp_path):
    tables.write(known_results(), tmp_path)
    with (tmp_path / "proof.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and {row["seed"] for row in rows} == {"0", "1"}
    assert [row["kmeans_ari"] for row in rows if row["method"] == "consensus"] == ["", ""]
    assert (tmp_path / "proof_phantom4-d32-snr0.1-n600.png").stat().st_size > 10_000
    assert "train-hype, polished" in (tmp_path / "proof.md").read_text()


def test_sets_that_were_not_run_are_named(tables):
    one = result("consensus", 0, (0.1, 0.1), None, suite="mini", kind="ribo16", set="ribo16-d32-snr0.1-n8000")
    missing = tables.notes([one]).partition("Not run yet: ")[2]
    assert "mini-ribo16, D = 32, SNR 0.01" in missing and "mini-ribo16, D = 32, SNR 0.1;" not in missing
    assert missing.count(";") == 6  # 4 sets x 2 SNR, one is there


def test_budget_counts_the_pace_of_the_machine(proof, monkeypatch):
    monkeypatch.setattr(proof.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(proof.os, "getloadavg", lambda: (8.0, 0.0, 0.0))
    assert proof.Budget(10).fits(140) and not proof.Budget(10).fits(160)  # eight processes share two cores
    monkeypatch.setattr(proof.os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    budget = proof.Budget(10)
    assert budget.fits(590) and not budget.fits(610)
    budget.note(expected=100, spent=300)  # three times slower than expected
    assert budget.fits(190) and not budget.fits(210)
    assert proof.Budget(None).fits(1e9)


def test_trainings_that_are_there_cost_no_time(proof, tmp_path):
    import sets

    job = proof.Job(sets.FAMILIES["mini"][0], "hype", tmp_path)
    whole = proof.seconds_expected(job)
    job.run.parent.mkdir(parents=True)
    job.run.with_name("hype.done.json").write_text("{}")
    assert 0 < proof.seconds_expected(job) < whole / 5


def test_options_are_compared_without_folders_and_threads(proof):
    before = "/x/__main__.py train-hype /a/sim -o /b/run --preset small --seed 0 -n 50 --overwrite --threads 2"
    now = ["cryosuite", "train-hype", "sim", "-o", "other", "--seed", "0", "--overwrite"]
    now += ["--preset", "small", "-n", "50"]
    assert proof.runs.same_options(before, now)
    assert not proof.runs.same_options(before, [*now[:-1], "40"])
    assert not proof.runs.same_options(before, [*now, "--window"])
    assert not proof.runs.same_options(before.replace("train-hype", "train-kraqen"), now)


def test_sets_are_of_phantoms_where_there_are_no_structures(proof, monkeypatch, tmp_path):
    import sets

    (tmp_path / "data" / "atomic").mkdir(parents=True)
    recipes = sets.FAMILIES["mini"]
    assert len({recipe.name for recipe in recipes}) == 24
    monkeypatch.setenv("CRYOSUITE_SHARED", str(tmp_path))
    assert all(sets.at_hand(recipe) == recipe for recipe in recipes)
    monkeypatch.setenv("CRYOSUITE_SHARED", str(tmp_path / "absent"))
    made = [sets.at_hand(recipe) for recipe in recipes]
    assert all(recipe.name.startswith("phantom-") and "phantom" in " ".join(recipe.options()) for recipe in made)
    assert sets.at_hand(sets.FAMILIES["quick"][0]).kind == "phantom4"


def run_proof(tmp_path: Path, *options: str) -> str:
    """One call of the script; its output."""
    command = [sys.executable, str(BENCHMARKS / "proof.py"), "--suite", "quick", *options]
    command += ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def stamps(folder: Path) -> dict[str, int]:
    """When every file under a folder was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


METHODS_TRIED = ("--methods", "consensus", "labels", "kraqen")


@pytest.mark.slow
def test_quick_suite_numbers_resume_and_budget(tmp_path):
    said = run_proof(tmp_path, *METHODS_TRIED, "--budget-minutes", "0.01")
    assert "left for another call" in said and said.count("some") >= 4
    assert not (tmp_path / "results").exists() and not (tmp_path / "work" / "runs").exists()
    run_interrupted(tmp_path)
    check_numbers(tmp_path)
    check_nothing_is_repeated(tmp_path)


def check_numbers(tmp_path: Path) -> None:
    """A budget that suffices: floor, ceiling and oracle lie as they must, the interrupted training went on."""
    said = run_proof(tmp_path, *METHODS_TRIED, "--budget-minutes", "600")
    assert "left for another call" not in said
    found = {p.stem.rpartition("_")[2]: json.loads(p.read_text()) for p in (tmp_path / "results").glob("proof_*.json")}
    assert set(found) == {"consensus", "labels", "kraqen"}
    for curve in CURVES:
        auc = {
            (name, maps): one[maps]["per_image"][f"auc_{curve}"]
            for name, one in found.items() for maps in ("bare", "polished") if maps in one
        }  # fmt: skip
        assert auc["labels", "bare"] >= auc["consensus", "bare"] + 0.05
        assert auc["labels", "polished"] >= auc["labels", "bare"]
        assert auc["labels", "polished"] >= auc["kraqen", "polished"] - 0.01
        assert all(0 < value < (32 / 2 - 1) / 32 for value in auc.values())
    assert found["kraqen"]["training"]["continued"] and found["kraqen"]["latents"]["kmeans_ari"] > 0.9
    assert all(max(map(len, map(str, walk(one)))) < 400 for one in found.values())  # no lists of images
    check_tables(tmp_path / "work", found)


def check_nothing_is_repeated(tmp_path: Path) -> None:
    """A second call reads what is there; a result that is gone is made from the runs that are there."""
    before = stamps(tmp_path / "work" / "runs") | stamps(tmp_path / "results")
    said = run_proof(tmp_path, *METHODS_TRIED)
    assert said.count("done before") == 3
    assert stamps(tmp_path / "work" / "runs") | stamps(tmp_path / "results") == before
    kept = tmp_path / "results" / "proof_phantom4-d32-snr0.1-n600-s0_kraqen.json"
    old = json.loads(kept.read_text())
    kept.unlink()
    run_proof(tmp_path, *METHODS_TRIED)
    assert stamps(tmp_path / "work" / "runs") == {k: v for k, v in before.items() if "/runs/" in k}
    assert json.loads(kept.read_text())["bare"] == old["bare"]


def run_interrupted(tmp_path: Path) -> None:
    """A training of kraqen that was terminated in the middle, where proof.py looks for it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import runs
        import sets
    finally:
        sys.path.remove(str(BENCHMARKS))
    recipe = sets.FAMILIES["quick"][0]
    source, run = sets.make(recipe, tmp_path / "work"), tmp_path / "work" / "runs" / recipe.name / "kraqen"
    command = [*runs.CRYOSUITE, "train-kraqen", str(source), "-o", str(run), "--seed", "0", "--n-states", "4"]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while training.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    training.terminate()
    assert training.wait() == 85 and (run / "checkpoint.pt").exists() and not list(run.glob("z.*.pkl"))


def walk(value: object) -> list:
    """All lists in a result."""
    if isinstance(value, dict):
        return [found for one in value.values() for found in walk(one)] or [""]
    return [value] if isinstance(value, list) else [""]


def check_tables(work: Path, found: dict[str, dict]) -> None:
    """CSV and Markdown hold the numbers of the JSON files."""
    with (work / "proof.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    text = (work / "proof.md").read_text()
    for row in rows:
        one = found[row["method"]][row["maps"]]
        assert float(row["auc_masked"]) == one["per_image"]["auc_masked"]
        assert float(row["class_auc_unmasked"]) == one["per_conformation"]["auc_unmasked"]
        assert float(row["viou"]) == one["per_image"]["viou"]
        assert f"{one['per_image']['auc_masked']:.3f} | {one['per_image']['auc_unmasked']:.3f}" in text
    assert (work / "proof_phantom4-d32-snr0.1-n600.png").stat().st_size > 10_000
