"""The report and the table of particles: what they hold, that nothing in them is code or a link, and bad days."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from report_toy import CLUSTERS, EVIL, D, make_analysis, particle_set, write_all

from cryosuite.analysis.particle_table import Column
from cryosuite.analysis.report import _pack
from cryosuite.analysis.report_maps import find_maps
from cryosuite.analysis.report_pack import packed, script_json, thinned
from cryosuite.analysis.report_page import command, page_file, plotly_script
from cryosuite.analysis.report_pictures import TILE, for_the_eye, turning, typical_and_odd
from cryosuite.analysis.report_read import read_analysis, shown_path
from cryosuite.data.latents import fingerprint
from cryosuite.data.orientations import from_euler
from cryosuite.data.results import MapsDir, PolishDir
from cryosuite.data.typed import typed
from cryosuite.data.workdir import VolumeDir
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.config import write_yaml
from cryosuite.formats.mrc import write_map
from cryosuite.formats.pickles import write_pickle


class Page(HTMLParser):
    """Elements of a page: start tags with attributes, and the text of scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("id") or f"script {len(self.scripts)}"

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    @property
    def meta(self) -> dict:
        return json.loads(self.scripts["meta"])


def values_of(page: Page, name: str) -> np.ndarray:
    """A column as the page's script unpacks it."""
    column = next(c for c in page.meta["columns"] if c["name"] == name)
    if column["kind"] == "count":
        return np.arange(page.meta["particles"])
    kind = {"u8": "u1", "u16": "<u2", "u32": "<u4", "f32": "<f4"}[column["kind"]]
    stored = np.frombuffer(base64.b64decode(page.scripts[f"column-{column['number']}"]), kind)
    missing = np.isnan(stored) if column["kind"] == "f32" else stored == np.iinfo(kind).max
    return np.where(missing, np.nan, column["low"] + column["step"] * stored.astype(float))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, Page]:
    """A report with everything that several tests look at."""
    out, z = make_analysis(tmp_path_factory.mktemp("report") / "analyze.7", bad=(9,))
    path = write_all(out, z, particle_set(len(z)))
    return path, z, Page(path.read_text(encoding="utf-8"))


def test_table_holds_what_the_set_and_its_file_know(made) -> None:
    path, z, _ = made
    table = pd.read_csv(path.parent / "particles.csv")
    particles = particle_set(len(z))
    assert len(table) == len(z)
    np.testing.assert_array_equal(table["row_from_0"], np.arange(len(z)))
    np.testing.assert_array_equal(table["index_from_0"], particles.index)
    np.testing.assert_allclose(table["defocus"], particles.ctf[:, 2] - 100, rtol=1e-5)
    np.testing.assert_allclose(table["shift"], np.linalg.norm(particles.shift, axis=1) * D * 3.0, rtol=1e-4)
    angles = table[["rot", "tilt", "psi"]].to_numpy()
    np.testing.assert_allclose(from_euler(angles), particles.rotation, atol=1e-3)
    assert list(table["micrograph"][:1]) == [EVIL] and set(table["rlnClassNumber"]) == {1, 2, 3}
    assert np.isnan(table["umap1"][9]) and table["cluster_from_0"][9] == -1 and np.isnan(table["confidence"][9])
    assert table["pc1"].notna().sum() == len(z) - 1
    assert "rlnImageName" not in table and "rlnDefocusU" not in table
    assert all(name.isidentifier() for name in table.columns), "names can be typed in a condition"
    meaning = pd.read_csv(path.parent / "particles_columns.csv")
    assert list(meaning["column"]) == list(table.columns)
    assert meaning.set_index("column")["unit"][["defocus", "shift", "tilt"]].tolist() == ["A", "A", "degrees"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([0, 3, 200]), "u8"), (np.array([-5, 60_000]), "u16"), (np.array([0, 70_000, 4_000_000_000]), "u32"),
        (np.array([-1, 2**33]), "f32"), (np.linspace(-1, 1, 50), "u16"), (np.r_[np.linspace(0, 1, 5000), 1e6], "f32"),
        (np.full(3, 2.5), "u16"), (np.full(3, np.nan), "u16"), (np.r_[np.linspace(0, 9, 50), np.nan, np.inf], "u16"),
    ],
    ids=["few", "whole", "large", "huge", "real", "far values", "equal", "none known", "some unknown"],
)  # fmt: skip
def test_packed_numbers_come_back(values: np.ndarray, kind: str) -> None:
    head, text = packed(Column("x", values))
    assert head["kind"] == kind
    kinds = {"u8": "u1", "u16": "<u2", "u32": "<u4", "f32": "<f4"}
    stored = np.frombuffer(base64.b64decode(text), kinds[kind]).astype(float)
    known = np.isfinite(values)
    step = 0.0 if kind == "f32" else head["step"]
    back = stored if kind == "f32" else head["low"] + step * stored
    tolerance = 1e-6 * np.abs(values[known]) if kind == "f32" else 0.51 * step * (not head["whole"]) + 1e-12
    assert (np.abs(back[known] - values[known]) <= tolerance).all()
    if kind != "f32":
        assert (stored[~known] == np.iinfo(kinds[kind]).max).all() and (stored[known] < np.iinfo(kinds[kind]).max).all()
    json.dumps(head, allow_nan=False)


