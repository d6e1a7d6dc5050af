"""Where the files of an analysis lie: plots, clusters, volumes (re-exported by `workdir`)."""

from __future__ import annotations

import re
from pathlib import Path

from cryosuite.data.folder import File, Folder


class AnalysisDir(Folder):
    """A folder with the plots, clusters and volumes of one epoch, named as cryoDRGN users expect."""

    umap = File("umap.pkl")  # UMAP coordinates (N, 2)
    labels = File("labels.pkl")  # cluster of each particle, counted from 0
    chimerax = File("view.cxc")  # the ChimeraX script that shows the cluster volumes
    chimerax_overlay = File("clusters.cxc")  # the ChimeraX script that shows them at one place, one at a time
    trajectories = File("trajectories")  # folders of paths through latent space
    report = File("report.html")  # the page with all results
    # one row per particle: all that is known of it (``particles_columns.csv`` says what each column is)
    particles = File("particles.csv")
    confounds = File("confounds.csv")  # what the latents and clusters have to do with microscope and view
    summary = File("analyze.yaml")  # what was done, as YAML

    @classmethod
    def of_analyze(cls) -> tuple[str, ...]:
        """Patterns of what ``analyze`` writes; trajectories, landscapes and polished maps are of other commands."""
        folders = ("kmeans[0-9]*", "gmm[0-9]*", "pc[0-9]*", "*-[0-9]*")
        own = [name for name in cls.names() if name != "trajectories"]
        return *own, "clusters/cluster_*", *(f"{folder}/vol_[0-9]*.mrc" for folder in folders)

    @property
    def landscape(self) -> LandscapeDir:
        """The folder of the landscape of volumes."""
        return LandscapeDir(self.path / "landscape")

    def turntable(self, label: int, kind: str = "") -> Path:
        """Frames of a turning volume of a cluster side by side; ``kind``: "polished", ... for other maps of it."""
        return self.path / "turntable" / f"cluster_{label:03d}{'_' if kind else ''}{kind}.webp"

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

    chimerax = File("view.cxc")  # the ChimeraX script that shows the volumes of this folder
    morph = File("morph.cxc")  # the ChimeraX script that blends each volume of this folder into the next
    # what a trajectory is of; written last, so its presence says that the folder is complete
    summary = File("trajectory.yaml")
    labels = File("labels.pkl")  # cluster of each particle, counted from 0
    z_values = File("z_values.txt")  # latent points of the volumes, one row each
    confidence = File("confidence.pkl")  # probability of each particle's label
    centers = File("centers.txt")  # cluster centres
    centers_index = File("centers_ind.txt")  # rows of the particles nearest to the cluster centres

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

    def volumes(self) -> list[Path]:
        """The volumes present, in order of their numbers."""
        found = [(re.fullmatch(r"vol_(\d+)\.mrc", entry.name), entry) for entry in self.path.glob("vol_*.mrc")]
        return [entry for _, entry in sorted((int(match.group(1)), entry) for match, entry in found if match)]

    def plot(self, name: str) -> Path:
        """A picture in this folder."""
        return self.path / f"{name}.png"


class LandscapeDir(Folder):
    """A folder with a landscape of volumes: states, counted from 0, and what they rest on."""

    labels = File("labels.pkl")  # state of every particle, counted from 0; -1 for those left out
    coordinates = File("volume_pca.pkl")  # volume components of every particle, (N, c)
    table = File("states.csv")  # one row per state: particles with their interval, typical particle, level, colour
    maps = File("maps")  # folder of the mean and standard deviation maps
    mean_map = File("mean.mrc")  # mean of all volumes
    mask = File("mask.mrc")  # where volumes are compared
    chimerax = File("view.cxc")  # the ChimeraX script that shows the states side by side
    overlay = File("clusters.cxc")  # the ChimeraX script that shows them at one place, one at a time
    scratch = File(".sketch.raw")  # decoded volumes while they are compared
    # what was done and found; written last, so its presence says that the folder is complete
    summary = File("landscape.yaml")

    @property
    def states(self) -> VolumeDir:
        """The typical volume of each state: vol_000.mrc, ..."""
        return VolumeDir(self.path)

    def mean(self, k: int) -> Path:
        """Mean of the volumes of a state."""
        return self.maps / f"state_{k:03d}_mean.mrc"

    def spread(self, k: int) -> Path:
        """Their standard deviation."""
        return self.maps / f"state_{k:03d}_sd.mrc"

    def walk(self, component: int) -> VolumeDir:
        """Maps along a volume component, counted from 1."""
        return VolumeDir(self.path / f"component{component}")

    def plot(self, name: str) -> Path:
        """A picture, e.g. ``plot("states")`` -> states.png."""
        return self.path / f"{name}.png"
