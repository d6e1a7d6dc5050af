"""How a simulated set is imaged, and what is drawn for each image: state, pose, shift and CTF.

Every stage draws from its own seed, so that one clean set serves all noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cryosuite.errors import InputError
from cryosuite.kernels.ctf import CtfParams
from cryosuite.simulate.images import Optics
from cryosuite.simulate.states import StateSet, counts

ENTROPY = 20240526
STAGES = ("structures", "poses", "shifts", "ctf", "noise", "order", "neighbours", "errors", "ice")


@dataclass(frozen=True)
class SimulateOptions:
    """How a set is imaged. Lengths in Angstrom unless said otherwise."""

    n_particles: int = 4800
    box_size: int = 64
    pixel_size: float = 5.0
    render_box: int | None = None  # None: 2 x box_size
    resolution: float | None = None  # None: the pixel size, i.e. half the Nyquist resolution
    snr: float = 0.1  # nominal: variance of clean images / noise variance, in the box of noise_at
    noise_at: str = "2D"  # "2D": in the render box, before the crop; "D": after it
    noise_scope: str = "global"  # or "per-structure"
    coloured: bool = False
    bfactor: float = 0.0  # A^2
    voltage_kv: float = 300.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.1
    defocus_um: tuple[float, float] = (0.8, 2.5)
    astigmatism: float = 500.0  # largest
    shift: float = 0.078  # largest, fraction of the box
    min_images: int = 0  # fewest images of a state
    sorted_by_state: bool = False  # else shuffled
    neighbours: float = 0.0  # mean number of other particles per image
    ice_gradient: float = 0.0  # sd of a linear ramp across the image, in noise sd
    pose_error_deg: float = 0.0  # rms, written poses only
    shift_error: float = 0.0  # rms per axis, written poses only
    defocus_error: float = 0.0  # rms, written CTF only
    seed: int = 0
    float16: bool = False
    keep_clean: bool = False
    device: str = "cpu"

    @property
    def optics(self) -> Optics:
        """Boxes, pixel and resolution."""
        resolution = self.pixel_size if self.resolution is None else self.resolution
        return Optics(
            self.box_size, self.pixel_size, self.render_box or 2 * self.box_size, resolution, bfactor=self.bfactor
        )

    def check(self) -> None:
        """Raise InputError for values that make no images."""
        box, render = self.box_size, self.optics.render_box
        tests = [
            (box >= 8 and box % 2 == 0, f"-D {box}: the box size must be even and at least 8 pixels"),
            (
                render >= 2 * box and render % 2 == 0,
                f"--render-box {render}: must be even and at least twice the box size ({2 * box})",
            ),
            (self.n_particles >= 1, f"-n {self.n_particles}: at least one image is needed"),
            (0 < self.pixel_size < np.inf, f"--Apix {self.pixel_size}: the pixel size must be positive (Angstrom)"),
            (self.optics.resolution >= 0, f"--resolution {self.resolution}: must be 0 or more (Angstrom)"),
            (0 < self.snr < np.inf, f"--snr {self.snr}: must be positive"),
            (0 < self.voltage_kv < np.inf, f"--voltage {self.voltage_kv}: must be positive (kV)"),
            (
                0 <= self.amplitude_contrast <= 1,
                f"--amplitude-contrast {self.amplitude_contrast}: a fraction between 0 and 1",
            ),
            (0 <= self.shift <= 0.5, f"--shift {self.shift}: a fraction of the box between 0 and 0.5"),
            (
                -np.inf < self.defocus_um[0] <= self.defocus_um[1] < np.inf,
                f"--defocus {self.defocus_um}: give the smaller value first (micrometres)",
            ),
            (0 <= self.astigmatism < np.inf, f"--astigmatism {self.astigmatism}: must be 0 or more (Angstrom)"),
            (0 <= self.neighbours <= 100, f"--neighbours {self.neighbours}: a mean number between 0 and 100"),
            (self.seed >= 0, f"--seed {self.seed}: must be 0 or more"),
        ]
        for good, message in tests:
            if not good:
                raise InputError(message)
        self._check_device()

    def _check_device(self) -> None:
        """Raise InputError for a device that torch does not know or that is not here."""
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise InputError(f"--device {self.device}: expected cpu or cuda")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {self.device}: this machine has {torch.cuda.device_count()} GPUs; use cpu")


def stage_rng(seed: int, stage: str) -> np.random.Generator:
    """The random numbers of one stage of one seed; stages do not influence one another."""
    return np.random.default_rng(np.random.SeedSequence([ENTROPY, seed, STAGES.index(stage)]))


@dataclass
class Particles:
    """What is drawn for each image: state (N,) int64, rotation (N, 3, 3), shift (N, 2), ctf (N, 9), all float32."""

    label: np.ndarray
    rotation: np.ndarray
    shift: np.ndarray
    ctf: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def batch(self, rows: slice | np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
        """State, rotation and shift of some rows as tensors."""
        values = (self.label[rows], self.rotation[rows], self.shift[rows])
        return tuple(torch.from_numpy(np.ascontiguousarray(v)).to(device) for v in values)

    def contrast(self, rows: slice | np.ndarray, device: torch.device) -> CtfParams:
        """CTF parameters of some rows."""
        return CtfParams.from_table(torch.from_numpy(self.ctf[rows])).to(device)


def draw_rotations(count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform rotations (count, 3, 3) float32."""
    from cryosuite.kernels.rotations import quaternion_to_matrix

    quaternion = rng.standard_normal((count, 4))
    quaternion /= np.linalg.norm(quaternion, axis=1, keepdims=True)
    return quaternion_to_matrix(torch.from_numpy(quaternion)).numpy().astype(np.float32)


def draw_ctf(options: SimulateOptions, rng: np.random.Generator) -> np.ndarray:
    """CTF table (N, 9) float32: uniform defocus, astigmatism and angle."""
    n = options.n_particles
    defocus = rng.uniform(*options.defocus_um, n) * 1e4
    astigmatism = rng.uniform(0, options.astigmatism, n)
    table = np.zeros((n, 9), np.float32)
    table[:, 0], table[:, 1] = options.box_size, options.pixel_size
    table[:, 2], table[:, 3] = defocus + astigmatism / 2, defocus - astigmatism / 2
    table[:, 4] = rng.uniform(0, 180, n)
    table[:, 5:8] = options.voltage_kv, options.cs_mm, options.amplitude_contrast
    return table


def draw_particles(states: StateSet, options: SimulateOptions) -> Particles:
    """States in shuffled order, poses, shifts and CTF of all images, each from its own seed."""
    number = counts(states.occupancy, options.n_particles, options.min_images)
    label = np.repeat(np.arange(len(states)), number)
    if not options.sorted_by_state:
        stage_rng(options.seed, "order").shuffle(label)
    shift = stage_rng(options.seed, "shifts").uniform(-options.shift, options.shift, (len(label), 2))
    return Particles(
        label.astype(np.int64),
        draw_rotations(len(label), stage_rng(options.seed, "poses")),
        shift.astype(np.float32),
        draw_ctf(options, stage_rng(options.seed, "ctf")),
    )
