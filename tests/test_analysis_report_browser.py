"""The report in headless Chromium: it opens without errors, and hovering, colouring, clicking and selecting work."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, missing
from report_toy import CORNERS, EVIL, make_analysis, particle_set, write_all

from cryosuite.data.select import INDICES

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"the report is not tested in a browser: {missing()}")

COUNT = 200


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Path]]:
    """One browser for all tests; the folder of its downloads."""
    downloads = tmp_path_factory.mktemp("downloads")
    with Browser(downloads=downloads) as browser:
        yield browser, downloads


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, z = make_analysis(tmp_path_factory.mktemp("report") / "analyze.7", COUNT, bad=(9,))
    return write_all(out, z, particle_set(COUNT))


@pytest.fixture
def opened(window: tuple[Browser, Path], page: Path) -> Browser:
    browser = window[0]
    browser.open(page)
    browser.ready()
    return browser


def choose(browser: Browser, selector: str, value: str) -> None:
    """Take an entry of a drop-down list."""
    script = "const list = document.querySelector(arguments[0]); list.value = arguments[1];"
    browser.run(script + "list.dispatchEvent(new Event('change'));", selector, value)


def shown(browser: Browser, selector: str) -> str:
    """The text of an element."""
    return browser.run("return document.querySelector(arguments[0]).innerText", selector)


def at(browser: Browser, x: float, y: float) -> tuple[float, float]:
    """Window coordinates of a point of the map's axes."""
    script = (
        "const g = document.querySelector('#plot'), b = g.getBoundingClientRect(), {xaxis, yaxis} = g._fullLayout;"
        "return [b.x + xaxis._offset + xaxis.l2p(arguments[0]), b.y + yaxis._offset + yaxis.l2p(arguments[1])];"
    )
    return tuple(browser.run(script, x, y))


def pixels(browser: Browser) -> dict[str, int]:
    """How many pixels of the map have each colour, told apart coarsely."""
    script = (
        "const c = document.querySelector('#dots'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data,"
        "n = {}; for (let i = 0; i < d.length; i += 4) { const k = [d[i] >> 5, d[i+1] >> 5, d[i+2] >> 5].join();"
        "n[k] = (n[k] || 0) + 1; } return n;"
    )
    return browser.run(script)


def test_it_opens_without_errors_and_runs_no_code_from_names(opened: Browser) -> None:
    assert opened.errors() == []
    assert opened.run("return document.title") == "my run: cryosuite analysis"
    assert EVIL in shown(opened, "#command-train")
    assert len(pixels(opened)) > 6, "dots of several colours are drawn"
    assert (
        opened.run("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length")
        == 0
    )


def test_hover_tells_the_particle_and_its_micrograph(opened: Browser, page: Path) -> None:
    import pandas as pd

    table = pd.read_csv(page.parent / "particles.csv")
    own = table[table["cluster_from_0"] == 0]
    far = ((own["umap1"] - own["umap1"].median()) ** 2 + (own["umap2"] - own["umap2"].median()) ** 2).idxmax()
    choose(opened, "#colour-by", "defocus")
    opened.pointer(("move", *at(opened, table["umap1"][far], table["umap2"][far])))
    tip = opened.wait("!document.querySelector('#tip').hidden && document.querySelector('#tip').innerText")
    assert f"row of the run's set, from 0: {far}" in tip and "cluster, from 0: 0" in tip
    assert "micrograph: " in tip and "defocus:" in tip and "Å" in tip
    if far % 4 == 0:
        assert EVIL in tip
    assert opened.run("return document.querySelectorAll('#tip script, #tip b').length") == 0
    assert opened.errors() == []


def test_every_colouring_draws_and_has_a_legend(opened: Browser) -> None:
    names = opened.run("return [...document.querySelector('#colour-by').options].map(o => o.value)")
    assert {
        "cluster",
        "confidence",
        "defocus",
        "rot",
        "tilt",
        "shift",
        "micrograph",
        "rlnClassNumber",
        "density",
    } <= set(names)
    seen = set()
    for name in names:
        choose(opened, "#colour-by", name)
        legend = shown(opened, "#legend")
        assert legend.strip(), name
        seen.add(json.dumps(pixels(opened), sort_keys=True))
    assert len(seen) > len(names) // 2, "colourings differ"
    assert opened.errors() == []


