"""Files appear whole or not at all: written under a temporary name in the same folder, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cryosuite.errors import InputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _created_mode() -> int:
    """The permissions that a plain open() would give a new file (mkstemp gives 0600)."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


_CREATED_MODE = _created_mode()  # asked once: reading the mask sets it for all threads for a moment


def write_error(path: str | os.PathLike, error: OSError, needed: int | None = None) -> InputError:
    """An OSError while writing ``path`` as a message for the user, with the space needed when it is known (bytes)."""
    if error.errno in _FULL:
        space = f"; it needs {readable_bytes(needed)}" if needed else ""
        return InputError(f"{path}: the disk is full{space}: free some space or write elsewhere. Nothing was changed.")
    folder = Path(path).absolute().parent
    if error.errno == errno.ENOENT and not folder.is_dir():
        return InputError(f"{path}: cannot write: the folder {folder} does not exist")
    return InputError(f"{path}: cannot write: {error.strerror or error}")


def readable_bytes(count: int) -> str:
    """1536 -> '1.5 KiB (1536 bytes)'."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit} ({count} bytes)"


def require_space(path: str | os.PathLike, needed: int) -> None:
    """Raise InputError when the disk that will hold ``path`` has fewer than ``needed`` bytes free."""
    try:
        free = shutil.disk_usage(Path(path).absolute().parent).free
    except OSError:
        return  # the folder's absence is reported by the write itself
    if free < needed:
        raise InputError(
            f"{path}: not enough disk space: needs {readable_bytes(needed)}, {readable_bytes(free)} are free. "
            "Nothing was written."
        )


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
    suffix = "".join(path.suffixes[-2:]) if suffix is None else suffix
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:80]}.", suffix=suffix)
        os.close(handle)
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
        raise write_error(path, error, needed) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)


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
