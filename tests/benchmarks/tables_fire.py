"""The README's table "What it was put through": from the rows of all results/fire_*.json to Markdown."""

from __future__ import annotations

import re

from tables_maps import markdown

NAME = re.compile(r"`[^`]+`|(?<=the same seed twice, )[\w-]+$")  # of a command, in what was tried
KINDS = {"load": "load held", "fault": "fault survived", "input": "bad input"}  # in the order of the table


def fire_table(found: list[dict]) -> str:
    """One row per thing tried, loads first, then faults, then bad input; below, the commands with dates and seeds.

    Each result has ``rows``: {"kind": load, fault or input, "what", "tried": how often, "result", "detail"}. Raises
    SystemExit for a kind that is none of these.
    """
    rows = [row for result in found for row in result["rows"]]
    unknown = sorted({str(row["kind"]) for row in rows} - KINDS.keys())
    if unknown:
        raise SystemExit(f"fire_*.json: rows of unknown kind {', '.join(unknown)}; known: {', '.join(KINDS)}")
    lines = [
        [KINDS[kind], _cell(row["what"]), _count(row["tried"]), _cell(row["result"]), _cell(row.get("detail", ""))]
        for kind in KINDS
        for row in _joined([row for row in rows if row["kind"] == kind])
    ]
    commands = "\n".join(f"- {_command(result)}" for result in found)
    return f"{markdown(['', 'what', 'tried', 'result', 'detail'], lines)}\n\n{commands}"


def _joined(rows: list[dict]) -> list[dict]:
    """Rows that say the same of different commands (named between backticks, or at the end) as one that names all."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for number, row in enumerate(rows):
        named = len(NAME.findall(row["what"])) == 1 and isinstance(row["tried"], int)
        key = (NAME.sub("{}", row["what"]) if named else str(number), str(row["result"]))
        groups.setdefault(key, []).append(row)
    return [found[0] if len(found) == 1 else _one(what, found) for (what, _), found in groups.items()]


def _one(what: str, rows: list[dict]) -> dict:
    names = [NAME.search(row["what"])[0] for row in rows]
    tried = [row["tried"] for row in rows]
    each = f"{tried[0]} each" if len(set(tried)) == 1 else ", ".join(map(str, tried))
    return rows[0] | {"what": what.replace("{}", ", ".join(names)), "tried": sum(tried), "detail": each}


def _cell(text: object) -> str:
    """Text that stays inside one cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _count(tried: object) -> str:
    return f"{tried:,}" if isinstance(tried, int) else _cell(tried)


def _command(result: dict) -> str:
    """How a result was made, in one line."""
    seed = f", seed {result['seed']}" if result.get("seed") is not None else ""
    versions = result.get("versions", {})
    machine = ", ".join(filter(None, [versions.get("torch") and f"torch {versions['torch']}", versions.get("machine")]))
    return f"`{result['command']}` ({result['date']}{seed}{f'; {machine}' if machine else ''})"
