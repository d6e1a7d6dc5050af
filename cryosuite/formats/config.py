"""YAML files: a mapping of plain values, read by the safe loader, written atomically."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cryosuite.errors import InputError
from cryosuite.formats.atomic import write_text
from cryosuite.formats.checks import printable, read_bytes

MAX_BYTES = 4 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
MAX_PLAIN = 100_000  # characters


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Only plain values are built (strings, numbers, lists, mappings): a tag that asks for a Python object is refused by
    name. Raises InputError for a missing, empty or broken file, for one that is not a mapping, and for one made to
    exhaust its reader: too long, too deep, or of aliases that repeat each other.
    """
    import yaml

    data = read_bytes(path, "YAML file", MAX_BYTES)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where PyYAML was built with libyaml
    try:
        _require_modest(path, yaml.parse(data, Loader=loader))
        loaded = yaml.load(data, Loader=loader)
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


def _require_modest(path: str | os.PathLike, events: Iterable[Any]) -> None:
    """Look through the events of a YAML file, before anything is built of them.

    Deep nesting overruns the stack of libyaml and takes PyYAML minutes; a few lines of aliases of aliases (also behind
    ``<<``) stand for billions of values; a number a:b:c:... of base 60 takes the square of its length.
    """
    import yaml

    sizes: dict[str | None, int] = {}  # values that an anchor stands for
    open_nodes: list[tuple[str | None, int]] = []  # anchor, values before it
    count = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise InputError(f"{path}: not valid YAML: the alias {event.anchor} stands for itself or for nothing")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            sizes[event.anchor] = 1
            if event.implicit[0] and len(event.value) > MAX_PLAIN:
                raise InputError(f"{path}: not valid YAML: a value of {len(event.value)} characters without quotes")
        if len(open_nodes) > MAX_DEPTH:
            raise InputError(f"{path}: not valid YAML: values are nested more than {MAX_DEPTH} deep")
        if count > MAX_VALUES:
            raise InputError(f"{path}: holds, or repeats by aliases, more than {MAX_VALUES} values: too many")


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
