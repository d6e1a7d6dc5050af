"""Where the maps of a backprojection and the scores of an evaluation lie (beside `workdir`, the names of all else)."""

from __future__ import annotations

from pathlib import Path

from cryosuite.data.folder import File, Folder


class MapsDir(Folder):
    """A folder with one reconstruction, named as cryoDRGN's backproject_voxel names it where it has the file."""

    map = File("backproject.mrc")  # the map from all particles
    half_a = File("half_map_a.mrc")  # the map of the first half set
    half_b = File("half_map_b.mrc")  # the map of the second half set
    mask = File("mask.mrc")  # the soft mask found in the map
    fsc = File("fsc-vals.txt")  # FSC curves of the half maps, one line per shell
    plot = File("fsc.png")  # picture of the FSC curves
    # class of every particle, -1 for those left out; absent where there are no classes
    labels = File("backproject_labels.pkl")
    index = File("backproject_index.pkl")  # original index of each particle, i.e. of each row of the labels

    def of_class(self, label: int) -> MapsDir:
        """The folder of one class, counted from 0 (or as the class column counts)."""
        return MapsDir(self.path / f"class_{label:03d}")


class PolishDir(Folder):
    """A folder with polished maps of K classes, counted from 0, and what they rest on."""

    mask = File("mask.mrc")  # the soft mask around all classes
    fsc = File("fsc.csv")  # FSC of the plain half maps of every class, one row per shell
    plot = File("fsc.png")  # picture of these curves
    classes = File("classes.csv")  # one row per class: particles, resolution, how much was kept
    shares = File("p.pkl")  # shares of every particle in the classes
    labels = File("labels.pkl")  # class of every particle, counted from 0; -1 for those left out
    poses = File("poses.pkl")  # rotations and refined shifts of each row, where shifts were refined
    index = File("index.pkl")  # original index of each particle, i.e. of each row of the shares and labels
    # what was done, as YAML; written last, so its presence says that the folder is complete
    summary = File("polish.yaml")

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

    def maps(self) -> list[Path]:
        """All maps of classes that lie in the folder, whatever their number."""
        parents = [self.path, *(of.parent for of in (self.half(0, 0), self.raw(0), self.gain(0)))]
        found = [path for parent in parents for path in sorted(parent.glob("vol_[0-9]*.mrc"))]
        return [*found, *self.sharpened()]

    @property
    def scores(self) -> ScoresDir:
        """The folder of these maps' scores."""
        return ScoresDir(self.path / "scores")


class ClustersDir(Folder):
    """A folder with the classes a run's particles fall into, counted from 0."""

    labels = File("labels.pkl")  # class of every particle, counted from 0
    centers = File("centers.txt")  # latent of the particle nearest to the centre of each class, one row each
    centers_index = File("centers_ind.txt")  # rows of these particles
    table = File("classes.csv")  # one row per class: particles, certainty of their poses, resolution

    def volume(self, k: int) -> Path:
        """The network's map of a class."""
        return self.path / f"vol_{k:03d}.mrc"

    def plot(self, name: str) -> Path:
        """A picture, e.g. ``plot("poses")`` -> poses.png."""
        return self.path / f"{name}.png"


class PosesDir(Folder):
    """A folder with the poses that ``fastar-infer`` found for a particle set, and the map they give."""

    poses = File("poses.pkl")  # rotations and shifts as cryoDRGN writes them, one row per particle of the set
    star = File("poses.star")  # the particle table with RELION's angles, origins in Angstrom, half sets and confidence
    index = File("index.pkl")  # original index of each row
    # (N, 3) score, score relative to views from the same side, margin over the best other pose
    confidence = File("confidence.npy")
    rejected = File("rejected.ind.pkl")  # original indices of particles that were left out of the map
    kept = File("kept.ind.pkl")  # original indices of the others, as ``--ind`` takes them
    map = File("map.mrc")  # the backprojected map
    mask = File("mask.mrc")  # the soft mask found in the map
    fsc = File("fsc.csv")  # FSC of the half maps, one row per shell, and whether the reference may have made it
    plot = File("fsc.png")  # picture of these curves
    flipped_map = File("map_flipped.mrc")  # the other hand of the map, where the images cannot tell it
    flipped_poses = File("poses_flipped.pkl")  # the poses that belong to it
    timing = File("timing.json")  # seconds of every stage and images per second
    truth = File("truth.json")  # errors against true poses, where they were given
    # what was done and found; written last, so its presence says that the folder is complete
    summary = File("infer.yaml")

    def half(self, number: int) -> Path:
        """A half map, 1 or 2."""
        return self.path / f"half_map_{number}.mrc"


class ScoresDir(Folder):
    """A folder with the scores of two maps or of a run against its truth."""

    curves = File("fsc.csv")  # FSC curves, one row per shell
    text = File("fsc.txt")  # the same as space-separated text, as cryoDRGN writes it
    plot = File("fsc.png")  # picture of the curves
    volumes = File("per_image.csv")  # scores of single volumes, one row each
    conformations = File("per_conformation.csv")  # scores of one volume per true state
    atoms = File("q_atoms.csv")  # Q-scores of a model, one row per atom
    residues = File("q_residues.csv")  # the same, one row per residue
    residue_plot = File("q_residues.png")  # picture of the Q-scores along the chains
    local_resolution = File("local_resolution.mrc")  # map of the local resolution of half maps, A
    summary = File("scores.json")  # all numbers of the table on screen, as JSON


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
