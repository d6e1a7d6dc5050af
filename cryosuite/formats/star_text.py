"""STAR files: RELION's tables in and out.

The text is first looked through line by line (block names, column names, number of values per row, quotes, comments);
blocks that are plain are then read by the starfile package, others by the same column parser fed with what the look
found, because starfile misreads quotes within values, '#' inside names and rows that start like a block.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import write_text
from cryosuite.formats.checks import read_bytes

_TOKEN = re.compile(r"""\s*(?:"((?:[^"]|"(?!\s|$))*)"(?=\s|$)|'((?:[^']|'(?!\s|$))*)'(?=\s|$)|(\#.*)|(\S+))""")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_NEEDS_QUOTES = r"""\s|^$|^["'#_]|^data_|^loop_"""
_NOT_A_NUMBER = ["nan", "NaN", "<NA>"]


@dataclass
class _Block:
    """One block as the look through the lines found it."""

    name: str
    line: int  # of its data_ line, 1-based
    loop: bool = False
    columns: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)  # each value separated by one tab, quotes and comments gone
    first_row: int = 0  # line of the first row
    gap: int = 0  # line of a blank line inside the loop


def read_star(path: str | os.PathLike) -> dict[str, pd.DataFrame]:
    """Read a STAR file: block name (without ``data_``) -> table, in the order of the file.

    A block of key and value lines becomes a table of one row with ``attrs["simple"] = True``; ``attrs["line"]`` is the
    line of the first row. Columns are numbers where all values are (columns whose name ends in Name stay text); column
    names have no leading underscore. Tabs, CRLF, a byte-order mark, comments, quotes, blank lines inside a loop (with a
    notice) and a missing last newline are read. Raises InputError naming the line for rows with too few or too many
    values, for a block or column that comes twice, and for files that are empty or no STAR files.
    """
    text = _decode(path, read_bytes(path, "STAR file"))
    blocks = _split(path, text)
    return {block.name: _table(path, block) for block in blocks}


def _decode(path: str | os.PathLike, data: bytes) -> str:
    """The text of the file, refused unless it is text."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: not a STAR file that can be read: it is UTF-16 text; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a STAR file: byte {error.start} is not UTF-8 text") from None
    control = _CONTROL.search(text)
    if control:
        raise InputError(f"{path}: not a STAR file: it holds binary data (character {control.start()})")
    if not text.strip():
        raise InputError(f"{path}: the STAR file is empty (only blank lines)")
    return text


def _tokens(path: str | os.PathLike, line: str, number: int) -> list[str]:
    """The values of one line: split at blanks, quotes taken off, a comment at a word's start dropped."""
    if '"' not in line and "'" not in line and "#" not in line:
        return line.split()
    values = []
    for double, single, comment, bare in _TOKEN.findall(line.rstrip()):
        if comment:
            break
        if bare[:1] in ("'", '"') and len(bare) > 0 and not _closed(bare):
            raise InputError(f"{path}: line {number}: a quote is opened and not closed")
        values.append(bare if bare else double or single)
    if any("\t" in value for value in values):
        raise InputError(f"{path}: line {number}: a quoted value holds a tab, which RELION cannot read")
    return values


def _closed(word: str) -> bool:
    """A bare word that starts with a quote is a mistake unless it is just text such as 5' or a lone quoted word."""
    return len(word) > 1 and word[-1] == word[0]


def _split(path: str | os.PathLike, text: str) -> list[_Block]:
    """The blocks of the text, each row checked against the number of columns."""
    blocks: list[_Block] = []
    block: _Block | None = None
    state = "before"  # before, open (after data_), names (after loop_), rows
    blank = foreign = 0
    for number, line in enumerate(text.split("\n"), start=1):
        plain = '"' not in line and "'" not in line and "#" not in line
        values = line.split() if plain else _tokens(path, line, number)
        if not values:
            if state == "rows" and not line.strip():
                blank = blank or number
            continue
        first = values[0]
        if state == "rows" and len(values) == len(block.columns) and (len(values) > 1 or first[:5].lower() != "data_"):
            if not (first[:5].lower() == "data_" and len(values) == 1):
                if blank and block.rows:
                    block.gap, blank = block.gap or blank, 0
                blank = 0
                block.first_row = block.first_row or number
                block.rows.append("\t".join(values))
                continue
        if first[:5].lower() == "data_" and len(values) == 1:
            block, state, blank = _Block(first[5:], number), "open", 0
            earlier = next((other for other in blocks if other.name == block.name), None)
            if earlier is not None:
                raise InputError(
                    f"{path}: block data_{block.name} comes twice (lines {earlier.line} and {number}): join or rename them"
                )
            blocks.append(block)
        elif state == "before":
            foreign = foreign or number
        elif first.lower() == "loop_" and len(values) == 1:
            if block.columns:
                raise InputError(f"{path}: line {number}: a second table in block data_{block.name}: one each is expected")
            block.loop, state = True, "names"
        elif state == "names" and first[0] == "_":
            _add_column(path, block, values, number)
        elif state == "names":
            state = "rows"
            _require_width(path, block, values, number)
            block.first_row = number
            block.rows.append("\t".join(values))
        elif state == "open" and first[0] == "_" and len(values) == 2:
            _add_column(path, block, values[:1], number)
            block.first_row = block.first_row or number
            block.rows.append(values[1])
        elif state == "open":
            what = "has no value" if first[0] == "_" and len(values) == 1 else "is no 'name value' pair"
            raise InputError(f"{path}: line {number} in block data_{block.name} {what}: {line.strip()[:60]!r}")
        elif blank and first[0] == "_" :
            raise InputError(f"{path}: line {number}: names behind the table of block data_{block.name}")
        else:
            after = f" (the blank line {blank} ends the table for RELION)" if blank else ""
            _require_width(path, block, values, number, after)
    if not blocks:
        raise InputError(f"{path}: not a STAR file: it has no data_ block")
    if foreign:
        notice(f"{path}: line {foreign} comes before any data_ block and is ignored")
    return blocks


