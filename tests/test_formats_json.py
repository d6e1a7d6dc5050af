"""JSON that every reader takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cryosuite.formats.json_text import write_json


def test_numbers_that_json_does_not_know_are_null(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    held = {"mean": np.float32(0.5), "of": {3: [np.nan, 1]}, "all": np.array([[np.inf, 2.0]]), "flag": np.bool_(True)}
    write_json(path, held)
    found = json.loads(path.read_text(), parse_constant=lambda text: 1 / 0)
    assert found == {"mean": 0.5, "of": {"3": [None, 1]}, "all": [[None, 2.0]], "flag": True}