@pytest.mark.parametrize(
    "values",
    [
        np.array([2**63 + 1, 2**63 + 3, 2**63 + 1, 7], np.uint64), np.array([-1, 2**33 + 1, 2**33, -1]),
        np.array([2.0**40, np.nan, 2.0**40 + 1]), np.array([5, 6, 5]),
    ],
    ids=["64 bits", "huge", "some unknown", "small"],
)  # fmt: skip
def test_ids_of_any_size_are_categories_that_the_page_tells_apart(values: np.ndarray) -> None:
    (head,), (script,), left = _pack([Column("filament_uid", values)], found=None)
    assert not left and head["kind"] == "u8"
    stored = np.frombuffer(base64.b64decode(Page(script).scripts["column-0"]), "u1")
    known = np.isfinite(values)
    text = {entry["value"]: entry["text"] for entry in head["categories"]}
    back = [text[head["low"] + head["step"] * number] for number in stored[known].tolist()]
    assert back == [str(int(value)) for value in values[known]]
    assert (stored[~known] == 255).all()


def test_page_holds_all_particles_exactly_or_to_a_65534th(made) -> None:
    path, z, page = made
    table = pd.read_csv(path.parent / "particles.csv")
    for name in ("umap1", "umap2", "pc1", "defocus", "tilt", "confidence", "rlnAutopickFigureOfMerit"):
        span = table[name].max() - table[name].min()
        rounding = span / 60_000 + 1e-5 * abs(table[name].max())
        np.testing.assert_allclose(values_of(page, name), table[name], atol=rounding)
    for name, header in (("row", "row_from_0"), ("index", "index_from_0"), ("rlnClassNumber", "rlnClassNumber")):
        np.testing.assert_array_equal(values_of(page, name), table[header])
    np.testing.assert_array_equal(np.nan_to_num(values_of(page, "cluster"), nan=-1), table["cluster_from_0"])
    assert page.meta["particles"] == len(z) and "rlnConstant" not in {c["name"] for c in page.meta["columns"]}
    assert page.meta["selection"] == {"run": "my run", "epoch": 7, "n_particles": len(z)}


