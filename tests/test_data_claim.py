"""Output folders: what is ours may be replaced, what is somebody else's may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryosuite.data.claim import claim, finished
from cryosuite.data.folder import File, Folder
from cryosuite.errors import InputError


class Things(Folder):
    table = File("table.csv")
    last = File("last.yaml")


def test_files_of_others_under_our_names_stay(tmp_path: Path) -> None:
    out = Things(tmp_path)
    (tmp_path / "notes.txt").touch()
    claim(out.path, out.last, [*out.names(), "vol_*.mrc"])  # nothing of our names: welcome
    finished(out.path)
    (tmp_path / "vol_007.mrc").write_text("mine")
    with pytest.raises(InputError, match=r"holds vol_007\.mrc, but no last\.yaml.*another folder \(-o\)\."):
        claim(out.path, out.last, [*out.names(), "vol_*.mrc"])
    claim(out.path, out.last, [*out.names(), "vol_*.mrc"], overwrite=True)


def test_a_folder_of_ours_is_taken_again_finished_or_killed(tmp_path: Path) -> None:
    out = Things(tmp_path / "out")
    claim(out.path, out.last, out.names())
    out.table.touch()  # ... and killed
    claim(out.path, out.last, out.names())
    out.last.touch()
    finished(out.path)
    assert sorted(entry.name for entry in out.path.iterdir()) == ["last.yaml", "table.csv"]
    claim(out.path, out.last, out.names())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = Things(tmp_path / "file" / "out")
    with pytest.raises(InputError, match="cannot write there.*-o"):
        claim(out.path, out.last, out.names())