def test_a_click_on_a_dot_the_legend_or_the_table_shows_the_cluster(opened: Browser) -> None:
    title = "document.querySelector('#card h2').textContent"
    opened.run("window.scrollTo(0, 0)")
    x, y = at(opened, *(CORNERS[3] + [0.2, 0.2]))
    opened.pointer(("move", x, y), ("down",), ("up",))
    opened.wait(f"{title} === 'Cluster 3'")
    opened.click("#legend button:nth-child(2)")
    opened.wait(f"{title} === 'Cluster 1'")
    assert shown(opened, "#card .facts").split("\n")[1] == "49"
    opened.run("document.querySelector('#cluster-table tbody tr:nth-child(3) button').focus()")
    opened.keys("\ue007")
    opened.wait(f"{title} === 'Cluster 2'")
    opened.run("document.activeElement.blur()")
    opened.keys("[")
    opened.wait(f"{title} === 'Cluster 1'")
    assert opened.run("return document.querySelector('.turntable').style.backgroundImage.slice(0, 20)").startswith(
        'url("data:image'
    )
    opened.wait("[...document.querySelectorAll('#card img')].every(i => i.complete && i.naturalWidth > 0)")
    opened.click("#card .tiles button")
    opened.wait("document.querySelector('#plot').layout.annotations.length === 1")
    assert opened.errors() == []


def test_a_lasso_by_the_mouse_becomes_a_selection_file(opened: Browser, window, page: Path) -> None:
    opened.run("window.scrollTo(0, 0)")
    opened.click("#tools button[data-tool=lasso]")
    corners = [(-1.6, -1.6), (-1.6, 3), (3, 3), (3, -1.6), (-1.6, -1.6)]
    steps: list[tuple] = [("move", *at(opened, *corners[0])), ("down",)]
    steps += [("move", *at(opened, x, y)) for x, y in corners[1:]]
    opened.pointer(*steps, ("up",))
    opened.wait("!document.querySelector('#selection').hidden")
    expected = [row for row in range(COUNT) if row % 4 == 0]
    assert shown(opened, "#selected-count").startswith("50 particles")
    text = opened.run("return document.querySelector('#selected-text').value")
    assert json.loads(text) == {
        "kind": "cryosuite selection", "version": 1, "run": "my run", "epoch": 7, "n_particles": COUNT,
        "rows": expected,
    }  # fmt: skip
    assert "cryosuite select" in shown(opened, "#selected-next")
    opened.click("#selected-save")
    saved = window[1] / "lasso.json"
    for _ in range(100):
        if saved.is_file():
            break
        time.sleep(0.1)
    assert json.loads(saved.read_text())["rows"] == expected
    choose(opened, "#selected-form", "index")
    text = opened.run("return document.querySelector('#selected-text').value")
    assert INDICES.match(text), "`select --from` would take them for rows"
    indices = [int(line) for line in text.splitlines()[1:]]
    assert indices == [int(particle_set(COUNT).index[row]) for row in expected]
    opened.click("#selected-invert")
    assert shown(opened, "#selected-count").startswith("149 particles")
    opened.click("#selected-clear")
    assert opened.run("return document.querySelector('#selection').hidden")
    assert opened.errors() == []


def test_a_box_and_a_second_one_with_shift(opened: Browser) -> None:
    opened.run("document.querySelector('#plot').emit('plotly_selected', {points: [], range: {x: [-3, 3], y: [-3, 3]}})")
    opened.wait("document.querySelector('#selected-count').textContent.startsWith('50 ')")
    opened.run("document.querySelector('#plot-box').dispatchEvent(new PointerEvent('pointerdown', {shiftKey: true}));")
    opened.run("document.querySelector('#plot').emit('plotly_selected', {points: [], range: {x: [7, 13], y: [-3, 3]}})")
    opened.wait("document.querySelector('#selected-count').textContent.startsWith('99 ')")


def test_other_axes_and_dark_colours(opened: Browser) -> None:
    light = pixels(opened)
    opened.click("#theme")
    opened.wait("getComputedStyle(document.documentElement).getPropertyValue('--dark').trim() === '1'")
    dark = pixels(opened)
    assert max(light, key=light.get) == "7,7,7" and max(dark, key=dark.get) == "0,1,1"
    opened.click("#spaces button:nth-child(2)")
    opened.wait("document.querySelector('#plot').layout.xaxis.title.text.startsWith('PC1')")
    choose(opened, "#axis-y", "defocus")
    opened.wait("document.querySelector('#plot').layout.yaxis.title.text === 'defocus (Å)'")
    assert len(pixels(opened)) > 6
    assert opened.errors() == []


@pytest.mark.parametrize("what", ["one particle", "zdim 1", "nothing but latents"])
def test_bad_days_open_without_errors(window: tuple[Browser, Path], tmp_path: Path, what: str) -> None:
    bare = what == "nothing but latents"
    count = 1 if what == "one particle" else 60
    out, z = make_analysis(
        tmp_path / "a", count, zdim=1 if what == "zdim 1" else 3, umap=not bare and what != "zdim 1", volumes=not bare
    )
    if bare:
        z = np.ones_like(z)
    path = write_all(out, z, None if bare else particle_set(count), records=())
    window[0].open(path)
    window[0].ready()
    assert window[0].errors() == []
    assert window[0].run("return document.querySelector('#card h2').textContent") == "Cluster 0"
