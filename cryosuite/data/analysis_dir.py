"""Where the files of an analysis lie: plots, clusters, volumes (re-exported by `workdir`)."""

from __future__ import annotations

import re
from pathlib import Path

from cryosuite.data.folder import Folder


class AnalysisDir(Folder):
    """A folder with the plots, clusters and volumes of one epoch, named as cryoDRGN users expect."""

    @property
    def umap(self) -> Path:
        """UMAP coordinates (N, 2)."""
        return self.path / "umap.pkl"

    @property
    def labels(self) -> Path:
        """Cluster of each particle, counted from 0."""
        return self.path / "labels.pkl"

    @property
    def chimerax(self) -> Path:
        """The ChimeraX script that shows the cluster volumes."""
        return self.path / "view.cxc"

    @property
    def chimerax_overlay(self) -> Path:
        """The ChimeraX script that shows them at one place, one at a time."""
        return self.path / "clusters.cxc"

    @property
    def trajectories(self) -> Path:
        """Folders of paths through latent space."""
        return self.path / "trajectories"

    @property
    def landscape(self) -> LandscapeDir:
        """The folder of the landscape of volumes."""
        return LandscapeDir(self.path / "landscape")

    @property
    def report(self) -> Path:
        """The page with all results."""
        return self.path / "report.html"

    @property
    def particles(self) -> Path:
        """One row per particle: all that is known of it (``particles_columns.csv`` says what each column is)."""
        return self.path / "particles.csv"

    @property
    def confounds(self) -> Path:
        """What the latents and clusters have to do with microscope and view."""
        return self.path / "confounds.csv"

    def turntable(self, label: int, kind: str = "") -> Path:
        """Frames of a turning volume of a cluster side by side; ``kind``: "polished", ... for other maps of it."""
        return self.path / "turntable" / f"cluster_{label:03d}{'_' if kind else ''}{kind}.webp"

    @property
    def summary(self) -> Path:
        """What was done, as YAML."""
        return self.path / "analyze.yaml"

    def plot(self, name: str) -> Path:
        """A picture, e.g. ``plot("z_pca")`` -> z_pca.png."""
        return self.path / f"{name}.png"

    def learning_curve(self, epoch: int) -> Path:
        """The learning curve up to an epoch."""
        return self.path / f"learning_curve_epoch{epoch}.png"

    def kmeans(self, k: int) -> VolumeDir:
        """The folder of k-means with k clusters."""
        return VolumeDir(self.path / f"kmeans{k}")

    def clusters(self, how: str, k: int) -> VolumeDir:
        """The folder of k clusters found in another way."""
        return VolumeDir(self.path / f"{how}-{k}")

    def gmm(self, k: int) -> VolumeDir:
        """The folder of a Gaussian mixture with k clusters."""
        return VolumeDir(self.path / f"gmm{k}")

    def pc(self, component: int) -> VolumeDir:
        """The folder of a walk along a principal component, counted from 1 as cryoDRGN does."""
        return VolumeDir(self.path / f"pc{component}")

    def cluster_star(self, label: int) -> Path:
        """The particles of one cluster as a star file."""
        return self.path / "clusters" / f"cluster_{label:03d}.star"

    def cluster_indices(self, label: int) -> Path:
        """The original indices of the particles of one cluster."""
        return self.path / "clusters" / f"cluster_{label:03d}.ind.pkl"


