"""STAR files as tables: read with every row checked, written so that numbers read back the same.

The lines are first looked through by ourselves (blocks, columns, number of values per row, quotes, comments), a piece
of the file at a time. Tables that turn out plain are then taken from the starfile package; those that it misreads
(quotes inside values, '#' inside names, rows that start like a block, columns that come twice) or would need too much
memory for are built from what the look through the lines found, to the same result.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from cryosuite.errors import InputError, notice
from cryosuite.formats.atomic import atomic_path
from cryosuite.formats.checks import existing_file

_TOKEN = re.compile(rb"""\s*(?:"((?:[^"]|"(?!\s|$))*)"(?=\s|$)|'((?:[^']|'(?!\s|$))*)'(?=\s|$)|(\#.*)|(\S+))""")
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NEEDS_QUOTES = r"""(?i)\s|^$|^["'#_;]|^(?:data_|loop_)"""
_NOT_A_NUMBER = ["nan", "NaN", "<NA>"]
_PIECE = 1 << 24  # bytes of the file held at a time
_LONGEST_LINE = 1 << 23
_MAX_BLOCKS, _MAX_COLUMNS = 200, 200  # each is a table of pandas, or a part of it: milliseconds and kilobytes
_ROWS = 100_000  # rows turned into columns at a time
_STARFILE_BYTES = 1 << 25  # starfile holds the text of a file several times over


@dataclass
class _Block:
    """One block as the look through the lines found it."""

    name: str
    line: int  # of its data_ line, counted from 1
    loop: bool = False
    plain: bool = True
    columns: list[str] = field(default_factory=list)
    pending: list[bytes] = field(default_factory=list)  # rows, values separated by one tab, quotes and comments gone
    pieces: list[pd.DataFrame] = field(default_factory=list)
    count: int = 0
    first_row: int = 0  # line of the first row
    gap: int = 0  # line of a blank line inside the table

    def add(self, values: list[bytes], number: int, as_text: set[tuple[str, str]]) -> None:
        """Take one row."""
        self.first_row = self.first_row or number
        self.pending.append(b"\t".join(values))
        self.count += 1
        if len(self.pending) >= _ROWS:
            self.flush(as_text)

    def flush(self, as_text: set[tuple[str, str]]) -> None:
        """Turn the rows at hand into columns, numbers where all values are."""
        if not self.pending and self.pieces:
            return
        keys = [str(i) for i in range(len(self.columns))]
        text = {
            key: str
            for key, name in zip(keys, self.columns, strict=True)
            if is_text(name) or (self.name, name) in as_text or not self.pending
        }
        if self.pending:
            frame = pd.read_csv(
                io.BytesIO(b"\n".join(self.pending) + b"\n"),
                sep="\t",
                header=None,
                names=keys,
                quoting=3,
                dtype=text,
                keep_default_na=False,
                na_values={key: _NOT_A_NUMBER for key in keys if key not in text},
                low_memory=False,
                skip_blank_lines=False,
                encoding="utf-8",
            )
        else:
            frame = pd.DataFrame({key: pd.Series([], dtype=str) for key in keys})
        self.pieces.append(frame)
        self.pending = []


def is_text(column: str) -> bool:
    """Columns that stay text although all their values may look like numbers."""
    return column.endswith("Name")


def read_star(path: str | os.PathLike) -> dict[str, pd.DataFrame]:
    """Read a STAR file: block name (without ``data_``) -> table, in the order of the file.

    A block of key and value lines becomes a table of one row with ``attrs["simple"]`` True; ``attrs["line"]`` is the
    line of the first row. Columns are numbers where all values are (columns whose name ends in Name stay text); column
    names have no leading underscore. Tabs, CRLF, a byte-order mark, comments, quotes, blank lines inside a table (with
    a notice) and a missing last newline are read. Raises InputError naming the line for rows with too few or too many
    values, for a block or column that comes twice, and for files that are empty or no STAR files.
    """
    path = existing_file(path, "STAR file")
    try:
        blocks = _scan(path, set())
        mixed = {(block.name, name) for block in blocks for name in _mixed(block)}
        if mixed:  # a column is numbers in one part of the file and text in another: take all of it as text
            blocks = _scan(path, mixed)
    except OSError as error:
        raise InputError(f"{path}: cannot read this STAR file: {error.strerror or error}") from None
    ready = _from_starfile(path, blocks)
    return {block.name: _table(path, block, ready.get(block.name)) for block in blocks}


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of the file, refused unless they are text."""
    offset, rest = 0, b""
    with open(path, "rb") as stream:
        size = min(_PIECE, max(path.stat().st_size, 4096))
        while piece := stream.read(size):
            if offset == 0:
                if piece.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise InputError(f"{path}: not a STAR file that can be read: UTF-16 text; save it as UTF-8")
                piece = piece.removeprefix(b"\xef\xbb\xbf")
            piece = rest + piece
            cut = piece.rfind(b"\n") + 1
            piece, rest = piece[:cut], piece[cut:]
            if len(rest) > _LONGEST_LINE:
                raise InputError(f"{path}: not a STAR file: a line of more than {_LONGEST_LINE >> 20} MiB")
            yield from _text_lines(path, piece, offset)
            offset += len(piece)
    if rest:
        yield from _text_lines(path, rest + b"\n", offset)


def _text_lines(path: Path, piece: bytes, offset: int) -> list[bytes]:
    control = _CONTROL.search(piece)
    if control:
        raise InputError(f"{path}: not a STAR file: it holds binary data at byte {offset + control.start()}")
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a STAR file: byte {offset + error.start} is not UTF-8 text") from None
    return piece.split(b"\n")[:-1]


def _tokens(path: Path, line: bytes, number: int) -> tuple[list[bytes], bytes]:
    """The values of a line with quotes or '#', and its first word, empty where that is a quoted value.

    Quotes are taken off, a comment at a word's start is dropped.
    """
    values = []
    for match in _TOKEN.finditer(line.rstrip()):  # one by one: each open quote costs a look at the rest of the line
        double, single, comment, bare = (part or b"" for part in match.groups())
        if comment:
            break
        if bare[:1] in (b"'", b'"') and bare[-1:] != bare[:1]:
            raise InputError(f"{path}: line {number}: a quote is opened and not closed")
        values.append(bare if bare else double or single)
    if any(b"\t" in value for value in values):
        raise InputError(f"{path}: line {number}: a quoted value holds a tab, which RELION cannot read")
    return values, values[0] if values and line.lstrip()[:1] not in (b"'", b'"') else b""


def _scan(path: Path, as_text: set[tuple[str, str]]) -> list[_Block]:
    """Look through the lines: the blocks of the file, each row checked against the number of columns."""
    blocks: dict[str, _Block] = {}
    block = _Block("", 0)
    state = "before"  # before, open (after data_), names (after loop_), rows
    blank = foreign = number = 0
    for number, line in enumerate(_lines(path), start=1):
        plain = b"#" not in line and b'"' not in line and b"'" not in line
        values = line.split()
        if plain:
            first = values[0] if values else b""
        else:
            values, first = _tokens(path, line, number)
        if not values:
            if state == "rows" and not line.strip():
                blank = blank or number
            continue
        starts_block = len(values) == 1 and first[:5].lower() == b"data_"
        if state == "rows" and len(values) == len(block.columns) and not starts_block:
            block.gap, blank = block.gap or blank, 0
            block.plain = block.plain and plain and first[:5] != b"data_"
            block.add(values, number, as_text)
        elif starts_block:
            if state != "before":
                block.flush(as_text)
            block, state, blank = _new_block(path, blocks, first, number), "open", 0
        elif state == "before":
            foreign = foreign or number
        elif state == "rows":
            after = f" (the blank line {blank} ends the table for RELION)" if blank else ""
            _require_width(path, block, values, number, after)
        else:
            state = _header_line(path, block, state, values, first, number, as_text)
            block.plain = block.plain and (plain or state == "names")
    if not blocks:
        empty = not foreign and not number
        raise InputError(f"{path}: {'is empty (blank lines only)' if empty else 'has no data_ block: not a STAR file'}")
    block.flush(as_text)
    if foreign:
        notice(f"{path}: line {foreign} comes before any data_ block and is ignored")
    return list(blocks.values())


def _new_block(path: Path, blocks: dict[str, _Block], word: bytes, number: int) -> _Block:
    name = word[5:].decode("utf-8")
    if name in blocks:
        both = f"lines {blocks[name].line} and {number}"
        raise InputError(f"{path}: block data_{name} comes twice ({both}): join or rename them")
    if len(blocks) >= _MAX_BLOCKS:
        raise InputError(f"{path}: line {number}: more than {_MAX_BLOCKS} blocks: no file of particles has as many")
    blocks[name] = _Block(name, number)
    return blocks[name]


def _header_line(
    path: Path,
    block: _Block,
    state: str,
    values: list[bytes],
    first: bytes,
    number: int,
    as_text: set[tuple[str, str]],
) -> str:
    """A line between ``data_`` and the first row of a table, or of a block of key and value lines; the new state."""
    if state == "names" and first[:1] == b"_":
        if len(values) > 2 or (len(values) == 2 and not values[1].isdigit()) or len(first) < 2:
            raise InputError(f"{path}: line {number}: expected one column name, found {_shown(values)}")
        block.columns.append(first[1:].decode("utf-8"))
        if len(block.columns) > _MAX_COLUMNS:
            raise InputError(f"{path}: line {number}: more than {_MAX_COLUMNS} columns: no particles have as many")
        return "names"
    if state == "names":
        _require_width(path, block, values, number)
        block.add(values, number, as_text)
        return "rows"
    if len(values) == 1 and first.lower() == b"loop_":
        if block.columns:
            raise InputError(f"{path}: line {number}: a second table in block data_{block.name}: one each is expected")
        block.loop = True
        return "names"
    if first[:1] != b"_" or len(first) < 2 or len(values) != 2:
        raise InputError(
            f"{path}: line {number} in block data_{block.name}: expected one name and one value, found {_shown(values)}"
        )
    block.columns.append(first[1:].decode("utf-8"))
    row = block.pending.pop() + b"\t" if block.count else b""
    block.pending.append(row + values[1])
    block.count, block.first_row = 1, block.first_row or number
    return "open"


def _shown(values: list[bytes]) -> str:
    return repr(b" ".join(values).decode("utf-8")[:60])


def _require_width(path: Path, block: _Block, values: list[bytes], number: int, after: str = "") -> None:
    """Refuse a row with too few or too many values."""
    if not block.columns:
        raise InputError(f"{path}: line {number}: values in block data_{block.name}, which has no columns")
    if len(values) == 1 and values[0].lower() == b"loop_":
        raise InputError(f"{path}: line {number}: a second table in block data_{block.name}: one each is expected")
    if len(values) != len(block.columns):
        found = f"{len(values)} values in block data_{block.name}"
        raise InputError(f"{path}: line {number}: {found}, expected {len(block.columns)}{after}")


def _mixed(block: _Block) -> list[str]:
    """Columns that are of different kinds in the pieces of a large table."""
    if len(block.pieces) < 2:
        return []
    kinds = [[_kind(frame.iloc[:, i]) for frame in block.pieces] for i in range(len(block.columns))]
    return [name for name, found in zip(block.columns, kinds, strict=True) if len(set(found)) > 1]


def _kind(column: pd.Series) -> str:
    if pd.api.types.is_bool_dtype(column):
        return "bool"
    return "number" if pd.api.types.is_numeric_dtype(column) else "text"


def _from_starfile(path: Path, blocks: list[_Block]) -> dict[str, pd.DataFrame]:
    """The plain tables as the starfile package reads them, where the file is small enough for it."""
    plain = [block for block in blocks if block.loop and block.plain and block.count and not block.gap]
    twice = sum(len(block.columns) - len(set(block.columns)) for block in blocks)
    if not plain or twice or path.stat().st_size > _STARFILE_BYTES:
        return {}
    import starfile

    text = sorted({name for block in blocks for name in block.columns if is_text(name)})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = starfile.read(path, always_dict=True, parse_as_string=text)
    except Exception:  # whatever it stumbles over, the tables are built from the lines instead
        return {}
    tables = {}
    for block in plain:
        frame = read.get(block.name)
        if not isinstance(frame, pd.DataFrame) or list(frame.columns) != block.columns or len(frame) != block.count:
            continue
        if not frame[[name for name in block.columns if is_text(name)]].isna().any(axis=None):  # "nan" as a name
            tables[block.name] = pd.DataFrame(frame, copy=True)
    return tables


def _table(path: Path, block: _Block, ready: pd.DataFrame | None) -> pd.DataFrame:
    """The table of one block."""
    if block.gap:
        notice(
            f"{path}: line {block.gap} is blank inside the table of block data_{block.name}; all {block.count} rows "
            "are read, RELION would stop there"
        )
    if ready is not None and len(set(block.columns)) == len(block.columns):
        frame = ready
    else:
        frame = block.pieces[0] if len(block.pieces) == 1 else pd.concat(block.pieces, ignore_index=True)
        frame = _named(path, block, frame)
    block.pieces = []
    frame.attrs = {"line": block.first_row, "simple": not block.loop, "gap": bool(block.gap)}
    return frame


def _named(path: Path, block: _Block, frame: pd.DataFrame) -> pd.DataFrame:
    """Name the columns; one that comes twice is dropped where both hold the same, refused where they differ."""
    keep: list[int] = []
    first: dict[str, int] = {}
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
    frame = frame.iloc[:, keep].copy() if len(keep) < len(block.columns) else frame
    frame.columns = [block.columns[position] for position in keep]
    return frame


def write_star(path: str | os.PathLike, blocks: dict[str, pd.DataFrame]) -> None:
    """Write tables as a STAR file of RELION, atomically; blocks in the order given.

    Files with an optics table say that they are of version 3.1. Others do not, or RELION 3.1 and later would not
    convert them from 3.0 and would take origins in pixels for none.

    A table with ``attrs["simple"]`` and one row is written as key and value lines. Values that hold blanks or would be
    taken for something else are quoted. Numbers are written with up to 15 digits, so that what was read is written
    back. Raises InputError when the file cannot be written or a text holds a line break, a tab or both kinds of quotes.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as stream:
        version = "\n# version 30001\n" if "optics" in blocks else ""
        for name, frame in blocks.items():
            stream.write(f"{version}\ndata_{name}\n\n")
            simple = bool(frame.attrs.get("simple")) and len(frame) == 1
            if simple:
                width = max((len(str(column)) for column in frame.columns), default=0) + 4
                for position, column in enumerate(frame.columns):
                    stream.write(f"_{column:<{width}} {_as_text(path, frame.iloc[:, position])[0]}\n")
            else:
                stream.write("loop_\n")
                stream.writelines(f"_{column} #{i}\n" for i, column in enumerate(frame.columns, start=1))
                for start in range(0, len(frame), _ROWS):
                    part = frame.iloc[start : start + _ROWS]
                    columns = [_as_text(path, part.iloc[:, i]) for i in range(part.shape[1])]
                    stream.writelines("\t".join(row) + "\n" for row in zip(*columns, strict=True))
            stream.write("\n")


def _as_text(path: str | os.PathLike, column: pd.Series) -> list[str]:
    """Values as they stand in the file."""
    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        texts = column.astype(object).where(column.notna(), "nan").map(_word)
        quoted = texts.str.contains(_NEEDS_QUOTES, regex=True)
        if quoted.any():
            texts = texts.where(~quoted, texts.map(lambda text: _quoted(path, text)))
        return texts.tolist()
    if pd.api.types.is_integer_dtype(column):
        return [str(value) for value in column.tolist()]
    if column.dtype == np.float32:
        return [str(value) for value in column.to_numpy()]
    return [f"{value:.15}" for value in column.to_numpy(np.float64, na_value=np.nan).tolist()]


def _word(value: object) -> str:
    return f"{value:.15}" if isinstance(value, float) else str(value)


def _quoted(path: str | os.PathLike, text: str) -> str:
    """The text in the kind of quotes that it does not hold itself."""
    if any(character in text for character in "\n\r\t") or ('"' in text and "'" in text):
        raise InputError(f"{path}: the text {text[:60]!r} cannot be written to a STAR file")
    return f"'{text}'" if '"' in text else f'"{text}"'
