"""Files that once broke a reader, replayed: each is read or refused in one sentence now."""

from __future__ import annotations

import warnings
from pathlib import Path

import hostile_seeds
import pytest
from hostile import attempt
from hostile_readers import READERS

CORPUS = Path(__file__).parent / "corpus"
FOLDERS = {"".join(c if c.isalnum() else "_" for c in name): name for name in READERS}
FILES = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that belong together, of which one is the hostile one."""
    folder = tmp_path_factory.mktemp("scene")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hostile_seeds.scene(folder)
    return folder


def test_the_corpus_is_small_and_every_folder_has_a_reader() -> None:
    assert FILES and sum(path.stat().st_size for path in FILES) < 300_000
    assert {path.parent.name for path in FILES} <= FOLDERS.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_replayed(file: Path, scene: Path) -> None:
    reader = READERS[FOLDERS[file.parent.name]]
    path = scene / reader.name
    before = path.read_bytes() if path.exists() else None
    try:
        for data in (reader.seeds()[0], file.read_bytes()):  # the first imports what is needed
            path.write_bytes(data)
            outcome = attempt(reader.read, path, writes=reader.writes)
        assert outcome.fault is None, outcome.fault.details
    finally:
        path.unlink() if before is None else path.write_bytes(before)


@pytest.mark.parametrize("name", READERS)
def test_each_reader_takes_one_of_its_valid_files(name: str, scene: Path) -> None:
    """A reader that refused everything would survive any fuzzing."""
    reader = READERS[name]
    path = scene / reader.name
    before = path.read_bytes() if path.exists() else None
    found = []
    for data in reader.seeds():
        path.write_bytes(data)
        found.append(attempt(reader.read, path, writes=reader.writes))
        if found[-1].result == "read":
            break
    path.unlink() if before is None else path.write_bytes(before)
    assert found[-1].result == "read" or name == "csv", found[-1].message  # csv: two maps of one name
