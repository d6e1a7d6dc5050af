"""Scores of many volumes against a known truth: per image, per conformation, floor, ceiling and gain.

Definitions: BENCHMARKS section 3. Poses are taken as known: nothing is aligned unless `Extra` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from cryosuite.errors import InputError
from cryosuite.kernels import shells
from cryosuite.metrics.align import align_map
from cryosuite.metrics.fsc import FscTable, auc_maximum, raw_auc
from cryosuite.metrics.local import local_fsc
from cryosuite.metrics.shape import chamfer_distance, matched_shapes, volume_overlap

TruthReader = Callable[[int], torch.Tensor]  # state -> its map (D, D, D)
Decoder = Callable[[np.ndarray], np.ndarray]  # z (k, zdim) -> maps (k, D, D, D)
SAMPLERS = ("compat", "random-per-class")
CONFIDENCE = 1.96  # standard errors in a 95 % interval


@dataclass(frozen=True)
class Extra:
    """What is done to a volume besides the global FSC: shapes, FSC in windows, alignment onto the truth first."""

    shapes: bool = False
    local: bool = False
    align: bool = False


EXTRA_NONE = Extra()


@dataclass
class VolumeScores:
    """FSC curves of n volumes against their truths.

    Attributes:
        labels: (n,) state of each volume. rows: (n,) particle it belongs to, or -1.
        curves: "unmasked" and, with a mask, "masked" -> (n, D/2).
        compat: CryoBench's shells and absolute values.
        more: further scores by name -> (n,), of `Extra`.
    """

    box_size: int
    pixel_size: float
    labels: np.ndarray
    rows: np.ndarray
    curves: dict[str, np.ndarray] = field(default_factory=dict)
    mask_fraction: float | None = None
    compat: bool = False
    more: dict[str, np.ndarray] = field(default_factory=dict)

    def auc(self, name: str) -> np.ndarray:
        """Raw AUC of each volume, (n,)."""
        return raw_auc(np.abs(self.curves[name]) if self.compat else self.curves[name], self.box_size)

    def headline(self, name: str | None = None) -> float:
        """Mean raw AUC; masked when there is a mask."""
        return float(self.auc(name or self.best_name).mean())

    @property
    def best_name(self) -> str:
        """The curve that tables quote: masked when there is a mask."""
        return "masked" if "masked" in self.curves else "unmasked"

    def inverted(self) -> int:
        """How many volumes have the wrong sign: signed AUC clearly below the AUC of the absolute FSC."""
        curves = self.curves[self.best_name]
        signed, absolute = raw_auc(curves, self.box_size), raw_auc(np.abs(curves), self.box_size)
        return int((signed < absolute - 0.2 * auc_maximum(self.box_size)).sum())

    def summary(self) -> dict[str, float]:
        """Mean, std, median, 95 % interval, normalised AUC and resolutions (A) per curve, under flat names."""
        out: dict[str, float] = {"volumes": len(self.labels)}
        for name in self.curves:
            auc = self.auc(name)
            out[f"auc_{name}"] = float(auc.mean())
            out[f"auc_{name}_std"] = float(auc.std())
            out[f"auc_{name}_median"] = float(np.median(auc))
            out[f"auc_{name}_ci95"] = self.interval(name)
            out[f"auc_{name}_normalised"] = float(auc.mean() / auc_maximum(self.box_size))
            for threshold in (0.5, 0.143):
                values = [self.table(i).resolution(name, threshold) for i in range(len(self.labels))]
                out[f"resolution_{name}_{threshold}_A"] = float(np.mean(values))
        out |= {name: float(values.mean()) for name, values in self.more.items()}
        if self.mask_fraction is not None:
            out["mask_fraction"] = self.mask_fraction
        return out

    def interval(self, name: str) -> float:
        """Half width of the 95 % interval of the mean AUC when images were drawn at random within each state."""
        auc, variance = self.auc(name), 0.0
        for state in np.unique(self.labels):
            own = auc[self.labels == state]
            if len(own) > 1:
                variance += len(own) * own.var(ddof=1)
        return float(CONFIDENCE * np.sqrt(variance) / max(len(auc), 1))

    def table(self, i: int) -> FscTable:
        """The curves of volume i."""
        curves = {name: curve[i] for name, curve in self.curves.items()}
        return FscTable(self.box_size, self.pixel_size, curves, self.compat, mask_fraction=self.mask_fraction)

    def mean_table(self) -> FscTable:
        """The mean curves over all volumes."""
        curves = {n: (np.abs(c) if self.compat else c).mean(0) for n, c in self.curves.items()}
        return FscTable(self.box_size, self.pixel_size, curves, self.compat, mask_fraction=self.mask_fraction)

    def table_rows(self) -> list[dict[str, float]]:
        """One row per volume: particle (its row), state, raw and normalised AUC and resolutions (A)."""
        out = []
        aucs = {name: self.auc(name) for name in self.curves}
        for i, (row, label) in enumerate(zip(self.rows, self.labels, strict=True)):
            entry: dict[str, float] = {"row_from_0": int(row), "state_from_0": int(label)}
            for name, auc in aucs.items():
                entry[f"auc_{name}"] = float(auc[i])
                entry[f"auc_{name}_normalised"] = float(auc[i] / auc_maximum(self.box_size))
                for threshold in (0.5, 0.143):
                    entry[f"resolution_{name}_{threshold}_A"] = self.table(i).resolution(name, threshold)
            entry |= {name: float(values[i]) for name, values in self.more.items()}
            out.append(entry)
        return out


def score_volumes(
    volumes: Iterable[tuple[int, int, torch.Tensor]],
    truth: TruthReader,
    pixel_size: float,
    mask: torch.Tensor | None = None,
    compat: bool = False,
    extra: Extra = EXTRA_NONE,
) -> VolumeScores:
    """FSC of each volume with the truth of its state, and what ``extra`` asks for.

    Args:
        volumes: (row, state, map (D, D, D)); states should come in runs, each truth is read once per run.
        truth: reads the map of a state.
        mask: (D, D, D) soft mask applied to both.
    """
    shell_fsc = shells.fsc_cryobench if compat else shells.fsc
    found: list[tuple[int, int]] = []
    curves: dict[str, list[np.ndarray]] = {"unmasked": []} if mask is None else {"unmasked": [], "masked": []}
    more: list[dict[str, float]] = []
    state, reference = None, None
    for row, label, volume in volumes:
        if label != state:
            state, reference = label, truth(label)
        if volume.shape != reference.shape:
            boxes = f"{tuple(volume.shape)} with a truth of {tuple(reference.shape)}"
            raise InputError(f"cannot compare a map of {boxes}: the boxes differ")
        if extra.align:
            volume = align_map(volume, reference).volume
        curves["unmasked"].append(shell_fsc(volume, reference).double().numpy())
        if mask is not None:
            curves["masked"].append(shell_fsc(volume * mask, reference * mask).double().numpy())
        more.append(_more(volume, reference, pixel_size, extra))
        found.append((row, label))
    if not found:
        raise InputError("no volumes to compare with the truth")
    rows, labels = np.array(found).T
    stacked = {name: np.nan_to_num(np.stack(values)) for name, values in curves.items()}
    fraction = None if mask is None else float(mask.double().mean())
    columns = {name: np.array([one[name] for one in more]) for name in more[0]}
    return VolumeScores(reference.shape[-1], pixel_size, labels, rows, stacked, fraction, compat, columns)


def _more(volume: torch.Tensor, truth: torch.Tensor, pixel_size: float, extra: Extra) -> dict[str, float]:
    """Chamfer distance (A), vIoU and local FSC of one volume, where asked for."""
    out: dict[str, float] = {}
    if extra.shapes:
        pair = matched_shapes(volume.numpy(), truth.numpy())
        out |= {"chamfer_A": chamfer_distance(*pair, pixel_size), "viou": volume_overlap(*pair)}
    if extra.local:
        out |= local_fsc(volume, truth, pixel_size).summary()
    return out


def sample_rows(labels: np.ndarray, count: int = 100, sampler: str = "random-per-class", seed: int = 0) -> np.ndarray:
    """Particles whose volumes are judged.

    "compat": every (N // count)-th particle of the set sorted by state, which is the benchmark's rule (one image per
    state for 100 x 1000; more than ``count`` when it does not divide N; weighs states by occupancy).
    "random-per-class": the same number of random particles from every state, at least one.

    Returns:
        (n,) int64 rows, in order of their state.
    """
    labels = np.asarray(labels)
    if sampler not in SAMPLERS:
        raise InputError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if count < 1:
        raise InputError(f"the number of images to judge must be at least 1, not {count}")
    order = np.argsort(labels, kind="stable")
    if sampler == "compat":
        return order[np.arange(0, len(labels), max(len(labels) // count, 1))]
    generator = np.random.default_rng(seed)
    states = np.unique(labels)
    each = max(count // len(states), 1)
    chosen = []
    for state in states:
        own = np.nonzero(labels == state)[0]
        chosen.append(np.sort(generator.choice(own, min(each, len(own)), replace=False)))
    return np.concatenate(chosen)


def class_representatives(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each state the particle whose z (N, zdim) lies nearest to the mean z of the state, (K,) rows."""
    rows = []
    for state in np.unique(labels):
        mean = z[labels == state].mean(0)
        rows.append(int(((z - mean) ** 2).sum(1).argmin()))
    return np.array(rows)


