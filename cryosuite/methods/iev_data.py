"""Images for contrastive training, streamed from any number of particle sets and from simulation.

An epoch is a fixed number of images. Each set gives its share by weight and is read in runs of neighbours, block after
block in an order that changes with every pass; memory holds a window of images, never a set. Everything is a pure
function of (seed, epoch, batch), so a continued training sees the images it would have seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.broken import Broken
from cryosuite.data.encoder_images import EncoderCache, read_encoder_images
from cryosuite.data.encoder_pixels import CLIP_PERCENT, STANDARD_RANGE, spline_matrix
from cryosuite.data.loader import read_ahead
from cryosuite.errors import InputError
from cryosuite.kernels import chance
from cryosuite.simulate.pool import RINGS, TURNS, Imaging, ProjectionPool, expose

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet
    from cryosuite.data.processes import Processes

BLOCK = 256  # neighbouring images read together
WINDOW_BYTES = 64 << 20
SIMULATION = 7  # keeps the seeds of simulated images apart from those of the order


@dataclass
class PairBatch:
    """b particles in two views each.

    index (b,) int64: number of the image in the epoch. images (b, 2, s, s) uint8, no circle. drawn (b,) bool: the two
    views were simulated apart (else both are the same image). label (b,) int64: set, or molecule of a simulated image.
    kind: "stacks", "simulated" or "mixed". shapes (b, 2, 96): ``ring_shapes`` of the clean views behind simulated
    images, NaN for all others; None where nothing was simulated.
    """

    index: Tensor
    images: Tensor
    drawn: Tensor
    label: Tensor
    kind: str = "stacks"
    shapes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same batch on another device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=non_blocking)
            for name in ("index", "images", "drawn", "label", "shapes")
            if getattr(self, name) is not None
        }
        return replace(self, **moved)


class Source(Protocol):
    """A set of the corpus: ``name``, ``weight``, ``size`` (images, None: endless) and ``key`` (what tells it apart)."""

    name: str
    weight: float
    size: int | None
    key: int


class StackSource:
    """Particles of files, as eight-bit images of the encoder's size.

    ``cache``: keep them in this file (made now) instead of preparing them anew in every pass.
    """

    def __init__(
        self,
        particles: ParticleSet,
        size_px: int,
        prep: str,
        weight: float | None = None,
        name: str = "",
        cache: object = None,
    ) -> None:
        self.particles, self.size_px, self.prep = particles, size_px, prep
        self.size, self.name = len(particles), name or str(particles.path)
        self.weight = float(self.size if weight is None else weight)
        ends = particles.read(np.array(sorted({0, self.size - 1})))
        self.key = zlib.crc32(np.ascontiguousarray(ends, np.float32).tobytes(), self.size)
        self.cache = EncoderCache(particles, size_px, prep, cache, circle=False) if cache else None
        self.broken = Broken(particles)
        self.stand_in: dict[int, int] = {}  # of broken images the row that is taken instead

    def rows(self, first: int, count: int, seed: int, number: int) -> np.ndarray:
        """Rows number ``first`` .. of this set's endless stream: pass after pass, blocks in random order."""
        position = np.arange(first, first + count)
        out = np.empty(count, np.int64)
        for turn in np.unique(position // self.size):
            chosen = position // self.size == turn
            blocks = np.random.default_rng([seed, number, int(turn)]).permutation(-(-self.size // BLOCK))
            lengths = np.minimum(BLOCK, self.size - blocks * BLOCK)
            starts = np.concatenate([[0], np.cumsum(lengths)])
            within = position[chosen] % self.size
            block = np.searchsorted(starts, within, side="right") - 1
            out[chosen] = blocks[block] * BLOCK + within - starts[block]
        return out

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Images (b, s, s) uint8; in place of a broken one comes the next of the set that is not, whatever is read."""
        unique, back = np.unique(rows, return_inverse=True)
        images, finite = self._prepared(unique)
        if not finite.all():
            if self.cache is None:  # which has told them when it was made
                self.broken.add(unique[~finite])
            for place in np.flatnonzero(~finite):
                images[place] = self._stand_in(int(unique[place]))
        return images[back]

    def _prepared(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (b, s, s) uint8 and (b,) whether their pixels are finite."""
        if self.cache is not None:
            return self.cache.batch(rows).numpy(), ~self.cache.bad[rows]
        return read_encoder_images(self.particles, rows, self.size_px, self.prep, circle=False)

    def _stand_in(self, row: int) -> np.ndarray:
        """The first image behind a broken one that is whole; InputError where none of a block is."""
        if row not in self.stand_in:
            for step in range(1, min(BLOCK, self.size)):
                other = (row + step) % self.size
                if self._prepared(np.array([other]))[1][0]:
                    self.stand_in[row] = other
                    break
            else:
                raise InputError(
                    f"{self.name}: image {row} (0-based) and all of the {min(BLOCK, self.size) - 1} behind it hold NaN "
                    "or infinite pixels; run check on it"
                )
        return self._prepared(np.array([self.stand_in[row]]))[0][0]


class PoolSource:
    """Simulated particles, made on the training's device from a pool of clean projections; endless."""

    size = None

    def __init__(
        self,
        pool: ProjectionPool,
        size_px: int,
        prep: str,
        positives: str,
        imaging: Imaging | None = None,
        weight: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pool, self.size_px, self.prep, self.positives = pool, size_px, prep, positives
        self.imaging, self.weight, self.device = imaging or Imaging(), weight, torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # a reading thread would take the first card
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = f"simulated particles of {len(pool.names)} molecules"
        self.shapes = pool.shapes()
        self.key = zlib.crc32(repr((pool.names, pool.options, self.imaging, positives)).encode())

    def pairs(
        self, count: int, seed: Sequence[int], share: chance.Share | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (count, 2, s, s) uint8, molecules (count,) int64, shapes (count, 2, 96): a function of ``seed``.

        ``share``: make the rows ``share.own`` of ``count = share.total`` only.
        """
        words = np.random.SeedSequence([SIMULATION, *seed]).generate_state(2, np.uint32)
        generator = torch.Generator(device=self.device).manual_seed((int(words[0]) << 31) ^ int(words[1]))
        rng = np.random.default_rng([SIMULATION, 1, *seed])
        box = int(rng.choice(self.imaging.boxes))
        views = self.pool.options.views
        molecule = rng.integers(len(self.pool.names), size=count)
        first = molecule * views + rng.integers(views, size=count)
        second = first
        if self.positives in ("same-structure", "mixed"):
            other = molecule * views + rng.integers(views, size=count)
            keep = rng.random(count) < (0.5 if self.positives == "mixed" else 0.0)
            second = np.where(keep, first, other)
        if share is not None:
            molecule, first, second = (rows[share.own] for rows in (molecule, first, second))
        made = []
        for rows in (first,) if self.positives == "augment" else (first, second):
            clean = torch.from_numpy(np.ascontiguousarray(self.pool.images[rows])).to(self.device)
            noisy = expose(clean, self.pool.options.field, self.imaging, box, generator, share)
            made.append(eight_bits(noisy, self.size_px, self.prep))
        shapes = torch.stack([self.shapes[first], self.shapes[second]], 1)
        return torch.stack([made[0], made[-1]], 1), torch.from_numpy(molecule), shapes


def eight_bits(images: Tensor, size: int, prep: str) -> Tensor:
    """``data.encoder_images`` for tensors on any device: (b, D, D) -> (b, size, size) uint8, without the circle."""
    box = images.shape[-1]
    if box < size:
        matrix = torch.from_numpy(spline_matrix(box, size)).to(images)
        images = matrix @ images @ matrix.T
    elif box > size:
        half = size // 2
        spectra = torch.fft.rfft2(images)
        rows = torch.cat([spectra[:, :half], spectra[:, box - half :]], 1)[:, :, : half + 1].clone()
        rows[:, half] = 0
        rows[:, :, half] = 0
        images = torch.fft.irfft2(rows, s=(size, size))
    flat = images.flatten(1)
    if prep == "standard":
        mean, half = flat.mean(1, keepdim=True), STANDARD_RANGE * flat.std(1, correction=0, keepdim=True)
        low, high = mean - half, mean + half
    else:
        cut = int(flat.shape[1] * CLIP_PERCENT / 100) + 1 if prep == "robust" else 1
        low = flat.topk(cut, largest=False).values[:, -1:]
        high = flat.topk(cut).values[:, -1:]
    scaled = ((flat - low) / (high - low).clamp(min=1e-12) * 255).clamp(0, 255)
    return scaled.to(torch.uint8).view(images.shape)


class Corpus:
    """Several sources as the training loop sees a particle set: ``epoch_images`` images per epoch.

    Raises InputError where there is no source, or a weight is not positive.
    """

    pixel_size = np.ones(1, np.float32)

    def __init__(self, sources: Sequence[Source], epoch_images: int, size_px: int) -> None:
        if not sources:
            raise InputError("nothing to train on: give particle sets, or --simulate")
        for source in sources:
            if not source.weight > 0:
                raise InputError(f"{source.name}: weight {source.weight:g}: expected above 0")
        self.sources, self.epoch_images, self.box_size = list(sources), int(epoch_images), size_px
        weight = np.array([source.weight for source in sources], np.float64)
        self.share = weight / weight.sum()
        self.index = np.array([source.key for source in sources], np.int64)  # for the checkpoint's fingerprint

    def __len__(self) -> int:
        return self.epoch_images

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Two numbers that tell corpora apart, in the shape of images, for the checkpoint's fingerprint."""
        return np.resize(np.concatenate([self.share, self.index % 65521]).astype(np.float32), (len(rows), 2, 2))

    def describe(self, rows: np.ndarray) -> str:
        """A sentence for the message of a training that diverged."""
        return f"It happened in images {int(rows.min())} to {int(rows.max())} of an epoch ({len(self.sources)} sets)."

    def plan(self, epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every image of an epoch its source (E,) uint16 and its number in that source's stream (E,) int64.

        Shares are kept exactly over the epochs: a set's quota of epoch e is round(share E (e + 1)) - round(share E e).
        """
        edges = np.cumsum(self.share)
        edges[-1] = 1.0
        done = np.diff(np.concatenate([[0], np.round(edges * self.epoch_images * epoch)])).astype(np.int64)
        after = np.diff(np.concatenate([[0], np.round(edges * self.epoch_images * (epoch + 1))])).astype(np.int64)
        quota = np.maximum(after - done, 0)
        quota[np.argmax(quota)] += self.epoch_images - quota.sum()
        source = np.repeat(np.arange(len(quota)), quota).astype(np.uint16)
        source = np.random.default_rng([seed, epoch]).permutation(source)
        number = np.empty(len(source), np.int64)
        for s in range(len(quota)):
            mine = source == s
            number[mine] = done[s] + np.arange(int(mine.sum()))
        return source, number


class CorpusLoader:
    """Batches of a corpus as the training loop takes them; process r of w gets its rows r, r + w, ... of each batch."""

    def __init__(
        self,
        corpus: Corpus,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
    ) -> None:
        if batch_size % world_size:
            raise InputError(f"--batch-size {batch_size}: must be a multiple of the number of processes ({world_size})")
        if corpus.epoch_images < batch_size:
            raise InputError(
                f"--batch-size {batch_size}: more than the {corpus.epoch_images} images of an epoch; give a smaller one"
            )
        self.corpus, self.batch_size, self.seed, self.prefetch = corpus, batch_size, seed, prefetch
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        per_image = corpus.box_size**2
        self.window = max(1, WINDOW_BYTES // per_image // batch_size)  # batches read together

    def __len__(self) -> int:
        return self.corpus.epoch_images // self.batch_size

    def global_size(self, batch: int) -> int:
        """Images of a batch over all processes: always full, for the batch is the set of negatives."""
        return self.batch_size

    def weight(self, batch: int) -> int:
        """Images of a batch that count for this process."""
        return self.batch_size // self.world_size

    def share_broken(self, processes: Processes) -> None:
        """Let the first process tell the broken images that all have met; all call it."""
        for source in self.corpus.sources:
            if isinstance(source, StackSource):
                source.broken.share(processes)

    def epoch(self, n: int, start: int = 0) -> Iterator[PairBatch]:
        """The batches of epoch ``n`` from batch ``start`` on."""
        batches = self._batches(n, start)
        if self.prefetch > 0:
            batches = read_ahead(batches, self.prefetch)
        for batch in batches:
            yield batch.to(self.device, non_blocking=self.device.type == "cuda")

    def _batches(self, epoch: int, start: int) -> Iterator[PairBatch]:
        source, number = self.corpus.plan(epoch, self.seed)
        for first in range(start - start % self.window, len(self), self.window):
            last = min(first + self.window, len(self))
            rows = slice(first * self.batch_size, last * self.batch_size)
            stacks = self._window(source[rows], number[rows], epoch, first, max(start, first))
            for batch in range(max(start, first), last):
                inside = slice((batch - first) * self.batch_size, (batch - first + 1) * self.batch_size)
                mine = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)[self.rank :: self.world_size]
                whole = source[rows][inside]
                yield self._one(mine, whole, stacks[inside][self.rank :: self.world_size], epoch, batch)

    def _window(
        self, source: np.ndarray, number: np.ndarray, epoch: int, first: int, start: int
    ) -> np.ndarray | list[None]:
        """Images (n, s, s) uint8 of a window's rows; those of endless sources are left empty."""
        from_files = [s for s, kind in enumerate(self.corpus.sources) if kind.size is not None]
        if not np.isin(source, from_files).any():
            return np.empty((len(source), 0), np.uint8)
        out = np.zeros((len(source), self.corpus.box_size, self.corpus.box_size), np.uint8)
        for s in from_files:
            places = np.flatnonzero(source == s)
            if not len(places):
                continue
            kind = self.corpus.sources[s]
            rows = kind.rows(int(number[places[0]]), len(places), self.seed, s)
            # neighbours come together from the stream: spread them over the window's batches
            rows = np.random.default_rng([self.seed, epoch, first, s]).permutation(rows)
            needed = (places >= (start - first) * self.batch_size) & (places % self.world_size == self.rank)
            if needed.any():
                out[places[needed]] = kind.read(rows[needed])
        return out

    def _one(self, index: np.ndarray, whole: np.ndarray, stacks: np.ndarray, epoch: int, batch: int) -> PairBatch:
        """Put this process's rows ``index`` of a batch together; ``whole``: the sources of all of its rows."""
        size, count, source = self.corpus.box_size, len(index), whole[self.rank :: self.world_size]
        endless = [s for s, kind in enumerate(self.corpus.sources) if kind.size is None]
        drawn, every = np.isin(source, endless), np.isin(whole, endless)
        label = torch.from_numpy(source.astype(np.int64))
        if not every.any():
            images = torch.from_numpy(np.ascontiguousarray(stacks))[:, None].expand(-1, 2, -1, -1)
            return PairBatch(torch.from_numpy(index), images, torch.from_numpy(drawn), label, "stacks")
        if every.all() and len(endless) == 1:
            pairs, label, shapes = self._simulate(endless[0], whole, epoch, batch)
        else:
            shapes = torch.full((count, 2, RINGS * TURNS), torch.nan)
            pairs = torch.zeros(count, 2, size, size, dtype=torch.uint8, device=self.device)
            if not drawn.all():
                files = torch.from_numpy(np.flatnonzero(~drawn)).to(self.device)
                pairs[files] = torch.from_numpy(stacks[~drawn]).to(self.device)[:, None]
            for s in endless:
                places = torch.from_numpy(np.flatnonzero(source == s))
                if len(places):
                    made, molecule, shapes[places] = self._simulate(s, whole, epoch, batch)
                    pairs[places.to(self.device)] = made.to(self.device)
                    label[places] = molecule
        one_image = [self.corpus.sources[s].positives == "augment" for s in endless]
        once = [s for s, one in zip(endless, one_image, strict=True) if one]
        apart, there = drawn & ~np.isin(source, once), every & ~np.isin(whole, once)
        kind = "simulated" if there.all() else "mixed" if there.any() else "stacks"  # the same in all processes
        return PairBatch(torch.from_numpy(index), pairs, torch.from_numpy(apart), label, kind, shapes)

    def _simulate(self, source: int, whole: np.ndarray, epoch: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's images of a source in the batch whose rows have the sources ``whole``."""
        places = np.flatnonzero(whole == source)
        share = None
        if self.world_size > 1:
            share = chance.Share(np.flatnonzero(places % self.world_size == self.rank).tolist(), len(places))
        return self.corpus.sources[source].pairs(len(places), [self.seed, source, epoch, batch, 0], share)
