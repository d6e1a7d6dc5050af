"""Maps in files, enhanced: one map or two half maps for the command, many maps for ``polish`` and ``analyze``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cryosuite.console import say
from cryosuite.data.map_grid import MapGrid, read_grid, values_on, write_like
from cryosuite.data.map_weights import MapWeights, load_map_weights, shipped_map_weights
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError, notice
from cryosuite.methods.lvm_sharpen import Enhanced, EnhanceOptions, enhance
from cryosuite.methods.lvm_sharpen_checks import inspect_map
from cryosuite.metrics.model_cc import Shells, shell_correlation
from cryosuite.training.launch import resolve_accelerator

__all__ = ["Inputs", "half_fsc", "label", "open_weights", "read_inputs", "sharpen_files"]


@dataclass(frozen=True)
class Inputs:
    """What is enhanced: a map, or the mean of two half maps, which are kept beside it; and a mask or None."""

    grid: MapGrid
    halves: tuple[MapGrid, MapGrid] | None = None
    mask: MapGrid | None = None


def open_weights(task: str | None, path: Path | None) -> MapWeights:
    """The network of a file or run, or the one that comes with cryosuite for a task ("sharpen" where none is named).

    Raises InputError where there is none, or the file is for another task than asked for.
    """
    if path is None:
        return load_map_weights(shipped_map_weights(task or "sharpen"))
    weights = load_map_weights(RunDir(path).network if Path(path).is_dir() else path)
    if task is not None and task != weights.task:
        raise InputError(f"{path}: was trained for --task {weights.task}, not {task}: leave --task out, or give others")
    return weights


def read_inputs(
    path: Path | None, half1: Path | None, half2: Path | None, mask: Path | None = None, apix: float | None = None
) -> Inputs:
    """Read what a user named: a map, or two half maps on one grid, and a mask on the same.

    Raises InputError for neither or both, one half alone, or maps on different grids.
    """
    if (half1 is None) != (half2 is None):
        raise InputError(f"{half1 or half2}: one half map alone was given: give both --half1 and --half2, or one map")
    if (path is None) == (half1 is None):
        raise InputError("name one map to enhance, or its half maps with --half1 and --half2 (not both)")
    if path is not None:
        grid, halves = read_grid(path, apix), None
    else:
        first, second = (read_grid(half, apix) for half in (half1, half2))
        if np.array_equal(first.data, values_on(second, first)):
            raise InputError(f"{half1}, {half2}: hold the same values; give the two different half maps")
        grid, halves = first.with_data((first.data + second.data) / 2), (first, second)
    found = None
    if mask is not None:
        found = read_grid(mask, apix)
        values_on(found, grid)
        if not found.data.max() > 0.5:
            raise InputError(f"{mask}: is no mask: none of its values is above 0.5 (1 is inside, 0 outside)")
    return Inputs(grid, halves, found)


def half_fsc(first: np.ndarray, second: np.ndarray, grid: MapGrid) -> Shells:
    """FSC of two half maps (z, y, x) on a grid, without a mask."""
    return shell_correlation(first, second, grid.voxel)


def label(task: str) -> str:
    """The line that is added to the labels of a map that a network has changed."""
    return f"cryosuite lvm-sharpen: {task} by a network, not a measurement"


def sharpen_files(
    files: Sequence[tuple[Path, Path]],
    task: str | None = None,
    weights: Path | None = None,
    accelerator: str = "auto",
    options: EnhanceOptions | None = None,
    resolutions: Sequence[float | None] | None = None,
) -> list[Enhanced]:
    """Enhance maps one after another, each written beside its original under another name, grey values as there.

    Args:
        files: (map to read, map to write).
        resolutions: of the maps, A, where they are known; else they are estimated.

    Returns what was made of each; a map that cannot be enhanced (an empty one, say) is named in a notice and left out.
    Raises InputError as ``open_weights`` does, or for a map that would replace its original.
    """
    network = open_weights(task, weights)
    options = options or EnhanceOptions(match_scale=True)
    device = torch.device(resolve_accelerator(accelerator))
    done = []
    for i, (source, target) in enumerate(files):
        if Path(source).resolve() == Path(target).resolve():
            raise InputError(f"{source}: the sharpened map would replace it")
        say(f"{network.task}: {Path(source).name} -> {target}")
        try:
            grid = read_grid(source)
            inspect_map(grid, network.task, network.voxel)
            known = resolutions[i] if resolutions is not None else None
            known = known if known is not None and np.isfinite(known) and known > 0 else None
            found = enhance(grid, network, replace(options, resolution=known), device)
        except InputError as error:
            notice(f"not sharpened: {error}")
            continue
        write_like(target, found.map.data, grid, label(network.task))
        done.append(found)
    return done