def decoded(decode: Decoder, z: np.ndarray, rows: Sequence[int], states: Sequence[int], chunk: int = 8) -> Iterator:
    """Yield (row, state, map) for `score_volumes`, decoding ``chunk`` latents at a time."""
    rows, states = np.asarray(rows), np.asarray(states)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        for row, state, volume in zip(rows[part], states[part], decode(z[rows[part]]), strict=True):
            yield int(row), int(state), torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))


def per_image(
    decode: Decoder,
    z: np.ndarray,
    labels: np.ndarray,
    truth: TruthReader,
    pixel_size: float,
    rows: np.ndarray,
    mask: torch.Tensor | None = None,
    compat: bool = False,
    chunk: int = 8,
    extra: Extra = EXTRA_NONE,
) -> VolumeScores:
    """The headline: decode(z_i) against the truth of image i, for the given rows."""
    rows = rows[np.argsort(labels[rows], kind="stable")]
    return score_volumes(decoded(decode, z, rows, labels[rows], chunk), truth, pixel_size, mask, compat, extra)


def per_conformation(
    decode: Decoder,
    z: np.ndarray,
    labels: np.ndarray,
    truth: TruthReader,
    pixel_size: float,
    mask: torch.Tensor | None = None,
    compat: bool = False,
    chunk: int = 8,
    extra: Extra = EXTRA_NONE,
) -> VolumeScores:
    """One volume per state: mean z of the state -> nearest z -> decode. Uses the labels, hence scores higher."""
    rows = class_representatives(z, labels)
    return score_volumes(decoded(decode, z, rows, np.unique(labels), chunk), truth, pixel_size, mask, compat, extra)


def gain(auc: float, floor: float, ceiling: float) -> float:
    """Share of the way from the consensus (0) to the oracle (1): (AUC - consensus) / (oracle - consensus)."""
    return float((auc - floor) / (ceiling - floor)) if abs(ceiling - floor) > 1e-9 else float("nan")
