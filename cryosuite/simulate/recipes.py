"""Recipes: from molecules to the states of a set: mix, assembly, loop, homogeneous."""

from __future__ import annotations

import re

import numpy as np

from cryosuite.errors import InputError
from cryosuite.simulate.phantoms import make_phantom, random_rotation, turn_about
from cryosuite.simulate.sources import Structure, select
from cryosuite.simulate.states import State, StateSet

RECIPES = ("mix", "assembly", "loop", "homogeneous")

# images per state of CryoBench's Ribosembly and the composition of the states, in that order (BENCHMARKS, 1 and 6)
RIBOSEMBLY = (9076, 14378, 23547, 44366, 30647, 38500, 3915, 3980, 12740, 11975, 17988, 5001, 35367, 37448, 40540, 5772)
RIBO_PATTERNS = [
    "10000000", "11000000", "11100000", "11110000", "10001000", "10001100", "10001110", "11001000",
    "11101000", "11111000", "11111100", "11111110", "11110001", "11111001", "11111101", "11111111",
]  # fmt: skip
RIBO_BLOCKS = "5-560,561-650,651-770,771-915,916-1050,1051-1210,1211-1396,1397-1544"


def _mass_details(structures: list[Structure]) -> dict:
    return {
        "structures": [s.name for s in structures],
        "mass_kda": [round(s.mass / 1e3, 1) for s in structures],
    }


def mix(structures: list[Structure]) -> StateSet:
    """Unrelated molecules, each with its centre of mass at the origin."""
    states = [State(s.name, s.centred(), s.weight) for s in structures]
    return StateSet("mix", states, details=_mass_details(structures))


def homogeneous(structure: Structure) -> StateSet:
    """One molecule in one state."""
    state = State(structure.name, structure.centred(), structure.weight)
    return StateSet("homogeneous", [state], details=_mass_details([structure]))


def nested_patterns(blocks: int, states: int) -> list[str]:
    """Compositions of an assembly that share block 0: the pathway in order, then side branches that skip a block.

    Args:
        blocks: parts of the assembly.
        states: compositions wanted.

    Returns:
        ``states`` strings of 0 and 1, all different, block 0 always present.

    Raises:
        InputError: more states than compositions.
    """
    if states > 2 ** (blocks - 1):
        raise InputError(f"{blocks} blocks give at most {2 ** (blocks - 1)} states, not {states}: use more blocks.")
    if blocks == 8 and states <= 16:
        full = RIBO_PATTERNS
        return list(full) if states == 16 else [full[i] for i in np.linspace(0, 15, states).round().astype(int)]
    every = ["1" + format(i, f"0{blocks - 1}b") for i in range(2 ** (blocks - 1))] if blocks <= 12 else []
    main = ["1" * i + "0" * (blocks - i) for i in range(1, blocks + 1)]
    branch = [
        "1" * i + "0" + "1" * j + "0" * (blocks - 1 - i - j) for i in range(1, blocks) for j in range(1, blocks - i)
    ]
    ordered = list(dict.fromkeys(main + branch + every))
    if states < len(main):
        ordered = [main[i] for i in np.linspace(0, blocks - 1, states).round().astype(int)]
    if states > len(ordered):
        raise InputError(f"{blocks} blocks give {len(ordered)} nested states, not {states}: use fewer states.")
    return ordered[:states]


def split_blocks(structure: Structure, blocks: str) -> np.ndarray:
    """Block of each atom, -1 for atoms left out: (n,) int.

    ``blocks``: "domain" (phantoms), "chain", a number (equal runs of residues in file order), or residue ranges such as
    "5-560,561-650" (ranges of the longest chain), or selections separated by semicolons ("A,B;C:1-100").
    """
    if blocks == "domain":
        if structure.domain is None:
            raise InputError(f"{structure.name} has no domains: use --blocks chain, a number, or residue ranges.")
        return structure.domain.astype(np.int64)
    if blocks == "chain":
        order = {name: i for i, name in enumerate(dict.fromkeys(structure.chain.tolist()))}
        return np.array([order[name] for name in structure.chain.tolist()], np.int64)
    if blocks.isdigit():
        key = np.char.add(np.char.add(structure.chain.astype(str), ":"), structure.residue.astype(str))
        new = np.concatenate([[False], key[1:] != key[:-1]])
        residue = np.cumsum(new)
        return residue * int(blocks) // (residue[-1] + 1)
    out = np.full(len(structure), -1, np.int64)
    if ";" in blocks or any(c.isalpha() for c in blocks):
        for i, part in enumerate(blocks.split(";")):
            out[select(structure, part)] = i
        return out
    names, sizes = np.unique(structure.chain, return_counts=True)
    longest = structure.chain == names[np.argmax(sizes)]
    for i, (first, last) in enumerate(_ranges(blocks)):
        out[longest & (structure.residue >= first) & (structure.residue <= last)] = i
    return out


def _ranges(text: str) -> list[tuple[int, int]]:
    """ "5-560,561-650" as pairs of numbers."""
    pieces = [re.fullmatch(r"\s*(\d+)-(\d+)\s*", piece) for piece in text.split(",")]
    if not all(pieces):
        raise InputError(f"--blocks {text}: expected domain, chain, a number, or residue ranges such as 1-200,201-450.")
    return [(int(m.group(1)), int(m.group(2))) for m in pieces]