def test_nothing_from_files_is_code(made) -> None:
    """Names stay text: the page has just the elements and scripts of the template, and no inline handlers."""
    path, _, page = made
    text = path.read_text(encoding="utf-8")
    assert EVIL not in text and "<img src=x" not in text
    assert {name for name, _ in page.tags if name in ("iframe", "object", "embed", "base")} == set()
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    running = [a for tag, a in page.tags if tag == "script" and a.get("type") in (None, "module")]
    assert len(running) == 1, "the page's own script; it starts plotly"
    names = next(c for c in page.meta["columns"] if c["name"] == "micrograph")["names"]
    assert EVIL in names and "</script><b>.mrc" in names
    assert html.unescape(page.text).count(EVIL) >= 1, "the command is shown as it was typed"


def test_page_needs_no_network(made) -> None:
    path, _, page = made
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:", "#")), (tag, name, value[:80])
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy and "connect-src" not in policy
    own = path.read_text(encoding="utf-8").replace(plotly_script(), "")
    assert not re.findall(r"https?://|url\(\s*[\"']?//|@import", own)
    assert path.stat().st_size < 12e6


def test_page_shows_each_cluster(made) -> None:
    _, _, page = made
    assert len(page.meta["clusters"]) == CLUSTERS
    for label, cluster in enumerate(page.meta["clusters"]):
        assert cluster["label"] == label and cluster["size"] == (49 if label == 1 else 50)
        (volume,) = cluster["maps"]
        assert page.scripts[volume["strip"]].startswith("data:image/webp;base64,")
        assert page.scripts[volume["planes"]].startswith("data:image/webp;base64,")
        assert volume["file"] == f"kmeans4/vol_{label:03d}.mrc", "no path of this disk"
        for which in ("typical", "odd"):
            assert len(cluster["particles"][which]["rows"]) == 12
            assert all(row % CLUSTERS == label for row in cluster["particles"][which]["rows"])
            assert page.scripts[cluster["particles"][which]["picture"]].startswith("data:image/webp;base64,")
    assert "9" in page.text and "left out" in page.text
    assert list(page.meta["curves"]) == ["loss"], "numbers that never change are no curve"


def test_turning_volumes_are_kept_and_drawn_again_with_new_volumes(tmp_path: Path) -> None:
    out, z = make_analysis(tmp_path / "a", 40)
    write_all(out, z, None)
    kept = out.turntable(0)
    before = kept.stat().st_mtime_ns, kept.read_bytes()
    write_all(out, z, None)
    assert kept.stat().st_mtime_ns == before[0]
    other = np.zeros((D, D, D), np.float32)
    other[5:11, 3:13, 6:9] = 1
    write_map(out.kmeans(CLUSTERS).volume(0), other, 3.0)
    write_all(out, z, None)
    assert kept.read_bytes() != before[1]
    # a file that is older than the pictures, as of another folder of maps, is another one all the same
    write_map(out.kmeans(CLUSTERS).volume(0), np.roll(other, 4, 0), 3.0)
    os.utime(out.kmeans(CLUSTERS).volume(0), (1e9, 1e9))
    drawn = kept.read_bytes()
    write_all(out, z, None)
    assert kept.read_bytes() != drawn


def test_a_turning_volume_is_drawn_again_where_it_is_to_look_otherwise(tmp_path: Path) -> None:
    path, kept = tmp_path / "v.mrc", tmp_path / "kept.webp"
    volume = np.zeros((D, D, D), np.float32)
    volume[5:11, 3:13, 6:9] = 1
    write_map(path, volume, 3.0)
    shown = [(0.5, "#ff0000", 1.0), (0.5, "#00ff00", 1.0), (0.5, "#00ff00", 2.0), (None, "#00ff00", 2.0)]
    pictures = [turning(path, kept, level, colour, 3.0, zoom, 3).uri for level, colour, zoom in shown]
    assert len(set(pictures)) == len(shown)
    drawn = kept.stat().st_ino
    assert turning(path, kept, None, "#00ff00", 3.0, 2.0, 3).uri == pictures[-1] and kept.stat().st_ino == drawn


