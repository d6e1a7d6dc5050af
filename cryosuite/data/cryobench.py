"""The folders in which CryoBench's particle sets are published: images, poses, CTF, true states and maps.

    Tomotwin-100/images/snr0.01/sorted_particles.128.txt    names of stacks, sorted by state
    Tomotwin-100/combined_poses.pkl, combined_ctfs.pkl      as cryoDRGN writes them, in that order
    Tomotwin-100/gt_latents.pkl                             the true state of each image, counted from 0
    Tomotwin-100/vols/128_org/000_1abc.mrc ...              its map, in the order of the numbers in the names
    Tomotwin-100/init_mask/mask.mrc                         one loose mask for all states

Jeon et al. 2024, arXiv 2408.05526; Zenodo records 11629428 and 12528292.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError

LEVELS_UP = 3  # from images/snr0.01/sorted_particles.128.txt to the folder of the set
NOT_SAID = 1.0  # A: what the benchmark's programs write into maps whatever the voxel size is


@dataclass(frozen=True)
class PublishedSet:
    """One published set; ``volumes`` in the order of the states, ``mask`` None where there is none."""

    path: Path
    volumes: list[Path]
    mask: Path | None

    @property
    def labels(self) -> Path:
        """True state of each image."""
        return self.path / "gt_latents.pkl"

    @property
    def poses(self) -> Path:
        """Rotations and shifts of all images."""
        return self.path / "combined_poses.pkl"

    @property
    def ctf(self) -> Path:
        """CTF table of all images; its box and pixel size are those before the crop (256, 1.5 A)."""
        return self.path / "combined_ctfs.pkl"

    def stacks(self, below: Path) -> Path:
        """The list of stacks in or below a folder of this set.

        Raises:
            InputError: there is none, or several (one for each signal-to-noise ratio).
        """
        found = [below] if below.is_file() else sorted(below.rglob("sorted_particles*.txt"))
        if len(found) == 1:
            return found[0]
        if not found:
            raise InputError(
                f"{below}: no sorted_particles.128.txt in it or below; was the archive unpacked completely?"
            )
        names = ", ".join(str(path.parent) for path in found)
        raise InputError(f"{below}: holds {len(found)} lists of images; give the folder of one of them: {names}")


def find_published(path: Path | str) -> PublishedSet | None:
    """The published set that a folder or file belongs to; None when it is none.

    Raises:
        InputError: it is one, but its maps are missing.
    """
    folder = Path(path).absolute()
    for place in [folder, *folder.parents][: LEVELS_UP + 1]:
        if (place / "gt_latents.pkl").is_file() and (place / "vols").is_dir():
            break
    else:
        return None
    folders = sorted(entry for entry in (place / "vols").iterdir() if entry.is_dir() and any(entry.glob("*.mrc")))
    chosen = [entry for entry in folders if entry.name == "128_org"] or folders
    if len(chosen) != 1:
        names = ", ".join(entry.name for entry in folders) or "none"
        raise InputError(f"{place / 'vols'}: the true maps are expected in 128_org; folders with maps: {names}")
    mask = place / "init_mask" / "mask.mrc"
    volumes = sorted(chosen[0].glob("*.mrc"), key=_by_numbers)
    return PublishedSet(place, volumes, mask if mask.is_file() else None)


def open_published(path: Path | str) -> ParticleSet | None:
    """The particles of a published set (its folder, or that of one signal-to-noise ratio); None when it is none."""
    found = find_published(path)
    if found is None:
        return None
    return open_particles(found.stacks(Path(path)), poses=found.poses, ctf=found.ctf)


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """Sorts names as a person would: 2.mrc before 10.mrc."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
