"""Paths through latent space: straight from particle to particle, or from neighbour to neighbour where particles are.

A straight line is short but may lead through places where no particle is, and the volumes there are invented. The path
through neighbours is the shortest one on the graph that joins every particle with its nearest ones, a step counted by
the square of its length (the Fermat distance with power 2): many short steps through the crowd are cheaper than one
long step across a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosuite.errors import InputError, notice

NEIGHBOURS = 10
GRAPH_LIMIT = 30_000  # particles of the graph: above, that many and the ends
MOST_NEIGHBOURS = 160


@dataclass(frozen=True)
class LatentPath:
    """A path through latent space.

    Attributes:
        z: (k, zdim) float32, where volumes are made. at: (k,) distance travelled, from 0.
        anchors: numbers (in ``z``) of the points that were asked for. loop: the last point leads back to the first.
        through: rows of the particles the path was led through, for a path through neighbours; else the anchors' rows.
        how: "direct", "graph", "pc" or "file". title: in words.
    """

    z: np.ndarray
    at: np.ndarray
    anchors: np.ndarray
    through: np.ndarray
    loop: bool
    how: str
    title: str


def check_rows(rows: Sequence[int], z: np.ndarray, usable: np.ndarray, option: str = "") -> np.ndarray:
    """The rows (a,) int64 of particles to go to.

    Args:
        z: (N, zdim). usable: (M,) rows with latents that are numbers. option: who asked, for the message.

    Raises:
        InputError: a row below 0 or above N - 1, one whose latent is NaN, or fewer than two different ones.
    """
    rows = np.asarray(rows, np.int64)
    if len(np.unique(rows)) < 2:
        raise InputError("a path needs two particles at least, not one twice: --from ROW --to ROW (rows count from 0).")
    said = f"{option}: " if option else ""
    for row in rows:
        if not 0 <= row < len(z):
            raise InputError(f"{said}row {row} is not there: the run has {len(z)} particles, rows 0 to {len(z) - 1}.")
    lost = np.setdiff1d(rows, usable)
    if len(lost):
        raise InputError(f"{said}row {lost[0]} has a latent that is not a number (NaN): choose another particle.")
    return rows


def direct(z: np.ndarray, rows: np.ndarray, count: int, loop: bool = False) -> LatentPath:
    """A path of straight lines from particle to particle, ``count`` points as even as the particles allow.

    Args:
        z: (N, zdim). rows: (a,) of the particles, in order.

    Raises:
        InputError: fewer points than particles, or particles of one latent.
    """
    corners = z[np.append(rows, rows[0])] if loop else z[rows]
    points, at, anchors = _along(corners, np.arange(len(corners)), count, loop)
    title = " to ".join(map(str, rows)) + (" and back" if loop else "")
    return LatentPath(points, at, anchors, rows, loop, "direct", f"from particle {title}, in straight lines")


def through_neighbours(
    z: np.ndarray, rows: np.ndarray, count: int, usable: np.ndarray, loop: bool = False, neighbours: int = NEIGHBOURS,
    seed: int = 0,
) -> LatentPath:  # fmt: skip
    """The shortest path from particle to particle through nearest neighbours, ``count`` points even along it.

    Args:
        z: (N, zdim). rows: (a,) of the particles, in order. usable: (M,) rows with latents that are numbers; above
            ``GRAPH_LIMIT`` that many of them, drawn with ``seed``.
        neighbours: of each particle; doubled until the particles are joined.

    Raises:
        InputError: as ``direct``; particles that no neighbours join.
    """
    nodes = usable
    if len(nodes) > GRAPH_LIMIT:
        nodes = np.random.default_rng(seed).choice(nodes, GRAPH_LIMIT, replace=False)
        notice(f"the graph of neighbours is made of {GRAPH_LIMIT:,} of {len(usable):,} particles, the same each time.")
    nodes = np.union1d(nodes, rows)
    stops = np.append(rows, rows[0]) if loop else rows
    legs = _shortest(z[nodes], np.searchsorted(nodes, stops), neighbours)
    walked = [nodes[leg[: None if last else -1]] for leg, last in zip(legs, _is_last(len(legs)), strict=True)]
    through = np.concatenate(walked)
    corners = np.cumsum([0] + [len(leg) - 1 for leg in legs])
    points, at, anchors = _along(z[through], corners, count, loop)
    title = " to ".join(map(str, rows)) + (" and back" if loop else "")
    return LatentPath(
        points, at, anchors, through, loop, "graph", f"from particle {title}, from neighbour to neighbour"
    )


def of_points(z: np.ndarray, title: str, how: str = "file", loop: bool = False) -> LatentPath:
    """A path of given points (k, zdim), each of them a volume."""
    points = np.ascontiguousarray(z, np.float32)
    at = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    return LatentPath(points, at, np.arange(len(points)), np.zeros(0, np.int64), loop, how, title)


def _is_last(count: int) -> list[bool]:
    return [i == count - 1 for i in range(count)]


def _shortest(points: np.ndarray, stops: np.ndarray, neighbours: int) -> list[np.ndarray]:
    """Numbers of the points on the shortest path of each leg between stops, ends included."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import dijkstra
    from sklearn.neighbors import NearestNeighbors

    count = len(points)
    model = NearestNeighbors().fit(points)
    # latents of one value have a distance of 0, which a sparse graph takes for no edge
    least = 1e-9 * max(float(points.var(axis=0).sum()), 1e-30)
    while True:
        near = min(neighbours, count - 1)
        distance, row = model.kneighbors(n_neighbors=near)
        steps = np.maximum(np.square(distance, dtype=np.float64), least).ravel()
        graph = csr_matrix((steps, (np.repeat(np.arange(count), near), row.ravel())), shape=(count, count))
        graph = graph.maximum(graph.T)
        legs = []
        for start, end in zip(stops[:-1], stops[1:], strict=True):
            _, before = dijkstra(graph, directed=False, indices=start, return_predecessors=True)
            legs.append(_walk_back(before, start, end))
        if all(len(leg) for leg in legs):
            if near > NEIGHBOURS:
                notice(f"the particles are joined only when each has {near} neighbours: the path crosses a gap.")
            return legs
        if near == count - 1 or near >= MOST_NEIGHBOURS:
            raise InputError(
                "no path of neighbours joins these particles: they lie in islands far apart. Take the straight line "
                "(--how direct), or other particles; the volumes between islands are invented anyway."
            )
        neighbours *= 2


