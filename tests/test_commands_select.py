"""``cryosuite select`` as a user types it: which particles come out, as indices, star and cs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from select_toy import Toy, make_run
from typer.testing import CliRunner

from cryosuite.analysis.particle_table import Column, particle_columns, round_confidence, write_particle_table
from cryosuite.cli import app
from cryosuite.data.export import load_metadata
from cryosuite.data.latents import fingerprint
from cryosuite.data.open import open_particles
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.data.rows import rows_of_indices
from cryosuite.errors import InputError
from cryosuite.formats.config import write_yaml
from cryosuite.formats.cs import read_cs
from cryosuite.formats.pickles import read_indices, write_pickle


@pytest.fixture(scope="module")
def toy(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A run on particles 20 to 199 of a star file."""
    folder = tmp_path_factory.mktemp("select")
    preprocess(
        open_particles(golden / "relion/particles.star", ind=np.arange(20, 200)), folder / "work", PreprocessOptions(32)
    )
    return make_run(folder / "run", folder / "work", 180)


def select(*arguments: object) -> str:
    """Run the command; its output. InputError as it is."""
    done = CliRunner().invoke(app, ["select", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def chosen(tmp_path: Path, *arguments: object) -> list[int]:
    """Rows of the run that the command writes."""
    select(*arguments, "-o", tmp_path / "ind.pkl")
    return (read_indices(tmp_path / "ind.pkl") - 20).tolist()


def where(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def test_clusters_are_found_in_the_newest_analysis(toy: Toy, tmp_path: Path) -> None:
    wanted = where(np.isin(toy.labels, [0, 2]))
    for how in (["--cluster", 0, 2], ["--cluster", "0,2"], ["--cluster", 0, "--cluster", 2]):
        assert chosen(tmp_path, toy.run.path, *how) == wanted
    assert chosen(tmp_path, "--cluster", 0, 2, toy.run.path) == wanted
    assert chosen(tmp_path, toy.analysis.path, "--cluster", 0, 2) == wanted


def test_labels_of_ones_own(toy: Toy, tmp_path: Path) -> None:
    own = (np.arange(180) >= 100).astype(int)
    write_pickle(tmp_path / "own.pkl", own)
    assert chosen(tmp_path, toy.run.path, "--labels", tmp_path / "own.pkl", "--cluster", 1) == where(own == 1)
    assert chosen(
        tmp_path, toy.run.path, "--labels", tmp_path / "own.pkl", "--where", "cluster == 1 and row < 110"
    ) == list(range(100, 110))


def test_a_lasso_of_the_report(toy: Toy, tmp_path: Path) -> None:
    lasso = {"kind": "cryosuite selection", "version": 1, "run": "run", "epoch": 2, "n_particles": 180, "rows": [3, 50]}
    (tmp_path / "lasso.json").write_text(json.dumps(lasso))
    assert chosen(tmp_path, toy.run.path, "--from", tmp_path / "lasso.json") == [3, 50]
    (tmp_path / "rows.txt").write_text("# pasted from the report\n3, 50\n7\n")
    assert chosen(tmp_path, toy.run.path, "--from", tmp_path / "rows.txt") == [3, 7, 50]
    (tmp_path / "original_indices.txt").write_text("# original indices, from 0\n23\n70\n")
    with pytest.raises(InputError, match="original indices, not rows"):
        select(toy.run.path, "--from", tmp_path / "original_indices.txt", "-o", tmp_path / "ind.pkl")
    write_pickle(tmp_path / "indices.pkl", np.array([23, 70]))
    assert chosen(tmp_path, toy.run.path, "--from", tmp_path / "indices.pkl") == [3, 50]


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"n_particles": 200}, "drawn among 200 particles, not 180"),
        ({"rows": [3, 180]}, "row 180 is not among the 180"),
        ({"rows": [-1]}, "row -1"),
        ({"rows": [1.5]}, "whole numbers"),
        ({"rows": [True]}, "whole numbers"),
        ({"rows": "all"}, "whole numbers"),
        ({"kind": "other"}, "not a selection"),
        ({"version": 2}, "not a selection"),
    ],
)
def test_a_lasso_that_does_not_fit_is_refused(toy: Toy, tmp_path: Path, changes: dict, mention: str) -> None:
    lasso = {"kind": "cryosuite selection", "version": 1, "run": "run", "epoch": 2, "n_particles": 180, "rows": [3]}
    (tmp_path / "lasso.json").write_text(json.dumps({**lasso, **changes}))
    with pytest.raises(InputError, match=mention):
        select(toy.run.path, "--from", tmp_path / "lasso.json", "-o", tmp_path / "ind.pkl")
    assert not (tmp_path / "ind.pkl").exists()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1 two 3", "1.5", "-4", "99999999999999999999", "\x00"])
