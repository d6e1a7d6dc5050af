"""Fresh starts of every class of a mixture from its own particles, once the classes are nearly pure.

The maps of a mixture's starts tell the molecules apart long before they show them right: half of a class may lie upside
down in its map, and searching against that map keeps it so. The starts of a single molecule look further out and seldom
end wrong, and a class that is nearly pure is one. So each class begins anew; the fresh map is taken where it explains
the particles of the class better than the one they have, after both had a chance to become theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.processes import ALONE, Processes
from cryosuite.reconstruct.abinitio_starts import ONE, AbInitioOptions, Starts, options_for
from cryosuite.reconstruct.solve import cropped

STARTS = 3  # of each class
BETTER = 0.01  # of the log-likelihood: less is no reason to search for poses again
FEWEST = 100  # particles of a class that can begin anew


class Restarts:
    """One class after the other, in units of one iteration; ``state`` is all that changes.

    Args:
        white, signal, box, device, log, processes: as for ``Starts``. labels: (N,) class of each particle.
        volumes: (K, d, d, d) the maps the classes have.
    """

    def __init__(
        self,
        white: Callable[[np.ndarray, int], tuple[Tensor, Tensor]],
        labels: np.ndarray,
        volumes: Tensor,
        signal: Tensor,
        box: int,
        options: AbInitioOptions,
        device: torch.device,
        log: Callable[[str, dict[str, Any]], None],
        state: dict[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.white, self.labels, self.volumes = white, labels, volumes
        self.rest = (signal, box)
        self.options, self.device, self.log, self.processes = options, device, log, processes
        self.state = state or {"class": 0, "starts": None, "volumes": [], "renewed": []}
        self._starts: tuple[int, Starts] | None = None

    @property
    def done(self) -> bool:
        """Whether every class has its map."""
        return self.state["class"] >= self.options.classes

    @property
    def position(self) -> int:
        """Units done, of ``units_of``."""
        inner = self._current().position if self.state["starts"] is not None and not self.done else 0
        return self.state["class"] * class_units() + inner

    def advance(self) -> None:
        """The next iteration, or the end of a class."""
        starts = self._current()
        if len(self._rows()) >= FEWEST and not starts.done:
            starts.advance()
            self.state["starts"] = dict(starts.state)
        if len(self._rows()) < FEWEST or starts.done:
            self._end_class(starts)

    def _rows(self) -> np.ndarray:
        return np.flatnonzero(self.labels == self.state["class"])

    def _current(self) -> Starts:
        """The starts of the present class."""
        k = self.state["class"]
        if self._starts is None or self._starts[0] != k:
            rows, signal_box = self._rows(), self.rest
            seed = self.options.seed + 1000 * (k + 1)
            options = options_for(1, starts=STARTS, seed=seed, shift_extent=self.options.shift_extent)
            starts = Starts(
                lambda chosen, r_max: self.white(rows[chosen], r_max), len(rows), *signal_box, options, self.device,
                lambda text, record: None, self.processes,
            )  # fmt: skip
            if self.state["starts"] is not None:
                starts.state = dict(self.state["starts"])
            self._starts = k, starts
        return self._starts[1]

    def _end_class(self, starts: Starts) -> None:
        """Keep the better of the fresh map and the present one, in a box that all classes share."""
        s, k = self.state, self.state["class"]
        size = min(starts.small, self.volumes.shape[-1])
        kept = cropped(self.volumes[k], size)
        if len(self._rows()) >= FEWEST:
            fresh = starts.state["volumes"][0]
            found = [self._evidence(starts, volume) for volume in (kept, fresh)]
            old, new = self.processes.first_does(lambda: found)
            if new > old + BETTER * abs(old):
                kept = cropped(fresh, size)
                s["renewed"].append(k)
            self.log(
                f"class {k} anew: log-likelihood per image {old:.2f}, {new:.2f} from the start",
                {"stage": "anew", "class": k, "before": old, "after": new},
            )
        s["volumes"].append(kept)
        s["class"], s["starts"], self._starts = k + 1, None, None

    def _evidence(self, starts: Starts, volume: Tensor) -> float:
        """Mean log-likelihood of the class's particles under a map, over all orientations."""
        return float(starts.likelihood(volume, fitted=True).mean())


def class_units() -> int:
    """Units of one class."""
    return STARTS * ONE["iterations"] + ONE["settle"]
