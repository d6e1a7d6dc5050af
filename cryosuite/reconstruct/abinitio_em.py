"""A first map from nothing: annealed expectation maximisation over a whole grid of orientations, shifts and classes.

Every image is compared with K maps at all orientations of a grid (15 degrees) and all shifts of a grid, at low
frequencies only. The posterior

    p(k, q, t | y) ~ exp( [ 2 Re <T_t y, C S_kq> - |C S_kq|^2 ] / (sigma^2 T) )

weighs each image into all of them, and the maps are the Wiener solution of the weighted sums (expectation maximisation,
Scheres 2012, in mini-batches with a running sum). At a high temperature T all orientations are equally likely and the
map is round; as T falls to 1 the strongest asymmetry appears first and the rest follows, which is why random starts
hardly ever end in a bad map (deterministic annealing, Rose 1998). K maps start alike and part in the same way.

Both steps are matrix products: a grid has for every in-plane angle also the opposite one, whose slice is the complex
conjugate, so real and imaginary parts are multiplied apart and both angles come from the same two products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cryosuite.data.processes import ALONE, Processes
from cryosuite.kernels import fourier
from cryosuite.kernels.rotations import healpix_rotations
from cryosuite.kernels.slices import Accumulator, extract_slices, insert_slices, new_accumulator, volume_transform
from cryosuite.reconstruct.solve import Sums, solve

PER_IMAGE = ("evidence", "share", "label", "best", "shift")  # of what is expected
MIDDLES = 25  # steps of the shifts that an image is first held against the mean at
LOGITS = 1 << 21  # values of the posterior held at once: what stays in a processor cache is a third faster


@dataclass
class Grid:
    """Orientations and shifts that are tried.

    rotation: (Q, 3, 3), of each pair of opposite in-plane angles one. opposite: (Q, 3, 3), the other one.
    shift: (S, 2) fraction of the box. log_prior: (S,) of the shifts.
    """

    rotation: Tensor
    opposite: Tensor
    shift: Tensor
    log_prior: Tensor

    def __len__(self) -> int:
        return len(self.rotation)


def make_grid(order: int, extent: float, steps: int, device: torch.device | str = "cpu", corners: bool = True) -> Grid:
    """The grid of HEALPix ``order`` with ``steps`` x ``steps`` shifts up to ``extent`` (fraction of the box).

    The shifts' prior is a Gaussian whose standard deviation is 0.7 of the extent. Without ``corners`` those of the
    square, further out than 1.2 of the extent, are left out.
    """
    whole = healpix_rotations(order).to(device)
    turns = 6 * 2**order
    pairs = whole.view(-1, 2, turns // 2, 3, 3)  # psi and psi + 180 degrees
    axis = torch.linspace(-extent, extent, steps, device=device) if steps > 1 else torch.zeros(1, device=device)
    shift = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    if not corners:
        shift = shift[shift.norm(dim=1) <= 1.2 * extent]
    prior = -shift.square().sum(1) / (2 * max(0.7 * extent, 1e-6) ** 2)
    rotation, opposite = (pairs[:, side].reshape(-1, 3, 3) for side in (0, 1))
    return Grid(rotation, opposite, shift, prior)


@dataclass
class Expected:
    """What a batch of images says: sums of the M-step and the best candidate of each image.

    data: (K, Q, P) complex. weight: (K, Q, P). evidence: (b,) log of the summed likelihood. share: (b, K) posterior of
    the classes. label, best, shift: (b,) class, orientation (index into rotation then opposite) and shift of the
    largest posterior.
    """

    data: Tensor
    weight: Tensor
    evidence: Tensor
    share: Tensor
    label: Tensor
    best: Tensor
    shift: Tensor


@torch.no_grad()
def expect(
    slices: Tensor,  # (K, Q, P) complex
    values: Tensor,  # (b, P) complex, divided by the noise
    transfer: Tensor,  # (b, P) CTF, divided by the noise
    grid: Grid,
    disc: fourier.HalfDisc,
    temperature: float,
    log_usage: Tensor,  # (K,)
) -> Expected:
    """E-step of some images and their share of the M-step's sums."""
    K, Q, P = slices.shape
    S = len(grid.shift)
    data = torch.zeros(2, K, Q, P, device=values.device)
    weight = torch.zeros(K, Q, P, device=values.device)
    real, imag, power = slices.real.contiguous(), slices.imag.contiguous(), slices.abs().square()
    found: list[tuple[Tensor, ...]] = []
    size, scale = max(1, LOGITS // (2 * K * Q * S)), 2 / temperature
    for begin in range(0, len(values), size):
        y, c = values[begin : begin + size], transfer[begin : begin + size]
        b = len(y)
        moved = fourier.phase_shift((y * c).repeat_interleave(S, 0), disc, grid.shift.repeat(b, 1).to(y.real.dtype))
        yr, yi, c2 = moved.real.contiguous(), moved.imag.contiguous(), c.square()  # (b S, P), (b, P)
        logits = torch.empty(b, S, K, 2, Q, device=values.device)
        for k in range(K):
            even = ((yr * scale) @ real[k].T).view(b, S, Q)
            odd = ((yi * scale) @ imag[k].T).view(b, S, Q)
            offset = log_usage[k] - (c2 @ power[k].T)[:, None] / temperature + grid.log_prior[:, None]
            even += offset
            torch.add(even, odd, out=logits[:, :, k, 0])
            torch.sub(even, odd, out=logits[:, :, k, 1])
        # one pass over what just was written, while it is in the cache
        p = logits.view(b, -1).softmax(1)
        highest, at = p.max(1)
        top = logits.view(b, -1).gather(1, at[:, None])[:, 0]
        share = p.view(b, S, K, -1).sum((1, 3))
        p = p.view(b, S, K, 2, Q)
        for k in range(K):
            same, apart = p[:, :, k, 0] + p[:, :, k, 1], p[:, :, k, 0] - p[:, :, k, 1]
            data[0, k].addmm_(same.reshape(b * S, Q).T, yr)
            data[1, k].addmm_(apart.reshape(b * S, Q).T, yi)
            weight[k].addmm_(same.sum(1).T, c2)
        q, side = at % Q, at // Q % 2
        found.append((top - highest.log(), share, at // (2 * Q) % K, q + side * Q, at // (2 * Q * K)))
    if not found:
        none = torch.zeros(0, dtype=torch.int64, device=values.device)
        found.append((weight.new_zeros(0), weight.new_zeros(0, K), none, none, none))
    evidence, share, label, best, shift = (torch.cat(part) for part in zip(*found, strict=True))
    return Expected(torch.complex(data[0], data[1]), weight, evidence, share, label, best, shift)


def together(parts: list[Expected], processes: Processes = ALONE) -> Expected:
    """What some parts of the images, and those of the other processes, say together; on the processor, in all of them.

    Sums are added up in double precision, so that they are the same however many processes have the parts.
    """
    sums = [torch.view_as_real(parts[0].data).double().cpu().contiguous(), parts[0].weight.double().cpu()]
    for part in parts[1:]:
        sums[0] += torch.view_as_real(part.data).cpu()
        sums[1] += part.weight.cpu()
    for values in sums:
        processes.add_up(values)
        processes.hand_out(values)
    data, weight = (values.float() for values in sums)
    rest = (torch.cat([getattr(part, name) for part in parts]).cpu().numpy() for name in PER_IMAGE)
    return Expected(torch.view_as_complex(data), weight, *(torch.from_numpy(processes.joined(one)) for one in rest))


def middles(
    values: Tensor,  # (n, P) complex, divided by the noise
    transfer: Tensor,  # (n, P) CTF, divided by the noise
    signal: Tensor,  # power of slices per shell
    disc: fourier.HalfDisc,
    extent: float,
) -> Tensor:  # (n, 2)
    """Shifts (fraction of the box) that bring images onto the mean of all of them, whatever their orientations.

    The mean of images turned by all angles is round. What an image has beside it is noise here, of the power that is
    left of the signal. Each image gets the mean of its posterior over a grid of shifts, four times; where it cannot
    tell, that is near zero. extent: largest shift; the prior is that of `make_grid`.
    """
    axis = torch.linspace(-extent, extent, MIDDLES, device=values.device)
    tried = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    prior = -tried.square().sum(1) / (2 * (0.7 * extent) ** 2)
    ramp = fourier.phase_shift(values.new_ones(len(tried), len(disc)), disc, tried)
    y, power, shells = values * transfer, transfer.square(), int(disc.shell.max()) + 1
    of_shell = power.new_zeros(shells).index_add_(0, disc.shell, power.sum(0)).clamp_min(1e-9)
    shift = torch.zeros(len(values), 2, device=values.device)
    for _ in range(4):
        seen = fourier.phase_shift(y, disc, shift).real.sum(0)
        mean = power.new_zeros(shells).index_add_(0, disc.shell, seen) / of_shell
        rest = (signal[:shells].to(mean) - mean.square()).clamp_min(0)
        weighed = y * mean[disc.shell] / (1 + power * rest[disc.shell])
        score = 2 * (weighed.real @ ramp.real.T - weighed.imag @ ramp.imag.T) + prior
        shift = score.softmax(1) @ tried
    return shift


def wiener(acc: Accumulator, power: Tensor) -> Tensor:
    """The map (d, d, d) of an accumulator under a prior of slice power per shell (d//2 + 1,)."""
    sums = Sums(acc)
    level = sums.mean[:: acc.pad][: len(power)].clamp_min(1e-20)
    return solve(sums, (1 / (power.clamp_min(1e-12) * level)).float(), passes=0)


def grid_slices(volumes: Tensor, grid: Grid, disc: fourier.HalfDisc) -> Tensor:
    """Slices (K, Q, P) of volumes (K, d, d, d) at all orientations of a grid."""
    return torch.stack([extract_slices(volume_transform(volume), grid.rotation, disc) for volume in volumes])


def add_sums(acc: Accumulator, data: Tensor, weight: Tensor, grid: Grid, disc: fourier.HalfDisc) -> None:
    """Insert the sums (Q, P) of one class into its accumulator."""
    insert_slices(acc, data, weight, grid.rotation, disc)


def empty(box_size: int) -> Accumulator:
    """An accumulator of the box."""
    return new_accumulator(box_size)
