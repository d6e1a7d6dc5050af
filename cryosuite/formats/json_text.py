"""JSON as every reader takes it: numbers that are not finite, which JSON does not know, become null."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.formats.atomic import write_text


def finite(value: Any) -> Any:
    """A value in JSON's own types: None for NaN and infinity, lists for arrays, keys as text."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, np.generic):
        return finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write a value that ``finite`` takes, whole or not at all."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")