def test_volumes_of_other_clusters_are_not_shown(tmp_path: Path) -> None:
    """As `analyze --skip-vol` leaves those of an earlier analysis in the folder."""
    out, z = make_analysis(tmp_path / "a", 24)
    folder = out.kmeans(CLUSTERS)
    folder.centers.write_text("1 2 3\n")
    folder.z_values.write_text("1 2 3\n")
    assert all(c["maps"] for c in Page(write_all(out, z, None).read_text(encoding="utf-8")).meta["clusters"])
    folder.centers.write_text("1 2 4\n")
    assert not any(c["maps"] for c in Page(write_all(out, z, None).read_text(encoding="utf-8")).meta["clusters"])


def test_commands_shown_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path, text in (("-run", "./-run"), ("my run/a", "'my run/a'"), ("-my run", "'./-my run'"), ("run", "run")):
        assert shown_path(tmp_path / path) == shown_path(Path(path)) == typed(path) == text
    assert shown_path(tmp_path.parent / "b") == str(tmp_path.parent / "b")


def test_pictures_of_other_latents_are_not_shown(tmp_path: Path) -> None:
    """Trajectories and landscapes stay in the folder when a run is trained anew."""
    out, z = make_analysis(tmp_path / "a", 24)
    noted = {"of_these": fingerprint(z), "of_others": fingerprint(2 * z), "of_old": None}
    for name, latents in noted.items():
        folder = VolumeDir(out.trajectories / name)
        folder.path.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder.plot("volumes"))
        if latents:
            write_yaml(folder.summary, {"kind": "trajectory", "latents": latents})
    out.landscape.path.mkdir()
    Image.new("RGB", (8, 8)).save(out.landscape.plot("states"))
    write_yaml(out.landscape.summary, {"latents": noted["of_others"]})
    with pytest.warns(UserNotice, match="other latents") as told:
        text = write_all(out, z, None).read_text(encoding="utf-8")
    assert sum("other latents" in str(one.message) for one in told) == 2
    assert "Trajectory: trajectories/of_these/volumes.png" in text
    assert "of_others" not in text and "landscape/states.png" not in text
    assert "Trajectory (of which latents is not noted; perhaps of earlier ones): trajectories/of_old" in text


@pytest.mark.parametrize("what", ["no UMAP", "no volumes", "no particles", "one particle", "zdim 1", "all NaN but one"])
def test_bad_days_still_give_a_page(tmp_path: Path, what: str) -> None:
    count = 1 if what == "one particle" else 24
    bad = tuple(range(1, 24)) if what == "all NaN but one" else ()
    out, z = make_analysis(
        tmp_path / "a", count, umap=what not in ("no UMAP", "zdim 1"), zdim=1 if what == "zdim 1" else 3,
        volumes=what != "no volumes", bad=bad,
    )  # fmt: skip
    page = Page(write_all(out, z, None if what == "no particles" else particle_set(count)).read_text(encoding="utf-8"))
    assert page.meta["particles"] == count
    first = page.meta["spaces"][0]["name"]
    assert first == {"no UMAP": "PCA", "zdim 1": "Latent"}.get(what, "UMAP")
    assert {s["x"] for s in page.meta["spaces"]} <= {c["name"] for c in page.meta["columns"]}
    pictures = [c["particles"]["typical"]["picture"] for c in page.meta["clusters"] if c["size"]]
    assert all(pictures) == (what != "no particles")
    assert any(c["maps"] for c in page.meta["clusters"]) == (what != "no volumes")


def test_particles_whose_images_are_gone_are_told(tmp_path: Path) -> None:
    class Gone:
        def __len__(self) -> int:
            return 24

        def read(self, rows: np.ndarray) -> np.ndarray:
            raise InputError("stack.mrcs: <gone>")

    out, z = make_analysis(tmp_path / "a", 24)
    particles = particle_set(24)
    particles.images = Gone()
    text = write_all(out, z, particles).read_text(encoding="utf-8")
    assert "stack.mrcs: &lt;gone&gt;" in text


