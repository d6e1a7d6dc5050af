"""An endless stream of map pairs for training and a fixed set of held-out ones: crops of simulated volumes.

The target is scaled by one rule for all volumes, which padding cannot change: 0 is vacuum, 1 the .99 quantile of the
target inside the molecule's mask. The input is scaled as ``lvm-sharpen`` scales a deposited map: "robust" is the median
of the solvent and the .99 quantile inside the mask, here with the mask that the simulation knows, since a cube inside
a large complex has too little solvent to find one; the other rules are those of ``kernels.map_norm``. Scenes (task
wedge) are the exception: their target has the grey values of the input, so that a network's answer can be joined with
the measured coefficients; "paper" suits them best, since "robust" clips the streaks below the solvent.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cryosuite.data.map_sets import map_entries, read_pairs
from cryosuite.errors import InputError
from cryosuite.kernels.map_norm import grey_range, quantile, to_unit
from cryosuite.kernels.map_spectrum import match_spectrum
from cryosuite.kernels.wedge import wedge_mask
from cryosuite.simulate.map_options import VOXELS, MapBatch, PairOptions
from cryosuite.simulate.map_scenes import scene
from cryosuite.simulate.map_structures import PHANTOM, Molecule, hold_out_names, load_molecules
from cryosuite.simulate.map_users import UserMaps
from cryosuite.simulate.map_volume import Draws, Volume, simulate

__all__ = ["VOXELS", "MapBatch", "MapPairs", "PairOptions"]

STRIDE = 2  # every second voxel is enough for a quantile
FAINT = 0.02  # below this a voxel of input and target is empty
MARGIN = 4  # voxels between a crop and the faces of the cube, where it wraps around
TRIES = 8  # places tried for every crop wanted
TOP = 0.99  # quantile inside the mask that becomes 1


class MapPairs:
    """Simulated pairs of maps and the user's own; see ``open``.

    Attributes:
        names: of all molecules, then of all the user's maps, held-out ones included; ``MapBatch.index`` counts in it.
        training, testing: rows of ``names`` that ``draw`` and ``held`` take.
    """

    def __init__(
        self, molecules: list[Molecule], options: PairOptions, hold_out: str = "0", users: UserMaps | None = None
    ) -> None:
        self.options = options
        self.molecules = molecules
        self.users = users
        own = [entry.name for entry in users.entries] if users else []
        self.names = [molecule.name for molecule in molecules] + own
        held = hold_out_names(self.names, hold_out, self.names[: len(molecules)] or own)
        self.training = [i for i, name in enumerate(self.names) if name not in held]
        self.testing = [i for i, name in enumerate(self.names) if name in held]
        if not self.training:
            raise InputError("--hold-out leaves no structure to train on")
        first = len(molecules)
        procedural = [i for i in self.training if i < first and self.names[i].startswith(PHANTOM)]
        real = [i for i in self.training if i < first and not self.names[i].startswith(PHANTOM)]
        self._kinds = {"users": [i for i in self.training if i >= first], "phantoms": procedural, "real": real}

    @classmethod
    def open(
        cls,
        structures: str,
        options: PairOptions,
        *,
        pairs: Path | None = None,
        maps: list[Path] | tuple[Path, ...] = (),
        hold_out: str = "0",
        cache: Path | None = None,
    ) -> MapPairs:
        """Read what the pairs are made of.

        Args:
            structures: ``phantom[:N]``, a folder, files and names divided by commas, ``both:`` such a list
                and phantoms.
            pairs: the user's own pairs of map and model. maps: the user's maps (task pretrain).
            hold_out: how many structures, or which names, are kept for ``held``.
            cache: .npz in which the atoms are kept for the next start.

        Raises:
            InputError: nothing found, unreadable files, unknown names.
        """
        entries = (read_pairs(Path(pairs)) if pairs is not None else []) + map_entries(maps)
        if entries and options.task == "wedge":
            raise InputError("--task wedge is trained on simulated scenes: leave --pairs out")
        if maps and options.task != "pretrain":
            raise InputError("maps without models have no target to train on: give --pairs with maps and models")
        molecules = load_molecules(structures, cache) if structures or not entries else []
        return cls(molecules, options, hold_out, UserMaps(entries, options) if entries else None)

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, generator: torch.Generator, device: torch.device | str = "cpu") -> MapBatch:
        """``crops_per_volume`` crops of one volume, never seen before; the generator's state decides them all."""
        draws, options = Draws(generator, 4), self.options
        kinds = ["real", "phantoms", "users"]
        for kind, chance in (("phantoms", options.phantoms), ("users", options.users)):
            kinds = [kind, *kinds] if draws.chance(chance) else kinds
        rows = next(self._kinds[kind] for kind in kinds if self._kinds[kind])
        return self._crops(rows[draws.below(len(rows))], generator, device)

    def held(self, seed: int, count: int) -> list[MapBatch]:
        """``count`` batches of held-out structures in turn, on the CPU, fixed by the seed; [] if none are held out.

        How many clean maps and how much noise the training sees changes nothing here, so trainings can be compared.
        """
        if not self.testing:
            return []
        generator, options = torch.Generator().manual_seed(seed), self.options
        self.options = replace(options, clean=PairOptions.clean, nothing=PairOptions.nothing)
        try:
            return [self._crops(self.testing[i % len(self.testing)], generator, "cpu") for i in range(count)]
        finally:
            self.options = options

    def volume(self, index: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Volume:
        """A whole cube of molecule or map ``index``, both maps on the networks' scale 0..1."""
        if index >= len(self.molecules):
            found = self.users.volume(index - len(self.molecules), generator, device)
        elif self.options.task == "wedge":
            found = scene(self._together(index, generator), self.options, generator, device)
        else:
            found = self._as_seen(simulate(self.molecules[index], self.options, generator, device), generator)
        lo, hi = self._span(found, Draws(generator, 8))
        target = to_unit(found.target, lo, hi) if self.options.task == "wedge" else _target(found)
        return replace(found, input=to_unit(found.input, lo, hi), target=target)

    def _as_seen(self, found: Volume, generator: torch.Generator) -> Volume:
        """The map with the amplitudes that a network sees, its resolution not quite known."""
        options = self.options
        if options.spectrum == "as-is":
            return found
        resolution = found.drawn["resolution"] * Draws(generator, 1).uniform(options.misjudged)
        mask = found.mask if bool(found.mask.any()) else torch.ones_like(found.mask)
        return replace(found, input=match_spectrum(found.input, options.voxel_size, mask, resolution)[0])

    def _together(self, index: int, generator: torch.Generator) -> list[Molecule]:
        """The molecule and others of its own group (held out or not) in random order, for one scene."""
        group = self.testing if index in self.testing else self.training
        order = torch.randperm(len(group), generator=generator, device=generator.device).tolist()
        return [self.molecules[index], *(self.molecules[group[i]] for i in order if group[i] != index)]

    def _crops(self, index: int, generator: torch.Generator, device: torch.device | str) -> MapBatch:
        found = self.volume(index, generator, device)
        options = self.options
        starts = crop_starts(found.mask, options.crop, options.crops_per_volume, options, generator)
        inputs, targets = (cut(volume, starts, options.crop) for volume in (found.input, found.target))
        b = len(starts)
        return MapBatch(
            input=inputs,
            target=inputs if options.task == "pretrain" else targets,
            mask=((targets > FAINT) | (inputs > FAINT)).float(),
            resolution=torch.full((b,), found.resolution, device=inputs.device),
            index=torch.full((b,), index, dtype=torch.int64, device=inputs.device),
            wedge=self._wedge(found.drawn, b, inputs.device) if options.task == "wedge" else None,
        )

    def _wedge(self, drawn: dict[str, float], b: int, device: torch.device) -> Tensor:
        tilts, edge = (drawn["tilt_low"], drawn["tilt_high"]), self.options.crop
        mask = wedge_mask((edge,) * 3, tilts, "y", self.options.voxel_size, drawn["soft"], device=device)
        return mask.expand(b, *mask.shape)

    def _span(self, found: Volume, draws: Draws) -> tuple[float, float]:
        """Grey values of the input that become 0 and 1, a little wrong as they are for a map of which less is known."""
        options = self.options
        if not found.drawn:  # of the user: on the scale already
            lo, hi = 0.0, 1.0
        elif options.norm == "robust" and not found.drawn.get("nothing"):
            lo, hi = robust_range(found.input, found.mask)
        elif float(found.input.min()) < float(found.input.max()):
            lo, hi = grey_range(found.input, options.voxel_size, options.norm)
        else:  # a cube without anything
            lo, hi = 0.0, 1.0
        errors = [draws.uniform(options.affine) for _ in range(2)]
        if found.drawn.get("clean"):
            errors = [0.0, 0.0]
        span = hi - lo
        return lo + errors[0] * span, hi + errors[1] * span


def robust_range(volume: Tensor, mask: Tensor) -> tuple[float, float]:
    """lo, hi: median outside a known mask (0 where there is hardly any outside), .99 quantile inside it."""
    part = (slice(None, None, STRIDE),) * 3
    values, inside = volume[part], mask[part]
    outer, inner = values[~inside], values[inside]
    lo = quantile(outer, 0.5) if len(outer) > 100 else 0.0
    hi = quantile(inner, TOP) if len(inner) > 100 else float(volume.max())
    return (lo, hi) if hi > lo else (lo, lo + max(float(volume.std()), 1e-6))


def _target(found: Volume) -> Tensor:
    """The target on the scale 0..1: vacuum is 0, the .99 quantile inside the mask 1."""
    return to_unit(found.target, 0.0, max(robust_range(found.target, found.mask)[1], 1e-6))


def crop_starts(
    mask: Tensor, edge: int, count: int, options: PairOptions, generator: torch.Generator
) -> list[tuple[int, int, int]]:
    """Corners of crops: at least ``options.inside`` of each is molecule, but for ``solvent_crops`` of them."""
    size = mask.shape[0]
    margin = min(MARGIN, (size - edge) // 2)
    places = torch.rand(count * TRIES, 3, generator=generator, device=generator.device).cpu()
    starts = (margin + places * (size - 2 * margin - edge + 1)).long().clamp(max=size - margin - edge)
    summed = torch.nn.functional.pad(mask.float().cpu(), (1, 0, 1, 0, 1, 0)).cumsum(0).cumsum(1).cumsum(2)
    share = torch.zeros(len(starts))
    for corner in range(8):
        at = starts + edge * torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
        share += (-1) ** (3 - bin(corner).count("1")) * summed[at[:, 0], at[:, 1], at[:, 2]]
    good = share / edge**3 >= options.inside
    anywhere = round(options.solvent_crops * count)
    order = torch.cat([torch.arange(anywhere), anywhere + (~good[anywhere:]).int().argsort(stable=True)])
    return [tuple(row) for row in starts[order[:count]].tolist()]


def cut(volume: Tensor, starts: list[tuple[int, int, int]], edge: int) -> Tensor:  # (b, 1, e, e, e)
    """Cubes of a volume by their corners."""
    return torch.stack([volume[z : z + edge, y : y + edge, x : x + edge] for z, y, x in starts])[:, None]