def assembly(structure: Structure, blocks: str = "domain", n_states: int = 16) -> StateSet:
    """Nested compositions of one molecule in one common frame: all share the core (block 0).

    Args:
        structure: the whole assembly.
        blocks: see ``split_blocks``.
        n_states: how many compositions.

    Returns:
        States centred by the centre of mass of the whole, never by their own.
    """
    block = split_blocks(structure, blocks)
    count = int(block.max()) + 1
    if count < 2:
        raise InputError(f"{structure.name}: an assembly needs at least two blocks, found {count} (--blocks).")
    patterns = nested_patterns(count, n_states)
    used = block >= 0
    empty = np.flatnonzero(np.bincount(block[used], minlength=count) == 0)
    if len(empty):
        raise InputError(f"--blocks {blocks}: part {empty[0] + 1} of {count} holds no atoms of {structure.name}.")
    xyz = structure.xyz - np.average(structure.xyz[used], axis=0, weights=structure.weight[used])
    states = []
    for pattern in patterns:
        keep = used & np.array([c == "1" for c in pattern])[np.maximum(block, 0)]
        states.append(State(pattern, xyz[keep], structure.weight[keep]))
    sizes = np.bincount(block[used], minlength=count) / used.sum()
    details = {
        **_mass_details([structure]), "blocks": blocks, "patterns": patterns,
        "block_share": [round(float(v), 4) for v in sizes],
    }  # fmt: skip
    return StateSet("assembly", states, details=details)


def loop(
    structure: Structure,
    moving: np.ndarray,
    hinge: np.ndarray | None = None,
    towards: np.ndarray | None = None,
    n_states: int = 10,
) -> StateSet:
    """One domain turned through 360 degrees in equal steps about an axis.

    Args:
        structure: the molecule.
        moving: (n,) bool, the atoms that turn.
        hinge: (3,) A, a point on the axis; None: the middle of the contact between the two parts.
        towards: (3,) A, another point on the axis; None: the centre of what does not move.
        n_states: steps of the full turn.

    Returns:
        States in one frame, centred by the mean over all of them; embedding (cos, sin) of the angle.

    Raises:
        InputError: nothing or everything moves, or the axis has no direction.
    """
    if not moving.any() or moving.all():
        raise InputError(f"{structure.name}: the moving part must be some of the atoms, not none or all.")
    rest = ~moving
    hinge = _contact(structure.xyz[moving], structure.xyz[rest]) if hinge is None else hinge
    axis = (structure.xyz[rest].mean(0) if towards is None else towards) - hinge
    if np.linalg.norm(axis) < 1e-6:
        raise InputError(f"{structure.name}: the two points of the axis coincide; choose another --hinge or --towards.")
    angles = 2 * np.pi * np.arange(n_states) / n_states
    frames = []
    for angle in angles:
        xyz = structure.xyz.copy()
        xyz[moving] = (xyz[moving] - hinge) @ turn_about(axis, angle).T + hinge
        frames.append(xyz)
    centre = np.mean([np.average(xyz, axis=0, weights=structure.weight) for xyz in frames], axis=0)
    names = [f"{np.rad2deg(angle):05.1f}deg" for angle in angles]
    states = [State(name, xyz - centre, structure.weight) for name, xyz in zip(names, frames, strict=True)]
    details = {
        **_mass_details([structure]), "angles_deg": np.rad2deg(angles).round(3).tolist(),
        "axis": (axis / np.linalg.norm(axis)).round(5).tolist(), "hinge": (hinge - centre).round(3).tolist(),
        "moving_share": round(float(moving.mean()), 4),
    }  # fmt: skip
    return StateSet("loop", states, embedding=np.stack([np.cos(angles), np.sin(angles)], 1), details=details)


def _contact(moving: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Middle of the contact between two sets of points (the nearest pairs): (3,)."""
    from scipy.spatial import cKDTree

    distance, partner = cKDTree(rest).query(moving)
    near = np.argsort(distance)[: max(10, len(moving) // 100)]
    return (moving[near] + rest[partner[near]]).mean(0) / 2


def loop_phantom(rng: np.random.Generator) -> tuple[Structure, np.ndarray, np.ndarray]:
    """A phantom for ``loop``: a body and an arm at its side, bent away from the axis it will turn about.

    Returns:
        The structure, its moving atoms (n,) bool and the hinge (3,).
    """
    body = make_phantom(rng, rng.uniform(90e3, 140e3), domains=3)
    arm = make_phantom(rng, rng.uniform(35e3, 50e3), domains=1)
    direction = random_rotation(rng)[0]
    reach = float((body.xyz @ direction).max())
    hinge = direction * (reach + 2.0)
    # the arm's long axis makes 55-75 degrees with the hinge axis, so that its turn is seen from all sides
    _, _, long = np.linalg.svd(arm.xyz, full_matrices=False)
    side = np.cross(direction, random_rotation(rng)[0])
    side /= np.linalg.norm(side)
    tilt = np.deg2rad(rng.uniform(55, 75))
    target = np.cos(tilt) * direction + np.sin(tilt) * side
    frame = np.stack([target, np.cross(direction, target) / np.linalg.norm(np.cross(direction, target)), np.zeros(3)])
    frame[2] = np.cross(frame[0], frame[1])
    long[2] = np.cross(long[0], long[1])
    placed = arm.xyz @ long.T @ frame
    placed += hinge + target * float(-(placed @ target).min())
    placed += direction * max(0.0, reach + 4.0 - float((placed @ direction).min()))
    moving = np.concatenate([np.zeros(len(body.xyz), bool), np.ones(len(placed), bool)])
    xyz = np.concatenate([body.xyz, placed])
    structure = Structure(
        "phantom-loop", xyz, np.concatenate([body.atomic_number, arm.atomic_number]), body.mass + arm.mass,
        np.where(moving, "arm", "body"), np.arange(len(xyz)) // 8 + 1, moving.astype(int),
    )  # fmt: skip
    return structure, moving, hinge