class VolumeDir(Folder):
    """A folder of volumes decoded at latent points: vol_000.mrc, ... beside their z values."""

    def volume(self, number: int) -> Path:
        """Volume of a number; numbers equal labels and count from 0."""
        return self.path / f"vol_{number:03d}.mrc"

    def sharp(self, number: int) -> Path:
        """What lvm-sharpen made of that volume: a network's prediction, beside it."""
        return self.path / f"sharp_{number:03d}.mrc"

    def sharpened(self) -> list[Path]:
        """All of these that are present."""
        return sorted(self.path.glob("sharp_[0-9]*.mrc"))

    def preview(self, number: int) -> Path:
        """Picture of that volume."""
        return self.path / f"vol_{number:03d}.png"

    def slices(self, number: int) -> Path:
        """Picture of the central planes of that volume."""
        return self.path / f"vol_{number:03d}_slices.png"

    @property
    def chimerax(self) -> Path:
        """The ChimeraX script that shows the volumes of this folder."""
        return self.path / "view.cxc"

    @property
    def morph(self) -> Path:
        """The ChimeraX script that blends each volume of this folder into the next."""
        return self.path / "morph.cxc"

    def volumes(self) -> list[Path]:
        """The volumes present, in order of their numbers."""
        found = [(re.fullmatch(r"vol_(\d+)\.mrc", entry.name), entry) for entry in self.path.glob("vol_*.mrc")]
        return [entry for _, entry in sorted((int(match.group(1)), entry) for match, entry in found if match)]

    @property
    def summary(self) -> Path:
        """What a trajectory is of; written last, so its presence says that the folder is complete."""
        return self.path / "trajectory.yaml"

    @property
    def labels(self) -> Path:
        """Cluster of each particle, counted from 0."""
        return self.path / "labels.pkl"

    @property
    def z_values(self) -> Path:
        """Latent points of the volumes, one row each."""
        return self.path / "z_values.txt"

    @property
    def confidence(self) -> Path:
        """Probability of each particle's label."""
        return self.path / "confidence.pkl"

    @property
    def centers(self) -> Path:
        """Cluster centres."""
        return self.path / "centers.txt"

    @property
    def centers_index(self) -> Path:
        """Rows of the particles nearest to the cluster centres."""
        return self.path / "centers_ind.txt"

    def plot(self, name: str) -> Path:
        """A picture in this folder."""
        return self.path / f"{name}.png"


class LandscapeDir(Folder):
    """A folder with a landscape of volumes: states, counted from 0, and what they rest on."""

    @property
    def labels(self) -> Path:
        """State of every particle, counted from 0; -1 for those left out."""
        return self.path / "labels.pkl"

    @property
    def coordinates(self) -> Path:
        """Volume components of every particle, (N, c)."""
        return self.path / "volume_pca.pkl"

    @property
    def table(self) -> Path:
        """One row per state: particles with their interval, typical particle, level, colour."""
        return self.path / "states.csv"

    @property
    def states(self) -> VolumeDir:
        """The typical volume of each state: vol_000.mrc, ..."""
        return VolumeDir(self.path)

    @property
    def maps(self) -> Path:
        """Folder of the mean and standard deviation maps."""
        return self.path / "maps"

    def mean(self, k: int) -> Path:
        """Mean of the volumes of a state."""
        return self.maps / f"state_{k:03d}_mean.mrc"

    def spread(self, k: int) -> Path:
        """Their standard deviation."""
        return self.maps / f"state_{k:03d}_sd.mrc"

    @property
    def mean_map(self) -> Path:
        """Mean of all volumes."""
        return self.path / "mean.mrc"

    @property
    def mask(self) -> Path:
        """Where volumes are compared."""
        return self.path / "mask.mrc"

    def walk(self, component: int) -> VolumeDir:
        """Maps along a volume component, counted from 1."""
        return VolumeDir(self.path / f"component{component}")

    @property
    def chimerax(self) -> Path:
        """The ChimeraX script that shows the states side by side."""
        return self.path / "view.cxc"

    @property
    def overlay(self) -> Path:
        """The ChimeraX script that shows them at one place, one at a time."""
        return self.path / "clusters.cxc"

    @property
    def scratch(self) -> Path:
        """Decoded volumes while they are compared."""
        return self.path / ".sketch.raw"

    def plot(self, name: str) -> Path:
        """A picture, e.g. ``plot("states")`` -> states.png."""
        return self.path / f"{name}.png"

    @property
    def summary(self) -> Path:
        """What was done and found; written last, so its presence says that the folder is complete."""
        return self.path / "landscape.yaml"