def test_files_that_are_no_lasso_are_refused(toy: Toy, tmp_path: Path, text: str) -> None:
    (tmp_path / "lasso.json").write_text(text)
    with pytest.raises(InputError, match="lasso.json"):
        select(toy.run.path, "--from", tmp_path / "lasso.json", "-o", tmp_path / "ind.pkl")


def test_a_lasso_of_another_run_is_told(toy: Toy, tmp_path: Path) -> None:
    lasso = {"kind": "cryosuite selection", "version": 1, "run": "other", "epoch": 9, "n_particles": 180, "rows": [3]}
    (tmp_path / "lasso.json").write_text(json.dumps(lasso))
    with pytest.warns(UserWarning, match="drawn in run other") as told:
        assert chosen(tmp_path, toy.run.path, "--from", tmp_path / "lasso.json") == [3]
    assert any("epoch 9" in str(one.message) for one in told)


def test_conditions_without_a_table(toy: Toy, tmp_path: Path) -> None:
    """Latents, clusters, what the set knows and columns of the star file the set was made from."""
    particles = open_particles(toy.run.path)
    defocus = particles.ctf[:, 2:4].mean(axis=1)
    middle = float(np.median(defocus))
    assert chosen(tmp_path, toy.run.path, "--where", f"defocus > {middle}") == where(defocus > middle)
    assert chosen(tmp_path, toy.run.path, "--where", "z2 > 2.5 and cluster != 0") == where(
        (toy.z[:, 1] > 2.5) & (toy.labels != 0)
    )
    assert chosen(tmp_path, toy.run.path, "--where", "index >= 150") == list(range(130, 180))
    assert chosen(tmp_path, toy.run.path, "--where", "index_from_0 >= 150") == list(range(130, 180))
    assert chosen(tmp_path, toy.run.path, "--where", "cluster_from_0 == 2") == where(toy.labels == 2)
    star = load_metadata(open_particles(toy.run.path)).particles
    values = star["rlnDefocusU"].to_numpy()
    assert chosen(tmp_path, toy.run.path, "--where", f"rlnDefocusU < {middle}") == where(values < middle)
    above = set(chosen(tmp_path, toy.run.path, "--where", "pc1 > 0"))
    assert (
        above | set(chosen(tmp_path, toy.run.path, "--where", "pc1 <= 0")) == set(range(180)) and 0 < len(above) < 180
    )


