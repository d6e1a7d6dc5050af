"""Where the maps of a backprojection and the scores of an evaluation lie (beside `workdir`, the names of all else)."""

from __future__ import annotations

from pathlib import Path

from cryosuite.data.folder import Folder


class MapsDir(Folder):
    """A folder with one reconstruction, named as cryoDRGN's backproject_voxel names it where it has the file."""

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

    @property
    def labels(self) -> Path:
        """Class of every particle, -1 for those left out; absent where there are no classes."""
        return self.path / "backproject_labels.pkl"

    @property
    def index(self) -> Path:
        """Original index of each particle, i.e. of each row of the labels."""
        return self.path / "backproject_index.pkl"

    def of_class(self, label: int) -> MapsDir:
        """The folder of one class, counted from 0 (or as the class column counts)."""
        return MapsDir(self.path / f"class_{label:03d}")


class PolishDir(Folder):
    """A folder with polished maps of K classes, counted from 0, and what they rest on."""

    def map(self, k: int) -> Path:
        """The polished map of a class; named as ``analyze`` names its volumes."""
        return self.path / f"vol_{k:03d}.mrc"

    def half(self, k: int, h: int) -> Path:
        """A polished half map; both share their gains, so they say nothing about resolution."""
        return self.path / "polished_halves" / f"vol_{k:03d}_half_{'ab'[h]}.mrc"

    def raw(self, k: int) -> Path:
        """The plain backprojection of a class."""
        return self.path / "raw" / f"vol_{k:03d}.mrc"

    def raw_half(self, k: int, h: int) -> Path:
        """A plain half map: what FSC and resolution are read from."""
        return self.path / "raw" / f"vol_{k:03d}_half_{'ab'[h]}.mrc"

    def gain(self, k: int) -> Path:
        """How much of the plain map was kept, place by place (0 to 1)."""
        return self.path / "local" / f"vol_{k:03d}_gain.mrc"

    def local_resolution(self, k: int) -> Path:
        """Local resolution of the plain half maps in Angstrom."""
        return self.path / "local" / f"vol_{k:03d}_resolution.mrc"

    def sharp(self, k: int) -> Path:
        """What lvm-sharpen made of the polished map: a network's prediction, beside the map."""
        return self.path / f"sharp_{k:03d}.mrc"

    def sharpened(self) -> list[Path]:
        """All of these that are present."""
        return sorted(self.path.glob("sharp_[0-9]*.mrc"))

    @property
    def mask(self) -> Path:
        """The soft mask around all classes."""
        return self.path / "mask.mrc"

    @property
    def fsc(self) -> Path:
        """FSC of the plain half maps of every class, one row per shell."""
        return self.path / "fsc.csv"

    @property
    def plot(self) -> Path:
        """Picture of these curves."""
        return self.path / "fsc.png"

    @property
    def classes(self) -> Path:
        """One row per class: particles, resolution, how much was kept."""
        return self.path / "classes.csv"

    def maps(self) -> list[Path]:
        """All maps of classes that lie in the folder, whatever their number."""
        parents = [self.path, *(of.parent for of in (self.half(0, 0), self.raw(0), self.gain(0)))]
        found = [path for parent in parents for path in sorted(parent.glob("vol_[0-9]*.mrc"))]
        return [*found, *self.sharpened()]

    @property
    def shares(self) -> Path:
        """Shares of every particle in the classes."""
        return self.path / "p.pkl"

    @property
    def labels(self) -> Path:
        """Class of every particle, counted from 0; -1 for those left out."""
        return self.path / "labels.pkl"

    @property
    def poses(self) -> Path:
        """Rotations and refined shifts of each row, where shifts were refined."""
        return self.path / "poses.pkl"

    @property
    def index(self) -> Path:
        """Original index of each particle, i.e. of each row of the shares and labels."""
        return self.path / "index.pkl"

    @property
    def scores(self) -> ScoresDir:
        """The folder of these maps' scores."""
        return ScoresDir(self.path / "scores")

    @property
    def summary(self) -> Path:
        """What was done, as YAML; written last, so its presence says that the folder is complete."""
        return self.path / "polish.yaml"


