"""Files appear whole or not at all: written under a temporary name in the same folder, flushed, then renamed.

A temporary file is locked for as long as its writer lives, so that the next writer of the same file knows which of
them a killed process left behind, and removes those.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from cryosuite.errors import FileError, InputError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up (the disk is full for you)",
    errno.EFBIG: "the file is larger than this system or `ulimit -f` allows",
}


def _created_mode() -> int:
    """The permissions that a plain open() would give a new file (mkstemp gives 0600)."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


_NAME_BYTES, _ENDING = 150, 16  # of a temporary name, which may have 255 bytes: the start and the last characters
_CREATED_MODE = _created_mode()  # asked once: reading the mask sets it for all threads for a moment


def write_error(path: str | os.PathLike, error: OSError, needed: int | None = None, least: int = 0) -> FileError:
    """An OSError while writing ``path`` as a message for the user: for a full disk what is needed and what is free.

    ``needed`` bytes in all where that is known; else ``least``, what had been written when it failed.
    """
    if error.errno in _FULL:
        need = readable_bytes(needed) if needed else f"more than {readable_bytes(least)}" if least else ""
        free = free_space(path)
        have = "" if free is None else f"{readable_bytes(free)} are free"
        space = ", ".join(filter(None, [f"it needs {need}" if need else "", have]))
        return FileError(
            f"{path}: {_FULL[error.errno]}{f'; {space}' if space else ''}: free some space or write elsewhere. "
            "Nothing was changed."
        )
    folder = Path(path).absolute().parent
    if error.errno == errno.ENOENT and not folder.is_dir():
        return FileError(f"{path}: cannot write: the folder {folder} does not exist")
    return FileError(f"{path}: cannot write: {error.strerror or error}")


def free_space(path: str | os.PathLike) -> int | None:
    """Bytes free on the disk that holds, or will hold, ``path``; None where that cannot be asked."""
    try:
        return shutil.disk_usage(Path(path).absolute().parent).free
    except OSError:
        return None


def readable_bytes(count: int) -> str:
    """1536 -> '1.5 KiB (1536 bytes)'."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit} ({count} bytes)"


def require_space(path: str | os.PathLike, needed: int) -> None:
    """Raise FileError when the disk that will hold ``path`` has fewer than ``needed`` bytes free."""
    free = free_space(path)
    if free is not None and free < needed:  # None: the folder's absence is reported by the write itself
        raise FileError(
            f"{path}: not enough disk space: needs {readable_bytes(needed)}, {readable_bytes(free)} are free. "
            "Nothing was written."
        )


def reserve(file: str | os.PathLike | BinaryIO, size: int, path: str | os.PathLike | None = None) -> None:
    """Give a new file (by its name, or open for writing) its place on the disk, so that a mapped view can be written.

    In a file with holes a full disk shows when a page is touched, by a signal that ends the process. Raises InputError
    for a full disk, naming ``path`` (default: the file).
    """
    try:
        with contextlib.ExitStack() as opened:
            stream = file if hasattr(file, "fileno") else opened.enter_context(open(file, "wb"))
            os.posix_fallocate(stream.fileno(), 0, max(size, 1))
    except OSError as error:
        raise write_error(path or getattr(file, "name", file), error, size) from None


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all bytes to an unbuffered file; one write to a nearly full disk may take only a part of them."""
    left = memoryview(data).cast("B")
    while len(left):
        left = left[file.write(left) :]


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, suffix: str | None = None, needed: int | None = None) -> Iterator[Path]:
    """Context manager: a temporary path in the folder of ``path``; on success it is flushed to disk and renamed.

    On any failure the temporary file is removed and an existing ``path`` stays as it was. ``suffix`` is the ending of
    the temporary name where a library chooses the format by it (default: that of ``path``). ``needed`` bytes are
    checked against the free space first. Raises InputError for a full disk, a missing folder or missing permission.
    """
    path = Path(path)
    if needed is not None:
        require_space(path, needed)
    suffix = _ending(path, suffix)
    try:
        _remove_known_leftovers(path, suffix)
        handle, name = _claimed(path, suffix)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            raise write_error(path, error, needed) from None
        raise InputError(f"{path}: cannot write: {error}") from None
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, _CREATED_MODE)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in _FULL and error.filename not in (None, str(temporary)):
            raise  # about another file that was in use meanwhile
        raise write_error(path, error, needed, _size(temporary)) from error
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)


def _prefix(path: Path) -> str:
    return f".{path.name.encode('utf-8', 'surrogateescape')[:_NAME_BYTES].decode('utf-8', 'ignore')}."


def _ending(path: Path, suffix: str | None) -> str:
    """Ending of a temporary name: that of the path, of which only the last where a dot stands early in a long name."""
    return "".join(path.suffixes[-2:])[-_ENDING:] if suffix is None else suffix


def _claimed(path: Path, suffix: str) -> tuple[int, str]:
    """(descriptor, name) of a new temporary file for ``path``, locked where the file system can."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path), suffix=suffix)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # 0: taken for a leftover in the moment before it was locked
            return handle, name
        os.close(handle)


def remove_leftovers(path: str | os.PathLike, suffix: str | None = None) -> None:
    """Delete the temporary files of ``path`` whose writers are dead: those that nobody holds a lock on."""
    path = Path(path)
    with contextlib.suppress(OSError):
        _remove_dead(path, suffix, _hidden(path.parent))


_known: dict[tuple[int, int], list[str]] = {}  # folder (device, inode) -> hidden files when first written into


def _remove_known_leftovers(path: Path, suffix: str) -> None:
    """`remove_leftovers`, of those that lay in the folder when this process first wrote into it.

    A folder of 100,000 files on a network disk takes seconds to be listed, which no writer of a file may.
    """
    with contextlib.suppress(OSError):
        found = path.parent.stat()
        key = (found.st_dev, found.st_ino)
        if key not in _known:
            _known[key] = _hidden(path.parent)
        if _known[key]:
            _known[key] = _remove_dead(path, suffix, _known[key])


def _hidden(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.name.startswith(".")]


def _remove_dead(path: Path, suffix: str | None, names: list[str]) -> list[str]:
    """Delete those of the names that are temporary files of ``path`` without a writer; returns the others."""
    ours = re.compile(re.escape(_prefix(path)) + "[a-z0-9_]{8}" + re.escape(_ending(path, suffix)))
    for name in filter(ours.fullmatch, names):
        with contextlib.suppress(OSError):  # BlockingIOError: its writer lives; others: no locks on this disk
            handle = os.open(path.parent / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path.parent / name)
            finally:
                os.close(handle)
    return [name for name in names if not ours.fullmatch(name)]


def _size(path: Path) -> int:
    """Bytes in a file; 0 where it is gone."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sync_folder(folder: Path) -> None:
    """Flush the rename itself; some file systems do not allow it, which costs nothing but the guarantee."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    with atomic_path(path, needed=len(data)) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically."""
    write_bytes(path, text.encode("utf-8"))


def append_text(path: str | os.PathLike, text: str) -> None:
    """Append ``text`` (UTF-8) to a log, all of it or nothing; raises InputError, for a full disk with what is free."""
    data = memoryview(text.encode("utf-8"))
    try:
        with open(path, "ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                write_all(file, data)
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
    except OSError as error:
        raise write_error(path, error, len(data)) from None
