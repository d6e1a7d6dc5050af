"""Where the maps of a backprojection and the scores of an evaluation lie (beside `workdir`, the names of all else)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MapsDir:
    """A folder with one reconstruction, named as cryoDRGN's backproject_voxel names it where it has the file."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def map(self) -> Path:
        """The map from all particles."""
        return self.path / "backproject.mrc"

    @property
    def half_a(self) -> Path:
        """The map of the first half set."""
        return self.path / "half_map_a.mrc"

    @property
    def half_b(self) -> Path:
        """The map of the second half set."""
        return self.path / "half_map_b.mrc"

    @property
    def mask(self) -> Path:
        """The soft mask found in the map."""
        return self.path / "mask.mrc"

    @property
    def fsc(self) -> Path:
        """FSC curves of the half maps, one line per shell."""
        return self.path / "fsc-vals.txt"

    @property
    def plot(self) -> Path:
        """Picture of the FSC curves."""
        return self.path / "fsc.png"

    def of_class(self, label: int) -> MapsDir:
        """The folder of one class, counted from 0 (or as the class column counts)."""
        return MapsDir(self.path / f"class_{label:03d}")


@dataclass(frozen=True)
class ScoresDir:
    """A folder with the scores of two maps or of a run against its truth."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def curves(self) -> Path:
        """FSC curves, one row per shell."""
        return self.path / "fsc.csv"

    @property
    def text(self) -> Path:
        """The same as space-separated text, as cryoDRGN writes it."""
        return self.path / "fsc.txt"

    @property
    def plot(self) -> Path:
        """Picture of the curves."""
        return self.path / "fsc.png"

    @property
    def volumes(self) -> Path:
        """Scores of single volumes, one row each."""
        return self.path / "per_image.csv"

    @property
    def conformations(self) -> Path:
        """Scores of one volume per true state."""
        return self.path / "per_conformation.csv"

    @property
    def summary(self) -> Path:
        """All numbers of the table on screen, as JSON."""
        return self.path / "scores.json"


def run_scores(run: Path, epoch: int) -> ScoresDir:
    """The folder of a run's scores after an epoch."""
    return ScoresDir(Path(run) / f"eval.{epoch}")


def oracle_cache(folder: Path) -> Path:
    """Floor and ceiling of a simulated set, kept so that they are computed once per setting."""
    return Path(folder) / "oracle.json"
