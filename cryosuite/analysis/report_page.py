"""The page of a report: template, style and scripts put together, and the parts that are plain HTML tables and text.

Everything that comes from files (names, values, commands) passes ``escaped`` or ``script_json``; the page itself
forbids every connection by its Content-Security-Policy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from cryosuite.analysis.report_pack import escaped

SCRIPTS = ("data.js", "dots.js", "map.js", "card.js", "select.js", "main.js")
PLACE = re.compile(r"\{\{(\w+)\}\}")


def page_file(name: str) -> str:
    """A file of the page (template, style or script) that comes with the package."""
    return (resources.files("cryosuite.analysis") / "page" / name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """The minified plotly.js of the installed plotly package, safe inside a <script> element."""
    import plotly

    script = (resources.files(plotly) / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return script.replace("</script", "<\\/script")


def assemble(parts: Mapping[str, str]) -> list[str]:
    """The page as pieces to be written one after the other; ``parts`` fill the template's places, each once."""
    known = {
        **parts,
        "style": page_file("report.css"),
        "script": "\n".join(page_file(name) for name in SCRIPTS),
        "plotly": plotly_script(),
    }
    pieces = PLACE.split(page_file("report.html"))
    return [known[piece] if number % 2 else piece for number, piece in enumerate(pieces)]


def section(title: str, body: str, name: str) -> str:
    """A panel with a heading."""
    return f'<section class="panel" id="{name}"><h2>{escaped(title)}</h2>\n{body}\n</section>\n'


def caption(text: str) -> str:
    """One paragraph in small type."""
    return f'<p class="caption">{escaped(text)}</p>'


def command(text: str, name: str) -> str:
    """A command line with a button that copies it; line ends and control characters in it would run on pasting."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return (
        f'<div class="command"><code id="{escaped(name)}">{escaped(text)}</code>'
        f'<button type="button" class="quiet" data-copy="{escaped(name)}">Copy</button></div>'
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (), name: str = "") -> str:
    """A table of ready HTML cells; columns in ``left`` are set flush left."""
    side = [' class="left"' if i in left else "" for i in range(len(heads))]
    head = "".join(f'<th scope="col"{side[i]}>{escaped(text)}</th>' for i, text in enumerate(heads))
    body = "".join(
        f'<tr data-label="{number}">' + "".join(f"<td{side[i]}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>\n"
        for number, row in enumerate(rows)
    )
    mark = f' id="{name}"' if name else ""
    return f'<div class="scroll"><table{mark}><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def cluster_table(clusters: Sequence[Mapping[str, Any]]) -> str:
    """All clusters with size, confidence, resolution; a row or its button chooses the cluster."""
    biggest = max((c["size"] for c in clusters), default=1) or 1
    maps = any(c["maps"] for c in clusters)
    with_fsc = any(c["resolution"] is not None for c in clusters)
    numbers = [name for name, _ in clusters[0]["medians"]] if clusters else []
    heads = ["cluster (from 0)", *(["volume"] if maps else []), "particles", "share", "mean confidence",
             *(["resolution at FSC 0.143"] if with_fsc else []), *(f"median {name}" for name in numbers)]  # fmt: skip
    rows = []
    for one in clusters:
        width = 100 * one["size"] / biggest
        cells = [
            '<button type="button" class="name"><span class="swatch" '
            f'style="background:{escaped(one["colour"])}"></span>{one["label"]}</button>',
            *(['<span class="thumb"></span>'] if maps else []),
            f"{one['size']:,}",
            f'{one["share"]:.1f} %<span class="share"><i style="width:{width:.0f}%;'
            f'background:{escaped(one["colour"])}"></i></span>',
            _number(one["confidence"], "{:.2f}"),
            *([_number(one["resolution"], "{:.1f} Å")] if with_fsc else []),
            *(escaped(text) for _, text in one["medians"]),
        ]
        rows.append(cells)
    return table(heads, rows, (0, 1) if maps else (0,), "cluster-table")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def confound_table(rows: Sequence[Mapping[str, str]]) -> str:
    """What ``confounds.csv`` says, a row per column: what latents tell of it, what it tells of the clusters."""
    names = list(dict.fromkeys(row.get("column", "") for row in rows))
    cells = []
    for name in names:
        own = {row.get("of", ""): row for row in rows if row.get("column", "") == name}
        warnings = [text for row in own.values() if (text := row.get("warning", ""))]
        cells.append([
            escaped(name), *(_explained(own.get(of, {})) for of in ("latents", "clusters")),
            "<br>".join(f'<span class="warn">{escaped(text)}</span>' for text in warnings) or "–",
        ])  # fmt: skip
    return table(["column", "latents tell of it", "it tells of the clusters", "warning"], cells, (0, 3))


def _explained(row: Mapping[str, str]) -> str:
    if not row:
        return "–"
    bits = _cell(row, "mutual_information_bits", "{:.2f} bits")
    details = f"chance {_cell(row, 'share_by_chance_1_percent', '{:.0%}')}, p = {_cell(row, 'p_value', '{:.2g}')}"
    return f"{_cell(row, 'share_explained', '{:.0%}')} <small>{bits}, {details}</small>"


def _cell(row: Mapping[str, str], name: str, form: str) -> str:
    try:
        return form.format(float(row[name]))
    except (KeyError, ValueError):
        return "–"


def figure(uri: str, text: str, alt: str) -> str:
    """A picture with its caption below."""
    image = f'<img src="{uri}" alt="{escaped(alt)}" loading="lazy">'
    return f'<figure>{image}<figcaption class="caption">{escaped(text)}</figcaption></figure>'


def listing(items: Iterable[tuple[str, str]]) -> str:
    """Files and what they are."""
    rows = "".join(f"<li><code>{escaped(name)}</code> {escaped(text)}</li>" for name, text in items)
    return f"<ul>{rows}</ul>"
