"""YAML files: a mapping of plain values, read by the safe loader, written atomically."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.errors import InputError
from cryosuite.formats.atomic import write_text
from cryosuite.formats.checks import printable, read_bytes


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Only plain values are built (strings, numbers, lists, mappings): a tag that asks for a Python object is refused by
    name. Raises InputError for a missing, empty or broken file and for one that is not a mapping.
    """
    import yaml

    data = read_bytes(path, "YAML file")
    try:
        loaded = yaml.safe_load(data)
    except yaml.constructor.ConstructorError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise InputError(f"{path}: refused{where}: {printable(error.problem)}; only plain values are allowed") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {printable(error)}") from None
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not valid YAML: {printable(error)}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected a mapping (name: value lines), found {type(loaded).__name__}")
    return loaded


def write_yaml(path: str | os.PathLike, mapping: Mapping[str, Any]) -> None:
    """Write a mapping of plain values as YAML, keys in the order given, atomically.

    numpy numbers and arrays, tuples and paths are turned into plain numbers, lists and text. Raises InputError when the
    file cannot be written and TypeError for a value that YAML has no plain form for.
    """
    import yaml

    text = yaml.safe_dump(_plain(mapping), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    write_text(path, text)


def _plain(value: Any) -> Any:
    """numpy, tuples and paths to what the safe loader gives back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot write a {type(value).__name__} to YAML")