def test_an_analysis_of_other_particles_is_refused(tmp_path: Path) -> None:
    out, z = make_analysis(tmp_path / "a", 24)
    with pytest.raises(InputError, match="24 labels.*23 latents"):
        read_analysis(out, z[:-1])
    with pytest.raises(InputError, match="no finished analysis"):
        read_analysis(type(out)(tmp_path), z)


def test_polished_maps_are_shown_where_their_classes_are_the_clusters(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2], 20)
    index = np.arange(60) + 100
    folder = PolishDir(tmp_path / "polish")
    folder.path.mkdir()
    # the polish numbers the first two the other way round, and cuts the third in halves
    other = np.where(labels == 2, 2 + np.arange(60) % 2, 1 - labels)
    write_pickle(folder.labels, other[::-1].copy())
    write_pickle(folder.index, index[::-1].copy())
    for k in range(4):
        write_map(folder.map(k), np.ones((4, 4, 4), np.float32), 5.0)
    folder.fsc.write_text("shell,resolution_A,class_000,class_001\n1,20,1.0,0.9\n2,10,0.4,0.1\n")
    folder.classes.write_text("class,particles,resolution_0.143_A,resolution_0.5_A\n0,20,10,14\n1,20,12,15\n")
    write_yaml(folder.summary, {"classes": 4})
    found = find_maps([folder.path], labels, index)
    assert [(one.label, one.path.name, one.resolution) for one in found] == [
        (0, "vol_001.mrc", (12, 15)), (1, "vol_000.mrc", (10, 14)),
    ]  # fmt: skip
    np.testing.assert_allclose(found[1].curve[0], [0.05, 0.1])
    np.testing.assert_allclose(found[1].curve[1], [1.0, 0.4])
    folder.classes.write_text(folder.classes.read_text().replace("class,", "class_from_0,"))  # not of an older polish
    assert [one.resolution for one in find_maps([folder.path], labels, index)] == [(12, 15), (10, 14)]


def test_backprojections_tell_their_resolution(tmp_path: Path) -> None:
    one = MapsDir(tmp_path).of_class(1)
    one.path.mkdir()
    write_map(one.map, np.ones((8, 8, 8), np.float32), 2.0)
    one.fsc.write_text("pixres unmasked masked\n0.125 1 1\n0.25 1 0.9\n0.375 0.5 0.5\n0.5 0 0.1\n")
    labels, index = np.array([0, 0, 1, 1]), np.arange(4)
    write_pickle(MapsDir(tmp_path).labels, np.array([1, 1, 0, 0]))
    write_pickle(MapsDir(tmp_path).index, index[::-1].copy())
    (found,) = find_maps([tmp_path], labels, index)
    assert found.kind == "backprojected" and found.label == 1
    assert found.resolution[1] == pytest.approx(2.0 / 0.375)
    expected = 0.375 + 0.125 * (0.5 - 0.143) / 0.4
    assert found.resolution[0] == pytest.approx(2.0 / expected, rel=1e-4)


def test_backprojections_of_other_classes_are_not_shown(tmp_path: Path) -> None:
    folder, labels, index = MapsDir(tmp_path), np.repeat([0, 1], 10), np.arange(20)
    for label in (0, 1):
        folder.of_class(label).path.mkdir()
        write_map(folder.of_class(label).map, np.ones((4, 4, 4), np.float32), 2.0)
    with pytest.warns(UserWarning, match="run backproject again"):
        assert find_maps([tmp_path], labels, index) == []
    write_pickle(folder.index, index)
    write_pickle(folder.labels, np.arange(20) % 2)  # each class is half of either cluster
    assert find_maps([tmp_path], labels, index) == []
    write_pickle(folder.labels, 1 - labels)
    assert [one.path.parent.name for one in find_maps([tmp_path], labels, index)] == ["class_001", "class_000"]
    write_map(folder.map, np.ones((4, 4, 4), np.float32), 2.0)
    write_pickle(folder.labels, np.where(labels == 1, 1, -1))  # --cluster 1
    assert [(one.label, one.path) for one in find_maps([tmp_path], labels, index)] == [(1, folder.map)]


