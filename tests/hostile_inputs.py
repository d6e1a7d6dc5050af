"""Valid files bent out of shape: bytes, numbers, lines and words changed, also inside gzip and zip."""

from __future__ import annotations

import gzip
import io
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence

INTEGERS = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 1024, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, -(2**31),
            2**32 - 1, 2**53, 2**62, 2**63 - 1, -(2**63))  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 3.4e38, float("nan"), float("inf"), float("-inf"))
WORDS = (b"nan", b"NaN", b"inf", b"-inf", b"1e400", b"-1", b"0", b"1e-400", b"99999999999999999999", b"9" * 400, b"",
         b"''", b'"', b"'", b"#", b"_", b"null", b"~", b"true", b"[]", b"{}", b"[1]", b"\x1b[31m", b"\xc2\x9b31m",
         b"../../../etc/passwd", b"/etc/passwd", b"<script>", b"\xe2\x80\xae", b"\xef\xbb\xbf", b"\xff\xfe", b"0x10",
         b"1_000", b"1:30:00", b"2020-01-01", b"!!python/object/apply:os.system ['true']", b"&a", b"*a", b"<<: *a",
         b"!!binary x", b"!!set {a}", b"? [a]", b"---", b"...", b"data_", b"loop_", b"@", b"0@", b"1@", b"%", b"\0",
         b"\r", b"\t", b"\n\n", b",", b":", b";", b"1.5", b"1,5", b"d" * 3000)  # fmt: skip
HEAD = 6000  # bytes of a long file that are changed
NUMBER = re.compile(rb"[-+]?\d+\.?\d*(?:[eE][-+]?\d+)?")


def mutate(data: bytes, rng: random.Random, others: Sequence[bytes] = (), words: Sequence[bytes] = ()) -> bytes:
    """A changed copy; archives are opened, changed inside and closed again three times out of four."""
    if data[:2] == b"\x1f\x8b" and rng.random() < 0.75:
        return _in_gzip(data, rng, others, words)
    if data[:2] == b"PK" and rng.random() < 0.75:
        return _in_zip(data, rng, words)
    if len(data) > 3 * HEAD:  # what is said of the data stands before them
        return mutate(data[:HEAD], rng, others, words) + data[HEAD:]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
        data = rng.choice(CHANGES)(data, rng, [*WORDS, *words] if rng.random() < 0.7 else list(words) or WORDS)
        if others and rng.random() < 0.05:
            other = rng.choice(others)
            data = data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]
    return data


def _in_gzip(data: bytes, rng: random.Random, others: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    try:
        inner = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return _flip(data, rng, words)
    return gzip.compress(mutate(inner, rng, (), words), 1, mtime=0)


def _in_zip(data: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # changed before into no archive
        return _flip(data, rng, words)
    if not members:
        return data
    place = rng.randrange(len(members))
    name, inner = members[place]
    what = rng.random()
    if what < 0.8:
        members[place] = (name, mutate(inner, rng, (), words))
    elif what < 0.88:
        del members[place]
    elif what < 0.94:
        members[place] = (rng.choice(["../x", "/x", name + "x", "\x1b[1m"]), inner)
    else:
        members.append((name, members[rng.randrange(len(members))][1]))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, inner in members:
            archive.writestr(zipfile.ZipInfo(name), inner)
    return out.getvalue()


def _flip(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    if not data:
        return b"\0"
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _bit(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    if not data:
        return b"\1"
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    return data[: rng.randint(0, len(data))]


def _drop(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 40)) :]


def _repeat(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    at = rng.randint(0, len(data))
    piece = data[at : at + rng.choice((1, 2, 8, 40, 200))]
    return data[:at] + piece * rng.choice((2, 2, 3, 20)) + data[at + len(piece) :]


def _insert(data: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + (rng.choice(words) if rng.random() < 0.8 else rng.randbytes(rng.randint(1, 9))) + data[at:]


def _number_field(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    """A binary number, most often near the start, where sizes stand."""
    near = rng.random() < 0.6
    at = rng.randrange(max(1, min(len(data), 256) if near else len(data)))
    at = at // 4 * 4 if rng.random() < 0.7 else at
    order, kind = rng.choice("<>"), rng.choice("hiqfd")
    if kind in "fd":
        value = struct.pack(order + kind, rng.choice(FLOATS))
    else:
        width = {"h": 16, "i": 32, "q": 64}[kind]
        number = rng.choice(INTEGERS) if rng.random() < 0.8 else rng.getrandbits(width)
        value = (number % (1 << width)).to_bytes(width // 8, "little" if order == "<" else "big")
    return data[:at] + value + data[at + len(value) :]


def _number_text(data: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    found = list(NUMBER.finditer(data[:20_000]))
    if not found:
        return _flip(data, rng, words)
    one = rng.choice(found)
    new = rng.choice(words) if rng.random() < 0.5 else str(rng.choice((*INTEGERS, *FLOATS))).encode()
    return data[: one.start()] + new + data[one.end() :]


def _word(data: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    """One word between blanks or punctuation for another."""
    parts = re.split(rb"([\s,:@\[\]{}\"]+)", data[:20_000])
    if len(parts) < 3:
        return _insert(data, rng, words)
    place = rng.randrange(0, len(parts), 2)
    parts[place] = rng.choice(words) if rng.random() < 0.7 else parts[rng.randrange(0, len(parts), 2)]
    return b"".join(parts) + data[20_000:]


def _line(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    lines = data.split(b"\n")
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    what = rng.random()
    if what < 0.3:
        del lines[at]
    elif what < 0.6:
        lines.insert(to, lines[at])
    elif what < 0.9:
        lines[at], lines[to] = lines[to], lines[at]
    else:
        lines[at:at] = [lines[at]] * rng.choice((3, 30, 300))
    return b"\n".join(lines)


def _endings(data: bytes, rng: random.Random, _: Sequence[bytes]) -> bytes:
    return data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b" \n")))


CHANGES = (_flip, _bit, _cut, _drop, _repeat, _insert, _number_field, _number_field, _number_text, _number_text, _word,
           _word, _line, _endings)  # fmt: skip