def _walk_back(before: np.ndarray, start: int, end: int) -> np.ndarray:
    """Points from ``start`` to ``end`` by their predecessors; empty where there is no way."""
    way = [end]
    while way[-1] != start:
        if before[way[-1]] < 0:
            return np.zeros(0, np.int64)
        way.append(int(before[way[-1]]))
    return np.array(way[::-1])


def _along(
    corners: np.ndarray, anchors: np.ndarray, count: int, loop: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``count`` points on a line of corners (c, d), the anchors (numbers of corners, the ends among them) included.

    Each leg between anchors gets points in proportion to its length; of a loop the last corner is the first again and
    is left out.

    Returns:
        points (k, d), their distance from the start (k,), numbers of the anchors among the points.
    """
    legs = len(anchors) - 1
    needed = legs if loop else legs + 1
    if count < needed:
        raise InputError(
            f"-n {count}: the path goes through {needed} particles, so at least {needed} volumes are needed."
        )
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1, ord=2))])
    if not length[-1] > 0:
        raise InputError("these particles have one and the same latent: there is no path between them.")
    parts = _shares(np.diff(length[anchors]), count if loop else count - 1)
    places, numbers = [], [0]
    for leg, steps in enumerate(parts):
        first, last = length[anchors[leg]], length[anchors[leg + 1]]
        places.append(first + (last - first) * np.arange(steps) / steps)
        numbers.append(numbers[-1] + steps)
    if not loop:
        places.append(length[-1:])
    at = np.concatenate(places)
    points = np.stack([np.interp(at, length, corners[:, d]) for d in range(corners.shape[1])], axis=-1)
    return points.astype(np.float32), at, np.array(numbers[:-1] if loop else numbers)


def _shares(lengths: np.ndarray, steps: int) -> list[int]:
    """Whole steps for each leg, one at least, together ``steps``, by length (largest remainders)."""
    spare = steps - len(lengths)
    exact = spare * lengths / max(lengths.sum(), 1e-30)
    whole = np.floor(exact).astype(int)
    for leg in np.argsort(whole - exact, kind="stable")[: spare - whole.sum()]:
        whole[leg] += 1
    return [int(w) + 1 for w in whole]


def read_points(path: Path, zdim: int) -> np.ndarray:
    """Latents (k, zdim) float32 of a text file, one point per line, numbers separated by blanks or commas.

    Raises:
        InputError: no such file, no numbers, or another number of them per line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from error
    points = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        try:
            point = [float(word) for word in words]
        except ValueError as error:
            raise InputError(f"{path}, line {number}: expected {zdim} numbers, found {line.strip()[:60]!r}") from error
        if len(point) != zdim or not np.isfinite(point).all():
            raise InputError(
                f"{path}, line {number}: expected {zdim} numbers, found {len(point)}: {line.strip()[:60]!r}"
            )
        points.append(point)
    if not points:
        raise InputError(f"{path}: holds no latents (one point per line, {zdim} numbers each).")
    return np.array(points, np.float32)
