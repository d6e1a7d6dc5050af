"""Floor and ceiling of a benchmark: the consensus map and the maps of the true classes, against the truth.

The maps themselves come from `reconstruct` (a sister room): here they are judged, weighted and remembered.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosuite.metrics.truth import TruthReader, VolumeScores, score_volumes


@dataclass
class OracleScores:
    """Scores of the consensus (floor) and of ground-truth-label backprojection (ceiling).

    AUC per state, (K,), raw; "masked" where there is a mask.
    """

    states: np.ndarray
    consensus: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]

    def floor(self, name: str, states: np.ndarray | None = None) -> float:
        """Mean AUC of the consensus over the given states (with repetition), or over all states."""
        return self._mean(self.consensus[name], states)

    def ceiling(self, name: str, states: np.ndarray | None = None) -> float:
        """Mean AUC of the true-class maps over the given states (with repetition), or over all states."""
        return self._mean(self.labels[name], states)

    def _mean(self, auc: np.ndarray, states: np.ndarray | None) -> float:
        if states is None:
            return float(auc.mean())
        return float(auc[np.searchsorted(self.states, states)].mean())

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {
            "states": self.states.tolist(),
            "consensus": {name: values.tolist() for name, values in self.consensus.items()},
            "labels": {name: values.tolist() for name, values in self.labels.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OracleScores:
        """The inverse of `as_dict`."""
        return cls(
            np.asarray(values["states"]),
            {name: np.asarray(row, float) for name, row in values["consensus"].items()},
            {name: np.asarray(row, float) for name, row in values["labels"].items()},
        )


def oracle_scores(
    consensus: torch.Tensor,
    class_maps: dict[int, torch.Tensor],
    truth: TruthReader,
    pixel_size: float,
    mask: torch.Tensor | None = None,
    compat: bool = False,
) -> OracleScores:
    """Judge the consensus map against every state, and each true-class map against its own state.

    Args:
        consensus: (D, D, D) backprojection of all particles.
        class_maps: state -> (D, D, D) backprojection of its particles.
    """
    states = sorted(class_maps)
    floor = score_volumes(((-1, s, consensus) for s in states), truth, pixel_size, mask, compat)
    ceiling = score_volumes(((-1, s, class_maps[s]) for s in states), truth, pixel_size, mask, compat)
    return OracleScores(np.array(states), _aucs(floor), _aucs(ceiling))


def _aucs(scores: VolumeScores) -> dict[str, np.ndarray]:
    return {name: scores.auc(name) for name in scores.curves}


def cache_key(settings: dict[str, Any]) -> str:
    """A short name for one set of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_cached(path: Path, settings: dict[str, Any]) -> OracleScores | None:
    """Scores stored under these settings in the JSON file ``path``; None when absent or unreadable."""
    try:
        return OracleScores.from_dict(json.loads(path.read_bytes())[cache_key(settings)]["scores"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def add_to_cache(text: bytes | None, settings: dict[str, Any], scores: OracleScores) -> str:
    """The cache's JSON text with these scores added (``text``: what it held; None or what is no cache for nothing)."""
    try:
        entries = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        entries = {}
    entries = entries if isinstance(entries, dict) else {}
    entries[cache_key(settings)] = {"settings": settings, "scores": scores.as_dict()}
    return json.dumps(entries, indent=1, sort_keys=True, default=str) + "\n"