def _add_column(path: str | os.PathLike, block: _Block, values: list[str], number: int) -> None:
    """Take a column name; RELION writes its number as a comment behind it, some programs without the '#'."""
    if len(values[0]) < 2 or len(values) > 2 or (len(values) == 2 and not values[1].isdigit()):
        raise InputError(f"{path}: line {number}: expected one column name, found {' '.join(values)[:60]!r}")
    block.columns.append(values[0][1:])


def _require_width(path: str | os.PathLike, block: _Block, values: list[str], number: int, after: str = "") -> None:
    if not block.columns:
        raise InputError(f"{path}: line {number}: values in block data_{block.name}, which has no columns")
    if len(values) != len(block.columns):
        raise InputError(
            f"{path}: line {number}: {len(values)} values in block data_{block.name}, expected {len(block.columns)}{after}"
        )


def _table(path: str | os.PathLike, block: _Block) -> pd.DataFrame:
    """The table of one block, columns turned into numbers where all values are."""
    if block.gap:
        notice(
            f"{path}: line {block.gap} is blank inside the table of block data_{block.name}; all {len(block.rows)} rows are "
            "read, RELION would stop there"
        )
    rows = block.rows if block.loop or not block.rows else ["\t".join(block.rows)]
    names = block.columns
    unique = [f"{i}" for i in range(len(names))]
    text_columns = {unique[i]: str for i, name in enumerate(names) if name.endswith("Name") or not rows}
    if rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            frame = pd.read_csv(
                io.StringIO("\n".join(rows) + "\n"),
                sep="\t",
                header=None,
                names=unique,
                quoting=3,
                dtype=text_columns,
                keep_default_na=False,
                na_values={name: _NOT_A_NUMBER for name in unique if name not in text_columns},
                low_memory=False,
                skip_blank_lines=False,
                float_precision="round_trip",
            )
    else:
        frame = pd.DataFrame({name: pd.Series([], dtype=str) for name in unique})
    frame = _drop_repeats(path, block, frame)
    frame.attrs = {"line": block.first_row, "simple": not block.loop, "gap": bool(block.gap)}
    return frame


def _drop_repeats(path: str | os.PathLike, block: _Block, frame: pd.DataFrame) -> pd.DataFrame:
    """Name the columns; one that comes twice is dropped where both hold the same, refused where they differ."""
    keep, first = [], {}
    for position, name in enumerate(block.columns):
        if name not in first:
            first[name] = position
            keep.append(position)
        elif frame.iloc[:, position].equals(frame.iloc[:, first[name]]):
            notice(f"{path}: column {name} of block data_{block.name} comes twice with the same values: one is kept")
        else:
            raise InputError(
                f"{path}: column {name} of block data_{block.name} comes twice with different values: remove one"
            )
    frame = frame.iloc[:, keep] if len(keep) < len(block.columns) else frame
    frame.columns = [block.columns[position] for position in keep]
    return frame


def write_star(path: str | os.PathLike, blocks: dict[str, pd.DataFrame]) -> None:
    """Write tables as a STAR file in RELION 3.1 form, atomically; blocks in the order given.

    A table with ``attrs["simple"]`` and one row is written as key and value lines. Values that hold blanks are quoted.
    Numbers are written so that they read back the same.
    """
    parts = []
    for name, frame in blocks.items():
        parts.append(f"\n# version 30001\n\ndata_{name}\n\n")
        text = frame.copy(deep=False)
        for column in text.columns:
            text[column] = _as_text(text[column])
        if frame.attrs.get("simple") and len(frame) == 1:
            width = max((len(str(column)) for column in frame.columns), default=0) + 4
            parts += [f"_{column:<{width}} {text[column].iloc[0]}\n" for column in text.columns]
        else:
            parts.append("loop_\n")
            parts += [f"_{column} #{i}\n" for i, column in enumerate(text.columns, start=1)]
            parts.append("\n".join(map("\t".join, zip(*[text[c].tolist() for c in text.columns], strict=True))))
            parts.append("\n")
        parts.append("\n")
    write_text(path, "".join(parts))


def _as_text(column: pd.Series) -> pd.Series:
    """Values as they stand in the file."""
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        column = column.astype(object).where(column.notna(), "nan").map(str)
        quoted = column.str.contains(_NEEDS_QUOTES, regex=True)
        if quoted.any():
            column = column.where(~quoted, '"' + column + '"')
        return column
    if pd.api.types.is_integer_dtype(column):
        return column.map(str)
    values = column.to_numpy(np.float32 if column.dtype == np.float32 else np.float64)
    return pd.Series([repr(v) for v in values.tolist()] if values.dtype == np.float64 else [str(v) for v in values], column.index)
