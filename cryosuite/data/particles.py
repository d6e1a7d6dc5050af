"""The particle set: poses, CTF and bookkeeping per row in memory, images on demand."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cryosuite.data.images import ArrayImages, Images
from cryosuite.data.rows import random_halves

if TYPE_CHECKING:
    from cryosuite.kernels.ctf import CtfParams

NOT_PER_ROW = ("noise", "tables")


@dataclass
class ParticleSet:
    """N particles: what is known of each row, and where its image lies (about 120 bytes per row, no pixels).

    Attributes:
        images: the source of the images.
        box_size: D, even; of a set with several boxes the largest (then ``box_sizes`` is given).
        pixel_size: (N,) float32, Angstrom.
        file_pixel_size: (N,) float32, the same in the Angstrom of the file the rows come from first, where the user
            said another size than that file does; else None.
        rotation: (N, 3, 3) float32, volume frame -> image frame (CONVENTIONS), or None.
        shift: (N, 2) float32 (tx, ty), fraction of the box, to be ADDED to centre the particle, or None.
        ctf: (N, 9) float32: D, pixel size (A), defocus U and V (A), astigmatism angle (deg), voltage (kV), Cs (mm),
            amplitude contrast, phase shift (deg), or None.
        extras: per-row aberrations named as the fields of ``CtfParams``: bfactor, scale, beam_tilt, ...
        optics_group: (N,) int32, counted from 0.
        index: (N,) int64, position in the ORIGINAL set (row of the first star/cs, image of the first stack).
        uid: (N,) uint64 of cryoSPARC, or None.
        row_key: (N,) uint32, ``row_keys`` of the original set when ``preprocess`` read it, or None.
        half: (N,) int8 0/1, the half set of the refinement the poses come from, or of whole helices, or None.
        sign: +1 or -1, the factor that makes particles white; ``read`` applies it.
        sign_from: who says so: "blob/sign", "option", "dataset.yaml", "data", "assumed".
        ctf_premultiplied: True when the images were already multiplied by their CTF.
        noise: (G, D//2 + 1) float32, E|n|^2 of a coefficient of the unnormalised centred transform at integer
            shell r, per optics group, or None.
        normalised: True when mean 0 and sd 1 outside the particle have been set.
        box_sizes: (N,) int32 where stacks of several boxes are mixed, else None.
        path: what the user gave, with passthrough, datadir, poses_from, ctf_from. n_source: rows before ``ind``.
        given: pixel_size, voltage_kv, ... where the user said them, as ``open_particles`` takes them.
        tables: the whole star tables or cs array, when they were to be kept.
        source: the metadata file whose row ``rows[i]`` is particle i.
    """

    images: Images
    box_size: int
    pixel_size: np.ndarray
    rotation: np.ndarray | None = None
    shift: np.ndarray | None = None
    ctf: np.ndarray | None = None
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    optics_group: np.ndarray | None = None
    index: np.ndarray | None = None
    uid: np.ndarray | None = None
    row_key: np.ndarray | None = None
    half: np.ndarray | None = None
    sign: int = 1
    sign_from: str = "assumed"
    ctf_premultiplied: bool = False
    noise: np.ndarray | None = None
    normalised: bool = False
    box_sizes: np.ndarray | None = None
    file_pixel_size: np.ndarray | None = None
    path: Path | None = None
    source: Path | None = None
    rows: np.ndarray | None = None
    passthrough: tuple[Path, ...] = ()
    datadir: Path | None = None
    poses_from: Path | None = None
    ctf_from: Path | None = None
    n_source: int = 0
    given: dict[str, float] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict, repr=False)
    tables: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        n = len(self.images)
        self.pixel_size = np.broadcast_to(np.asarray(self.pixel_size, np.float32), (n,))
        if self.optics_group is None:
            self.optics_group = np.zeros(n, np.int32)
        if self.index is None:
            self.index = np.arange(n, dtype=np.int64)
        if self.rows is None:
            self.rows = np.arange(n, dtype=np.int64)
        self.n_source = self.n_source or n
        for entry in fields(self):
            value = getattr(self, entry.name)
            per_row = isinstance(value, np.ndarray) and entry.name not in NOT_PER_ROW
            if per_row and len(value) != n:
                raise ValueError(f"{entry.name} has {len(value)} rows for {n} images")

    @classmethod
    def from_array(cls, array: np.ndarray, pixel_size: float, **values: Any) -> ParticleSet:
        """A set of images held in memory, array (N, D, D)."""
        return cls(images=ArrayImages(array), box_size=array.shape[-1], pixel_size=pixel_size, **values)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"ParticleSet({len(self)} particles, box {self.box_size}, {self.path})"

    @property
    def n_groups(self) -> int:
        """Number of optics groups."""
        groups = int(self.optics_group.max()) + 1 if len(self) else 1
        return groups if self.noise is None else max(groups, len(self.noise))

    @property
    def width_in_file(self) -> np.ndarray:
        """Width (N,) of the images in the Angstrom of the file the rows come from: times ``shift``, its shifts."""
        box = self.box_size if self.box_sizes is None else self.box_sizes
        return box * (self.pixel_size if self.file_pixel_size is None else self.file_pixel_size).astype(np.float64)

    def read(self, rows: np.ndarray | slice) -> np.ndarray:
        """Images (b, D, D) float32 of the rows, particles white (sign applied)."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        images = self.images.read(np.asarray(rows))
        if self.sign < 0:
            np.negative(images, out=images)
        return images

    def read_into(self, images: np.ndarray, rows: np.ndarray, places: np.ndarray) -> None:
        """``read`` with the image of ``rows[i]`` at ``images[places[i]]``, images (n, D, D) float32."""
        if hasattr(self.images, "read_into"):
            self.images.read_into(images, rows, places)
        else:
            images[places] = self.images.read(rows)
        if self.sign < 0:
            images[places] *= -1

    def subset(self, rows: np.ndarray) -> ParticleSet:
        """The particles of some rows (positions or a mask), in that order; original indices are kept."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        values: dict[str, Any] = {"images": self.images.subset(rows)}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, np.ndarray) and entry.name not in NOT_PER_ROW:
                values[entry.name] = value[rows]
        values["extras"] = {name: value[rows] for name, value in self.extras.items()}
        return replace(self, **values)

    def ctf_params(self, rows: np.ndarray | None = None) -> CtfParams | None:
        """CTF of the rows (all when None) as tensors, aberrations included; None when the set has no CTF."""
        if self.ctf is None:
            return None
        import torch

        from cryosuite.kernels.ctf import CtfParams

        rows = slice(None) if rows is None else rows
        params = CtfParams.from_table(torch.from_numpy(np.ascontiguousarray(self.ctf[rows])))
        if not self.extras:
            return params
        return replace(params, **{name: torch.from_numpy(value[rows]) for name, value in self.extras.items()})

    def half_sets(self) -> np.ndarray:
        """Half set 0/1 of each row, (N,) int8: the refinement's, else a fixed pseudo-random split of DISTINCT images.

        The split follows the original index (``random_halves``), so it is the same in every run and never follows the
        order of the rows. Rows that show the same image (symmetry expansion) always share a half, or the half maps' FSC
        would lie. (cryoDRGN takes even and odd images instead.)
        """
        if self.half is not None:
            return self.half
        _, number = np.unique(self.images.identity(), return_inverse=True)
        first = np.full(number.max(initial=-1) + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, number, self.index)
        return random_halves(first[number])