def test_conditions_on_the_table_of_analyze(toy: Toy, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", toy.run.read_config()["particles"], 180)
    confidence = np.linspace(0, 1, 180)
    columns = particle_columns(run.z, run.labels, open_particles(run.run.path), confidence=confidence)
    write_particle_table(run.analysis.particles, columns)
    assert chosen(tmp_path, run.run.path, "--where", "confidence > 0.8 and cluster == 1") == where(
        (confidence > 0.8) & (run.labels == 1)
    )
    with pytest.raises(InputError, match=r"no column 'certainty'. Known: row_from_0, index_from_0.*confidence.*z1"):
        select(run.run.path, "--where", "certainty > 0.8", "-o", tmp_path / "ind.pkl")
    written = run.analysis.particles.read_text()
    assert written.startswith("row_from_0,index_from_0,")
    for text in (written, written.replace("_from_0", "")):  # as we write it, and as we did once
        run.analysis.particles.write_text(text)
        for name in ("cluster", "cluster_from_0"):
            assert chosen(tmp_path, run.run.path, "--where", f"{name} == 1") == where(run.labels == 1)
        assert chosen(tmp_path, run.run.path, "--where", "index_from_0 < 60 and row > 9") == list(range(10, 40))
    with pytest.raises(InputError, match="no column 'confidence_from_0'"):
        select(run.run.path, "--where", "confidence_from_0 > 0", "-o", tmp_path / "ind.pkl")
    lines = run.analysis.particles.read_text().splitlines()
    run.analysis.particles.write_text("\n".join(lines[:100]) + "\n")
    with pytest.raises(InputError, match="99 rows for 180 particles"):
        select(run.run.path, "--where", "confidence > 0.8", "-o", tmp_path / "ind.pkl")


def test_neighbours_in_latent_space(toy: Toy, tmp_path: Path) -> None:
    distance = np.linalg.norm(toy.z - toy.z[7], axis=1)
    assert chosen(tmp_path, toy.run.path, "--near-row", 7, "--count", 5) == sorted(np.argsort(distance)[:5].tolist())
    mean = toy.z[toy.labels == 1].mean(axis=0)
    centre = toy.z[np.linalg.norm(toy.z - mean, axis=1).argmin()]
    near = np.argsort(np.linalg.norm(toy.z - centre, axis=1))[:20]
    assert chosen(tmp_path, toy.run.path, "--near-volume", 1, "--count", 20) == sorted(near.tolist())


def test_the_volume_lies_where_analyze_decoded_it(toy: Toy, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", toy.run.read_config()["particles"], 180)
    summary = {"kind": "analysis", "run": "..", "epoch": 2, "kmeans": {"folder": "gmm-direct-3"}}
    write_yaml(run.analysis.summary, summary)
    folder = run.analysis.clusters("gmm-direct", 3)
    folder.path.mkdir()
    folder.centers_index.write_text("0\n4\n5\n")
    near = np.argsort(np.linalg.norm(run.z - run.z[4], axis=1))[:20]
    assert chosen(tmp_path, run.run.path, "--near-volume", 1, "--count", 20) == sorted(near.tolist())
    write_pickle(tmp_path / "own.pkl", run.labels)  # labels of one's own: the middle of these
    own = chosen(tmp_path, run.run.path, "--near-volume", 1, "--count", 20, "--labels", tmp_path / "own.pkl")
    assert own == chosen(tmp_path, toy.run.path, "--near-volume", 1, "--count", 20) != sorted(near.tolist())


def test_text_that_looks_like_numbers_stays_text(toy: Toy, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", toy.run.read_config()["particles"], 180)
    names = ("001", "=002", "NA")
    columns = [Column("row", np.arange(180)), Column("micrograph", np.arange(180) % 3, names=names)]
    columns += [Column("class_name", np.arange(180) % 2, names=("01", "1"))]
    write_particle_table(run.analysis.particles, columns)
    assert chosen(tmp_path, run.run.path, "--where", "micrograph == '001'") == where(np.arange(180) % 3 == 0)
    assert chosen(tmp_path, run.run.path, "--where", "micrograph == '=002'") == where(np.arange(180) % 3 == 1)
    assert chosen(tmp_path, run.run.path, "--where", "micrograph == 'NA'") == where(np.arange(180) % 3 == 2)
    assert chosen(tmp_path, run.run.path, "--where", "class_name == '1'") == where(np.arange(180) % 2 == 1)


def test_latents_that_are_no_numbers_are_nobodys_neighbours(toy: Toy, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", toy.run.read_config()["particles"], 180)
    z = run.z.copy()
    z[4] = np.nan
    write_pickle(run.run.z(2), z)
    found = chosen(tmp_path, run.run.path, "--near-row", 7, "--count", 179)
    assert found == [row for row in range(180) if row != 4]
    with pytest.raises(InputError, match="row 4 is NaN"):
        select(run.run.path, "--near-row", 4, "-o", tmp_path / "ind.pkl")
    assert 4 not in chosen(tmp_path, run.run.path, "--where", "pc1 > 0 or pc1 <= 0")


def test_conditions_are_joined_turned_round_and_narrowed(toy: Toy, tmp_path: Path) -> None:
    write_pickle(tmp_path / "half.pkl", np.arange(20, 110))
    first = toy.labels == 1
    late = np.arange(180) >= 60
    both = ["--cluster", 1, "--where", "row >= 60"]
    assert chosen(tmp_path, toy.run.path, *both) == where(first & late)
    assert chosen(tmp_path, toy.run.path, *both, "--not") == where(~(first & late))
    assert chosen(tmp_path, toy.run.path, *both, "--with", tmp_path / "half.pkl") == where(
        first & late & (np.arange(180) < 90)
    )
    some = chosen(tmp_path, toy.run.path, *both, "--random", 10, "--seed", 3)
    assert len(some) == 10 and set(some) <= set(where(first & late))
    assert some == chosen(tmp_path, toy.run.path, *both, "--random", 10, "--seed", 3)
    assert some != chosen(tmp_path, toy.run.path, *both, "--random", 10, "--seed", 4)


def test_an_empty_selection_says_which_condition_left_nothing(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no particle of 180 is selected.*--cluster 1: 60.*row < 0\.5.*: 1\).*none"):
        select(
            toy.run.path, "--cluster", 1, "--where", "row < 0.5", "-o", tmp_path / "a.pkl", "-o", tmp_path / "a.star"
        )
    assert not list(tmp_path.glob("a.*"))


def test_several_files_at_once_hold_the_same_particles(toy: Toy, golden: Path, tmp_path: Path) -> None:
    output = select(toy.run.path, "--cluster", 2, "-o", tmp_path / "a.pkl", "-o", tmp_path / "a.star")
    assert "60" in output
    rows = read_indices(tmp_path / "a.pkl")
    star, whole = open_particles(tmp_path / "a.star"), open_particles(golden / "relion/particles.star")
    assert star.box_size == 64 and np.array_equal(star.rotation, whole.rotation[rows])
    assert np.array_equal(star.read(slice(None)), whole.read(rows))


def test_cryosparc_particles(golden: Path, tmp_path: Path) -> None:
    source = golden / "adversarial/good.cs"
    uid = read_cs(source)["uid"][3]
    files = [word for kind in ("cs", "star", "pkl") for word in ("-o", tmp_path / f"a.{kind}")]
    select(source, "--where", f"ctf/df1_A > 0 and uid in [{uid}]", *files)
    assert np.array_equal(read_cs(tmp_path / "a.cs"), read_cs(source)[3:4])
    assert read_indices(tmp_path / "a.pkl").tolist() == [3] and len(open_particles(tmp_path / "a.star")) == 1


def test_nothing_is_written_when_one_file_cannot_be(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no .cs file"):
        select(toy.run.path, "--cluster", 2, "-o", tmp_path / "a.pkl", "-o", tmp_path / "a.cs")
    with pytest.raises(InputError, match="given twice"):
        select(toy.run.path, "--cluster", 2, "-o", tmp_path / "a.pkl", "-o", tmp_path / "a.pkl")
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        ([], "say which particles"),
        (["--cluster", "x"], "--cluster x"),
        (["--cluster", 7], r"no particle in cluster 7.*0 \(60\)"),
        (["--random", 0], "--random 0"),
        (["--cluster", 1, "--seed", 3], "--seed 3: is only for --random"),
        (["--near-row", 500], "rows go from 0 to 179"),
        (["--near-volume", 5], "no particle in cluster 5"),
        (["--near-row", 1, "--count", 0], "--count 0"),
        (["--cluster", 1, "--count", 5], "--count 5.*--near-volume"),
        (["--cluster", 1, "--epoch", 7], "epoch 7"),
        (["--cluster", 1, "--analysis", "nowhere"], "nowhere: has no labels.pkl"),
    ],
)
def test_unclear_wishes_are_answered(toy: Toy, tmp_path: Path, options: list, mention: str) -> None:
    with pytest.raises(InputError, match=mention):
        select(toy.run.path, *options, "-o", tmp_path / "ind.pkl")


def test_sets_without_latents_or_labels_say_what_is_missing(golden: Path, tmp_path: Path) -> None:
    star = golden / "relion/particles.star"
    with pytest.raises(InputError, match="no latents"):
        select(star, "--near-row", 1, "-o", tmp_path / "ind.pkl")
    with pytest.raises(InputError, match="--labels labels.pkl"):
        select(star, "--cluster", 1, "-o", tmp_path / "ind.pkl")
    with pytest.raises(InputError, match="not a training run"):
        select(star, "--random", 3, "--epoch", 1, "-o", tmp_path / "ind.pkl")
    select(star, "--random", 3, "-o", tmp_path / "ind.pkl")
    assert len(read_indices(tmp_path / "ind.pkl")) == 3


def test_an_analysis_elsewhere_knows_its_run(toy: Toy, tmp_path: Path) -> None:
    elsewhere = tmp_path / "look"
    elsewhere.mkdir()
    write_pickle(elsewhere / "labels.pkl", (np.arange(180) < 5).astype(int))
    write_yaml(elsewhere / "analyze.yaml", {"kind": "analysis", "run": str(toy.run.path), "epoch": 1})
    assert chosen(tmp_path, elsewhere, "--cluster", 1) == list(range(5))
    assert chosen(tmp_path, toy.run.path, "--analysis", elsewhere, "--cluster", 1) == list(range(5))
    write_yaml(elsewhere / "analyze.yaml", {"kind": "analysis", "run": "gone", "epoch": 1})
    with pytest.raises(InputError, match="give the run"):
        select(elsewhere, "--cluster", 1, "-o", tmp_path / "ind.pkl")


def test_an_analysis_of_another_epoch_or_training_is_not_mixed_in(toy: Toy, tmp_path: Path) -> None:
    """Labels of one epoch beside latents of another are refused; those of an earlier training are told."""
    run = make_run(tmp_path / "run", toy.run.read_config()["particles"], 180)
    for place in ([run.run.path, "--analysis", run.analysis.path], [run.analysis.path]):
        with pytest.raises(InputError, match="--epoch 1.*analysis of epoch 2"):
            select(*place, "--epoch", 1, "--cluster", 1, "-o", tmp_path / "ind.pkl")
    summary = {"kind": "analysis", "run": "..", "epoch": 2, "latents": fingerprint(run.z)}
    write_yaml(run.analysis.summary, summary)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen(tmp_path, run.run.path, "--epoch", 2, "--cluster", 1)
    write_pickle(run.run.z(2), run.z + 1)
    with pytest.warns(UserWarning, match="made of other latents"):
        chosen(tmp_path, run.run.path, "--cluster", 1)


def test_an_analysis_that_is_not_needed_is_in_nobodys_way(toy: Toy, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", toy.run.read_config()["particles"], 180)
    write_pickle(run.analysis.labels, np.arange(7))
    assert len(chosen(tmp_path, run.run.path, "--random", 9)) == 9
    with pytest.raises(InputError, match="7 labels, but"):
        select(run.run.path, "--cluster", 1, "-o", tmp_path / "ind.pkl")


def test_confidence_is_that_of_the_labels_given(toy: Toy, tmp_path: Path) -> None:
    """Not the one that the table of the analysis has for its own clusters."""
    run = make_run(tmp_path / "run", toy.run.read_config()["particles"], 180)
    columns = particle_columns(run.z, run.labels, open_particles(run.run.path), confidence=np.zeros(180))
    write_particle_table(run.analysis.particles, columns)
    own = (run.z[:, 0] > 2.5).astype(int)
    write_pickle(tmp_path / "own.pkl", own)
    sure = chosen(tmp_path, run.run.path, "--labels", tmp_path / "own.pkl", "--where", "confidence > 0.9")
    assert sure == where(round_confidence(run.z, own) > 0.9) and len(sure) > 60


def test_copies_are_named_once_and_rows_as_often_as_they_are_asked_for():
    index = np.array([4, 7, 4, 9])
    rows, missing = rows_of_indices(index, np.array([9, 4, 9, 5, 4]))
    assert rows.tolist() == [3, 0, 2, 3] and missing == 1
    assert rows_of_indices(index, np.array([1]))[0].tolist() == []