def test_typical_lie_near_the_middle_and_no_particle_is_both() -> None:
    z = np.concatenate([np.arange(11.0), [100.0]])[:, None]
    (typical, odd), empty = typical_and_odd(z, np.zeros(12, int), 2, shown=3)
    distance = np.abs(z[:, 0] - z.mean())
    assert distance[typical].max() < distance[odd].min() and odd[0] == 11
    assert empty == ([], [])
    (few, rest), _ = typical_and_odd(z, np.r_[0, 0, 0, -np.ones(9, int)], 2)
    assert sorted(few + rest) == [0, 1, 2]


def test_particles_for_the_eye_are_centred_and_smooth() -> None:
    size = 32
    axis = np.arange(size) - size // 2
    image = np.exp(-((axis[None] - 6) ** 2 + (axis[:, None] + 4) ** 2) / 8.0)
    noisy = (image + 0.15 * np.random.default_rng(0).normal(size=(size, size)))[None].astype(np.float32)
    (tile,) = for_the_eye(noisy, np.array([[-6 / size, 4 / size]]), np.array([4.0]))
    assert tile.shape == (TILE, TILE) and tile.dtype == np.uint8
    middle = np.argwhere(tile == tile.max()).mean(axis=0)  # the brightest hundredth is one white spot
    np.testing.assert_allclose(middle, (size // 2 + 0.5) * TILE / size - 0.5, atol=2)
    np.testing.assert_array_equal(for_the_eye(np.zeros((1, 8, 8)), np.zeros((1, 2)), np.ones(1))[0], 0)


def test_json_for_scripts_cannot_end_them() -> None:
    value = {"a": [EVIL, "<!--", "\u2028 &amp;", np.float32(np.nan), np.int64(3), np.arange(2)]}
    text = script_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": [EVIL, "<!--", "\u2028 &amp;", None, 3, [0, 1]]}
    shown = command("cryosuite train-hype\nrm -rf ~\r\x1b]0;x\x07 -o run", "c")  # a line end would run it on pasting
    assert not set("\n\r\x1b\x07") & set(shown) and "train-hype rm -rf ~" in shown


def test_thinned_curves_keep_their_mean() -> None:
    steps = [(float(i), float(i % 7)) for i in range(10_001)]
    x, y = thinned(steps, 100)
    assert len(x) == 100 and np.mean(y) == pytest.approx(3, abs=0.02) and x == sorted(x)
    assert thinned([(0.0, 1.0), (1.0, float("nan"))]) == [[0.0], [1.0]]


def test_films_and_pictures_of_trajectories_are_shown(tmp_path: Path) -> None:
    out, z = make_analysis(tmp_path / "a", 24, volumes=False)
    folder = out.path / "trajectories" / "direct <1>"
    folder.mkdir(parents=True)
    frames = [Image.fromarray(np.full((8, 8), grey, np.uint8)) for grey in (0, 200)]
    frames[0].save(folder / "movie.gif", save_all=True, append_images=frames[1:])
    frames[1].save(folder / "umap_traversal.png")
    page = Page(write_all(out, z, None).read_text(encoding="utf-8"))
    sources = [a["src"] for tag, a in page.tags if tag == "img"]
    assert base64.b64decode(sources[0].partition(",")[2]) == (folder / "movie.gif").read_bytes()
    assert sources[1].startswith("data:image/webp") and "direct <1>/umap_traversal.png" in page.text


def test_files_of_the_page_come_with_the_package() -> None:
    for name in ("report.html", "report.css", "main.js"):
        assert page_file(name)
    assert "</script" not in plotly_script()