class ClustersDir(Folder):
    """A folder with the classes a run's particles fall into, counted from 0."""

    @property
    def labels(self) -> Path:
        """Class of every particle, counted from 0."""
        return self.path / "labels.pkl"

    @property
    def centers(self) -> Path:
        """Latent of the particle nearest to the centre of each class, one row each."""
        return self.path / "centers.txt"

    @property
    def centers_index(self) -> Path:
        """Rows of these particles."""
        return self.path / "centers_ind.txt"

    @property
    def table(self) -> Path:
        """One row per class: particles, certainty of their poses, resolution."""
        return self.path / "classes.csv"

    def volume(self, k: int) -> Path:
        """The network's map of a class."""
        return self.path / f"vol_{k:03d}.mrc"

    def plot(self, name: str) -> Path:
        """A picture, e.g. ``plot("poses")`` -> poses.png."""
        return self.path / f"{name}.png"


class PosesDir(Folder):
    """A folder with the poses that ``fastar-infer`` found for a particle set, and the map they give."""

    @property
    def poses(self) -> Path:
        """Rotations and shifts as cryoDRGN writes them, one row per particle of the set."""
        return self.path / "poses.pkl"

    @property
    def star(self) -> Path:
        """The particle table with RELION's angles, origins in Angstrom, half sets and confidence."""
        return self.path / "poses.star"

    @property
    def index(self) -> Path:
        """Original index of each row."""
        return self.path / "index.pkl"

    @property
    def confidence(self) -> Path:
        """(N, 3) score, score relative to views from the same side, margin over the best other pose."""
        return self.path / "confidence.npy"

    @property
    def rejected(self) -> Path:
        """Original indices of particles that were left out of the map."""
        return self.path / "rejected.ind.pkl"

    @property
    def kept(self) -> Path:
        """Original indices of the others, as ``--ind`` takes them."""
        return self.path / "kept.ind.pkl"

    @property
    def map(self) -> Path:
        """The backprojected map."""
        return self.path / "map.mrc"

    def half(self, number: int) -> Path:
        """A half map, 1 or 2."""
        return self.path / f"half_map_{number}.mrc"

    @property
    def mask(self) -> Path:
        """The soft mask found in the map."""
        return self.path / "mask.mrc"

    @property
    def fsc(self) -> Path:
        """FSC of the half maps, one row per shell, and whether the reference may have made it."""
        return self.path / "fsc.csv"

    @property
    def plot(self) -> Path:
        """Picture of these curves."""
        return self.path / "fsc.png"

    @property
    def flipped_map(self) -> Path:
        """The other hand of the map, where the images cannot tell it."""
        return self.path / "map_flipped.mrc"

    @property
    def flipped_poses(self) -> Path:
        """The poses that belong to it."""
        return self.path / "poses_flipped.pkl"

    @property
    def timing(self) -> Path:
        """Seconds of every stage and images per second."""
        return self.path / "timing.json"

    @property
    def truth(self) -> Path:
        """Errors against true poses, where they were given."""
        return self.path / "truth.json"

    @property
    def summary(self) -> Path:
        """What was done and found; written last, so its presence says that the folder is complete."""
        return self.path / "infer.yaml"


class ScoresDir(Folder):
    """A folder with the scores of two maps or of a run against its truth."""

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
    def atoms(self) -> Path:
        """Q-scores of a model, one row per atom."""
        return self.path / "q_atoms.csv"

    @property
    def residues(self) -> Path:
        """The same, one row per residue."""
        return self.path / "q_residues.csv"

    @property
    def residue_plot(self) -> Path:
        """Picture of the Q-scores along the chains."""
        return self.path / "q_residues.png"

    @property
    def local_resolution(self) -> Path:
        """Map of the local resolution of half maps, A."""
        return self.path / "local_resolution.mrc"

    @property
    def summary(self) -> Path:
        """All numbers of the table on screen, as JSON."""
        return self.path / "scores.json"


def run_scores(run: Path, epoch: int) -> ScoresDir:
    """The folder of a run's scores after an epoch."""
    return ScoresDir(Path(run) / f"eval.{epoch}")


def run_polish(run: Path, epoch: int) -> PolishDir:
    """The folder of a run's polished maps after an epoch."""
    return PolishDir(Path(run) / f"polish.{epoch}")


def oracle_cache(folder: Path) -> Path:
    """Floor and ceiling of a simulated set, kept so that they are computed once per setting."""
    return Path(folder) / "oracle.json"


def run_clusters(run: Path, epoch: int) -> ClustersDir:
    """The folder of the classes of a run of deco-classify after an epoch."""
    return ClustersDir(Path(run) / f"clusters.{epoch}")
