"""From what the user asks for to the states of a set: finds the molecules and applies the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosuite.errors import InputError, notice
from cryosuite.simulate.imaging import stage_rng
from cryosuite.simulate.phantoms import MAX_RADIUS, Phantom, make_phantom
from cryosuite.simulate.recipes import RECIPES, RIBOSEMBLY, assembly, homogeneous, loop, loop_phantom, mix
from cryosuite.simulate.sources import (
    MAP_FILES,
    Structure,
    find_files,
    from_phantom,
    has_ending,
    load_structures,
    phantom_count,
    read_structure,
    select,
)
from cryosuite.simulate.states import State, StateSet

ASSEMBLY_MASS, ASSEMBLY_DOMAINS = 400e3, 8


@dataclass(frozen=True)
class RecipeOptions:
    """What to image: see the help of ``cryosuite simulate``."""

    recipe: str = "mix"
    structures: str = "phantom:16"
    n_states: int | None = None  # assembly (16) and loop (10)
    blocks: str | None = None  # assembly: None is "domain" for phantoms, else "chain" (8 runs for a single chain)
    moving: str | None = None  # loop: selection
    hinge: str | None = None
    towards: str | None = None
    occupancies: str = "equal"


def build_states(options: RecipeOptions, seed: int, render_pixel: float) -> StateSet:
    """The states of a set.

    Args:
        options: what to image.
        seed: of phantoms and random occupancies.
        render_pixel: A; maps finer than this are coarsened to it.

    Returns:
        States with occupancies.

    Raises:
        InputError: unknown recipe, nothing found, or a recipe that does not fit the molecules.
    """
    if options.recipe not in RECIPES:
        raise InputError(f"--recipe {options.recipe}: unknown; there are {', '.join(RECIPES)}.")
    if options.n_states is not None and options.n_states < 1:
        raise InputError(f"--states {options.n_states}: at least 1 is needed.")
    rng = stage_rng(seed, "structures")
    maps = [path for path in find_files(options.structures) if has_ending(path, MAP_FILES)]
    if maps:
        states = _from_maps(maps, options, render_pixel)
    elif options.recipe == "mix":
        states = mix(load_structures(options.structures, rng))
    elif options.recipe == "assembly":
        states = _assembly(options, rng)
    elif options.recipe == "loop":
        states = _loop(options, rng)
    else:
        states = homogeneous(_one(options, rng))
    states.details["source"] = options.structures
    states.occupancy = occupancies(options.occupancies, len(states), rng)
    return states


def occupancies(text: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Relative frequencies (count,) from ``equal``, ``ribosembly``, ``random`` or numbers separated by commas.

    Raises:
        InputError: a wrong number of values, or values that are no frequencies.
    """
    if text == "equal":
        return np.full(count, 1 / count)
    if text == "random":
        share = rng.dirichlet(np.full(count, 2.0))
        return share / share.sum()
    if text == "ribosembly":
        values = list(map(float, RIBOSEMBLY))
    else:
        try:
            values = [float(v) for v in text.split(",")]
        except ValueError:
            raise InputError(
                f"--occupancies {text}: expected equal, random, ribosembly, or numbers separated by commas."
            ) from None
    if len(values) != count:
        raise InputError(f"--occupancies gives {len(values)} values, but the set has {count} states.")
    if min(values) < 0 or sum(values) <= 0 or not np.isfinite(values).all():
        raise InputError(f"--occupancies {text}: expected numbers of at least 0 with a positive sum.")
    return np.array(values) / np.sum(values)


def _one(options: RecipeOptions, rng: np.random.Generator) -> Structure:
    """The single molecule of a recipe that takes one."""
    if phantom_count(options.structures) is not None:
        return load_structures("phantom:1", rng)[0]
    files = find_files(options.structures)
    if not files:  # phantoms in several items
        return load_structures("phantom:1", rng)[0]
    return read_structure(_first(files, options.recipe))


def _first(files: list[Path], recipe: str) -> Path:
    """The file that a recipe of one molecule takes, with a notice where there are more."""
    if len(files) > 1:
        notice(f"--recipe {recipe} takes one structure: {files[0].name} is used, the other {len(files) - 1} not.")
    return files[0]


def _assembly_phantom(rng: np.random.Generator) -> Phantom:
    """A phantom of eight domains that fits the usual box."""
    for _ in range(30):
        phantom = make_phantom(rng, ASSEMBLY_MASS, domains=ASSEMBLY_DOMAINS)
        if np.linalg.norm(phantom.xyz, axis=1).max() <= MAX_RADIUS:
            break
    return phantom


def _assembly(options: RecipeOptions, rng: np.random.Generator) -> StateSet:
    n_states = options.n_states or 16
    if phantom_count(options.structures) is not None:
        structure = from_phantom(_assembly_phantom(rng), "phantom-assembly")
        return assembly(structure, options.blocks or "domain", n_states)
    structure = _one(options, rng)
    default = "chain" if len(set(structure.chain.tolist())) > 1 else "8"
    return assembly(structure, options.blocks or default, n_states)


def _loop(options: RecipeOptions, rng: np.random.Generator) -> StateSet:
    n_states = options.n_states or 10
    if phantom_count(options.structures) is not None:
        structure, moving, hinge = loop_phantom(rng)
        return loop(structure, moving, hinge, n_states=n_states)
    structure = _one(options, rng)
    if not options.moving:
        chains = ", ".join(dict.fromkeys(structure.chain.tolist()))
        raise InputError(
            f"--recipe loop: say which part of {structure.name} turns, e.g. --moving A,B:1-208 (its chains: {chains})."
        )
    points = [
        structure.xyz[select(structure, text)].mean(0) if text else None for text in (options.hinge, options.towards)
    ]
    return loop(structure, select(structure, options.moving), *points, n_states=n_states)


def _from_maps(paths: list[Path], options: RecipeOptions, render_pixel: float) -> StateSet:
    """Maps as states, each in the frame of its box."""
    from cryosuite.simulate.maps import map_state

    if options.recipe not in ("mix", "homogeneous"):
        raise InputError(f"--recipe {options.recipe} is made from atoms; maps can be used with mix or homogeneous.")
    others = len(find_files(options.structures)) - len(paths)
    if others or any(phantom_count(item) is not None for item in options.structures.split(",")):
        raise InputError("--structures: give either maps or atomic models, not both.")
    if options.recipe == "homogeneous":
        paths = [_first(paths, options.recipe)]
    states: list[State] = [map_state(path, render_pixel) for path in paths]
    return StateSet(options.recipe, states, details={"structures": [s.name for s in states], "from_maps": True})
