"""One simulated set with its truth: what maps of it score, and what its floor, its ceilings and Bayes' rule score."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from cryosuite.data.open import open_particles
from cryosuite.data.truth import find_truth
from cryosuite.formats.mrc import read_map
from cryosuite.metrics.assigned import score_assigned, states_found
from cryosuite.metrics.clustering import agreement
from cryosuite.reconstruct.backproject import reconstruct, reconstruct_classes
from cryosuite.reconstruct.classify import most_likely
from cryosuite.reconstruct.masks import auto_mask

PLAIN = {"halves": False, "passes": 0}  # the estimator of eval-fsc --oracle: 0.1 of the shell mean, soft sphere
BAYES_IMAGES = 4000
CURVES = ("masked", "unmasked")


class Judge:
    """The particles, labels, true maps and mask of a simulated folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.particles = open_particles(folder)
        self.truth = find_truth(folder)
        if self.truth is None:
            raise SystemExit(f"{folder}: has no truth to judge by")
        self.labels = self.truth.labels_of(self.particles.index)
        self.pixel_size = float(self.particles.pixel_size[0])
        self.read_truth = lru_cache(maxsize=128)(self._read_truth)

    def _read_truth(self, state: int) -> torch.Tensor:
        return torch.from_numpy(read_map(self.truth.volumes[state]).data)

    @cached_property
    def mask(self) -> torch.Tensor:
        """The soft mask around all true maps."""
        return torch.from_numpy(read_map(self.truth.mask).data)

    def score(self, maps: Callable[[int], torch.Tensor], classes: np.ndarray) -> dict:
        """AUC of the maps: per state, per image, of every state; "cryobench": by that benchmark's shells."""
        what = (maps, classes, self.labels, self.read_truth, self.pixel_size, self.mask)
        theirs = score_assigned(*what, compat=True).summary()
        return score_assigned(*what).summary() | {"cryobench": without_states(theirs)}

    def agreement(self, classes: np.ndarray) -> dict:
        """How well classes agree with the true states."""
        from sklearn.metrics import v_measure_score

        ari, ami = agreement(self.labels, classes)
        return {
            "ari": ari,
            "ami": ami,
            "v_measure": float(v_measure_score(self.labels, classes)),
            "classes": len(np.unique(classes)),
            "states": len(np.unique(self.labels)),
            "states_found": states_found(self.labels, classes),
        }

    def floors(self) -> dict:
        """Scores of the consensus, of backprojection with the true labels, and of that within its own mask."""
        return self._once("floors", self._floors)

    def _floors(self) -> dict:
        consensus = reconstruct(self.particles, **PLAIN).map
        classes = reconstruct_classes(self.particles, self.labels, **PLAIN)
        masked = {k: one.map * auto_mask(one.map) for k, one in classes.items()}
        return {
            "consensus": self.score(lambda _: consensus, np.zeros(len(self.labels), np.int64)),
            "labels": self.score(lambda k: classes[k].map, self.labels),
            "labels x mask": self.score(masked.__getitem__, self.labels),
        }

    def bayes(self) -> dict:
        """ARI and accuracy of the classifier that knows the true maps, on the first images."""
        return self._once("bayes", self._bayes)

    def _bayes(self) -> dict:
        count = min(BAYES_IMAGES, len(self.particles))
        maps = torch.stack([self.read_truth(state) for state in range(len(self.truth.volumes))])
        found = most_likely(self.particles.subset(np.arange(count)), maps)
        right = self.labels[:count]
        return {"images": count, "accuracy": float((found == right).mean()), "ari": agreement(right, found)[0]}

    def _once(self, name: str, make: Callable[[], dict]) -> dict:
        """A result kept beside the set, made when it is not there."""
        path = self.folder / "judge.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if name not in known:
            known[name] = make()
            path.write_text(json.dumps(known))
        return known[name]


def not_better(scores: dict, than: dict, curve: str) -> int:
    """The number of states on which maps do not beat others."""
    ours, theirs = (np.asarray(each[f"states_{curve}"]) for each in (scores, than))
    return int((ours <= theirs).sum())


def without_states(scores: dict) -> dict:
    """A summary without the values of each state."""
    return {name: value for name, value in scores.items() if not name.startswith("states_")}
