"""A pool of clean projections of many molecules, made once and mapped into memory, and noisy particles made of it.

Projecting atoms costs more than training on the picture. So every molecule is projected in a number of views once
(N, P, P float16 in a file); a training step takes views from the pool and gives them, on its device, any in-plane angle
and shift, a CTF and noise that no other step has seen.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cryosuite.console import Progress
from cryosuite.data.processes import ALONE, Processes
from cryosuite.formats.atomic import atomic_path, reserve, write_text
from cryosuite.kernels import chance
from cryosuite.kernels.ctf import CtfParams, ctf
from cryosuite.kernels.fourier import real_inverse
from cryosuite.kernels.rotations import random_rotations
from cryosuite.simulate.images import Optics, Renderer
from cryosuite.simulate.states import State

FORMAT = 1
DOSE_BOX = 128  # pixels at which ``Imaging.snr`` is counted


@dataclass(frozen=True)
class PoolOptions:
    """views: per molecule. box_size: P, pixels. field: edge of a picture, A. resolution: A. seed: of the views."""

    views: int = 200
    box_size: int = 64
    field: float = 320.0
    resolution: float = 10.0
    seed: int = 0


@dataclass(frozen=True)
class Imaging:
    """What is drawn for every particle made of a view; pairs are the ends of a range.

    snr: of the signal's variance over the box to the noise's, were the box DOSE_BOX pixels; log-uniform. A camera with
        larger pixels sees less noise: at D pixels it is (DOSE_BOX / D)^2 times that.
    boxes: sizes D the particle may have had. shift: fraction of the box. magnify: apparent size.
    """

    snr: tuple[float, float] = (0.003, 0.2)
    boxes: tuple[int, ...] = (32, 48, 64, 96, 128)
    shift: float = 0.06
    defocus_um: tuple[float, float] = (0.5, 3.0)
    astigmatism: float = 500.0
    magnify: tuple[float, float] = (0.95, 1.05)
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.1


class ProjectionPool:
    """Clean projections, (K * views, P, P) float16 of unit standard deviation, memory-mapped; molecule = row // views.

    Attributes:
        images: the pool. labels: (K * views,) int64. names: of the K molecules.
    """

    def __init__(
        self,
        path: Path,
        states: list[State] | Callable[[], list[State]],
        options: PoolOptions,
        device: str = "cpu",
        source: str = "",
        processes: Processes = ALONE,
    ) -> None:
        """Open the pool at ``path`` or make it there (the record beside it says what it is of).

        ``states`` may be a function that is called only when the pool must be made; then ``source`` says in words what
        it would give. Of several ``processes`` the first makes it, and all open it.
        """
        self.path, self.options = Path(path), options
        said = {"format": FORMAT, **asdict(options), "source": source}
        if not callable(states):
            said["atoms"] = [zlib.crc32(s.xyz.tobytes(), zlib.crc32(s.weight.tobytes())) for s in states]
        self.names = processes.first_does(lambda: self._recorded(said) or self._made(said, states, device))
        self.labels = np.repeat(np.arange(len(self.names)), options.views)
        shape = (len(self.labels), options.box_size, options.box_size)
        self.images = np.memmap(self.path, np.float16, "r", shape=shape)

    def _made(self, said: dict, states: list[State] | Callable[[], list[State]], device: str) -> list[str]:
        """Write the file and its record; the names of the molecules."""
        states = states() if callable(states) else states
        names, box = [state.name for state in states], self.options.box_size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        shape = (len(names) * self.options.views, box, box)
        self._record.unlink(missing_ok=True)  # it is not of the new file, which may have the size of the old one
        with atomic_path(self.path, needed=2 * int(np.prod(shape))) as temporary:
            reserve(temporary, 2 * int(np.prod(shape)))
            _project(np.memmap(temporary, np.float16, "r+", shape=shape), states, self.options, device)
        write_text(self._record, json.dumps(said | {"names": names}))
        return names

    @property
    def _record(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def _recorded(self, wanted: dict) -> list[str] | None:
        """The molecules of the file that is there, or None where it is not the one wanted."""
        try:
            found = json.loads(self._record.read_text())
            names = [str(name) for name in found.pop("names")]
            whole = self.path.stat().st_size == 2 * len(names) * self.options.views * self.options.box_size**2
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return names if whole and found == json.loads(json.dumps(wanted)) else None

    def __len__(self) -> int:
        return len(self.images)

    def shapes(self) -> Tensor:
        """``ring_shapes`` of all clean views, each number with mean 0 and sd 1 over the pool: (K * views, 96)."""
        parts = [
            ring_shapes(torch.from_numpy(self.images[start : start + 512].astype(np.float32)))
            for start in range(0, len(self), 512)
        ]
        found = torch.cat(parts)
        return (found - found.mean(0)) / found.std(0).clamp(min=1e-3)


def _project(out: np.ndarray, states: list[State], options: PoolOptions, device: str) -> None:
    """Fill a pool; views are uniform over directions, the in-plane angle is drawn later."""
    box = options.box_size
    optics = Optics(box, options.field / box, 2 * box, options.resolution)
    with Progress(len(out), "clean projections") as shown:
        for number, state in enumerate(states):
            renderer = Renderer([state], optics, device)
            generator = torch.Generator().manual_seed(1000003 * options.seed + number)
            rotation = random_rotations(options.views, generator=generator).float()
            for begin in range(0, options.views, 16):
                part = rotation[begin : begin + 16].to(device)
                zero = torch.zeros(len(part), dtype=torch.int64, device=device)
                spectra = renderer.spectra(zero, part, torch.zeros(len(part), 2, device=device), wrap=False)
                images = renderer.to_images(spectra)
                images = images / images.std(dim=(1, 2), keepdim=True).clamp(min=1e-12)
                first = number * options.views + begin
                out[first : first + len(part)] = images.cpu().numpy().astype(np.float16)
                shown.advance(len(part))


RINGS, TURNS, ANGLES = 12, 8, 64  # of ``ring_shapes``


def ring_shapes(images: Tensor) -> Tensor:
    """What of a picture does not change when it is turned: (b, P, P) -> (b, 96).

    Each of 12 rings is a function of the angle; taken are its mean and the absolute values of its first seven angular
    Fourier coefficients, as square roots.
    """
    b, P = images.shape[:2]
    radius = (torch.arange(RINGS, device=images.device) + 0.5) / RINGS * 0.8  # of the half width
    angle = torch.arange(ANGLES, device=images.device) * (2 * torch.pi / ANGLES)
    places = torch.stack([radius[:, None] * torch.cos(angle), radius[:, None] * torch.sin(angle)], -1) + 1 / P
    rings = F.grid_sample(images[:, None], places.expand(b, -1, -1, -1).to(images), align_corners=False)[:, 0]
    waves = torch.fft.rfft(rings, dim=2)[:, :, :TURNS] / ANGLES
    values = torch.cat([waves[:, :, :1].real, waves[:, :, 1:].abs()], 2).flatten(1)
    return values.abs().sqrt() * values.sign()


def turned(images: Tensor, angle: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Images (b, P, P) turned by ``angle`` (radians), magnified and moved by ``shift`` (b, 2) (fraction of the box).

    Bilinear; what comes in from outside is 0.
    """
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    matrix = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    offset = -(matrix @ (2 * shift)[:, :, None])
    grid = F.affine_grid(torch.cat([matrix, offset], 2), [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images[:, None], grid, mode="bilinear", align_corners=False)[:, 0]


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(count,) uniform numbers on the generator's device."""
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def expose(
    views: Tensor, field: float, imaging: Imaging, box_size: int, generator: torch.Generator,
    share: chance.Share | None = None,
) -> Tensor:  # fmt: skip
    """Noisy particles (b, D, D) float32 of clean views (b, P, P), all randomness from ``generator`` on their device.

    Each is turned by any angle, moved, magnified, given a CTF and white noise; white particles, noise of unit sd.
    ``field``: edge of the views, A. ``box_size``: D; beyond P the picture is zero-filled in Fourier space. ``share``:
    which of the particles of several processes these are.
    """
    b, P = views.shape[:2]

    def drawn(low: float, high: float) -> Tensor:
        return chance.rows(lambda n: uniform(n, low, high, generator), b, share)

    angle = drawn(0, 2 * torch.pi)
    moved = chance.rows(lambda n: torch.rand(n, 2, generator=generator, device=views.device), b, share)
    shift = (2 * moved - 1) * imaging.shift
    scale = drawn(*imaging.magnify)
    spectra = torch.fft.rfft2(turned(views.float(), angle, shift, scale))
    size = min(P, box_size)
    spectra = _crop_plain(spectra, P, size)
    ky, kx = torch.fft.fftfreq(size, device=views.device), torch.fft.rfftfreq(size, device=views.device)
    frequency = torch.stack([g.reshape(-1) for g in torch.broadcast_tensors(kx[None], ky[:, None])], 1)
    defocus = 1e4 * drawn(*imaging.defocus_um)
    half = imaging.astigmatism / 2 * drawn(0, 1)
    same = torch.ones_like(half)
    params = CtfParams(
        defocus + half, defocus - half, drawn(0, 180), imaging.voltage_kv * same, imaging.cs_mm * same,
        imaging.amplitude_contrast * same, 0 * same, field / size * same,
    )  # fmt: skip
    spectra = spectra * ctf(frequency, params).view(b, size, size // 2 + 1).float()
    clean = real_inverse(_crop_plain(spectra, size, box_size), (box_size, box_size))
    clean = clean / clean.std(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    low, high = np.log(imaging.snr[0]), np.log(imaging.snr[1])
    snr = torch.exp(drawn(low, high)) * (DOSE_BOX / box_size) ** 2
    shape = clean.shape[1:]
    noise = chance.rows(lambda n: torch.randn(n, *shape, generator=generator, device=views.device), b, share)
    return clean * snr.sqrt()[:, None, None] + noise


def _crop_plain(spectra: Tensor, box: int, size: int) -> Tensor:
    """rfft2 spectra (b, box, box // 2 + 1) cropped or zero-filled to another box; Nyquist lines are left out."""
    if size == box:
        return spectra
    half = min(size, box) // 2
    out = spectra.new_zeros(len(spectra), size, size // 2 + 1)
    out[:, :half, :half] = spectra[:, :half, :half]
    out[:, size - half + 1 :, :half] = spectra[:, box - half + 1 :, :half]
    return out
