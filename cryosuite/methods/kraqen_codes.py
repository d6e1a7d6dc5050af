"""What becomes of the codes after the EM: twins are merged, unused ones dropped, particles embedded, collapse told."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cryosuite.data.processes import ALONE, Processes
from cryosuite.errors import notice
from cryosuite.kernels import assignment
from cryosuite.kernels import class_slices as kernel
from cryosuite.methods.kraqen_twins import correlation_groups, twin_groups
from cryosuite.reconstruct import joining
from cryosuite.reconstruct.class_work import ClassWork
from cryosuite.reconstruct.held_out import FINE_BOX
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.training.signals import StopNow

if TYPE_CHECKING:
    from cryosuite.data.particles import ParticleSet
    from cryosuite.methods.kraqen_options import KraqenOptions
    from cryosuite.methods.kraqen_voxel import VoxelEM, VoxelResult

TWINS = 0.97  # corrected correlation above which codes are one state, with the rule "correlation"
MERGE_RADIUS = 0.25  # of D: coarser detail decides which codes are twins
AGREEMENT = 0.3  # correlation of a code's half maps below which nothing can be said about it
AFTER_MERGE = 3  # iterations on all images once twins are one
AFTER_SHIFTS = 4  # iterations once shifts were refined against the codes' maps
FUSE_ROUNDS = 2  # of joining twins
COMPONENTS = 16  # of the embedding at most
UNUSED = 0.5  # particles


def merge(result: VoxelResult, rule: str = "auto") -> tuple[VoxelResult, np.ndarray]:
    """Make one code of twins, drop unused codes, number the rest by use, and let all images choose again.

    Args:
        rule: "overlap" lets the codes compete at 2.5 times the Bayes temperature, where codes that tell few images
            apart become equal, and joins those that share their images (`joining.joined_groups`); where fewer would be
            left than the states that the options expect, only those that share most, until so many are left.
            "likelihood" merges where images of the other half set prefer the joint map (`kraqen_twins`); "correlation"
            codes whose half maps correlate above .97 once corrected for noise, within D/4 (KRAQEN.md, section 5;
            measured: it leaves twins apart and joins similar states); "none" nothing. "auto": the first with held-out
            scores, else the second.

    Returns:
        The result of the remaining codes and (K,) int64 the new number of each code, -1 for dropped ones.

    Raises StopNow when a signal asked to stop.
    """
    engine, p = result.engine, result.p
    used = np.flatnonzero(p.usage() > UNUSED)
    groups = np.full(p.n_classes, -1, np.int64)
    if not len(used):
        return result, np.zeros(p.n_classes, np.int64)
    groups[used] = np.arange(len(used))
    if rule == "auto":
        rule = "overlap" if engine.options.m_step == "local" else "likelihood"
    if rule != "none" and len(used) > 1:
        part = p.columns(used)
        if engine.align(part):
            part = refine(engine, part, AFTER_SHIFTS).p
        with engine.threads_of_torch():
            if rule == "overlap":
                part, groups[used] = _fused(engine, part, engine.options.n_states)
            elif rule == "likelihood":
                groups[used] = twin_groups(engine, part, engine.seed)
            else:
                groups[used] = correlation_groups(engine, part, TWINS, MERGE_RADIUS, AGREEMENT)
        p = replace(part, indices=used.astype(np.int32)[part.indices], n_classes=p.n_classes)
    p = _grouped(p, groups)
    order = np.argsort(-p.usage(), kind="stable")
    order = order[p.usage()[order] > UNUSED]
    place = np.full(p.n_classes, -1, np.int64)
    place[order] = np.arange(len(order))
    groups[used] = place[groups[used]]
    p = p.columns(order)
    coarse = engine.options.m_step == "local" and engine.box < min(engine.particles.box_size, FINE_BOX)
    if coarse or len(order) < len(used):
        options = engine.options.changed(em_finish=AFTER_MERGE)
        again = finish(engine.particles, p, options, engine.seed, engine.device, engine.processes, engine)
        _leave_if_stopped(again)
        return replace(again, history=result.history, stopped=result.stopped), groups
    return replace(result, codes=result.codes[used[order]], p=p, usage=p.usage()), groups


def _fused(engine: VoxelEM, p: ClassWeights, least: int = 0) -> tuple[ClassWeights, np.ndarray]:
    """Shares of the same K codes after a while at a raised temperature, and the (K,) group of each code.

    Where they would be fewer than ``least``, the given shares, and groups of those that share most.
    """

    def warmed(part: ClassWeights, temperature: float) -> ClassWeights:
        return refine(engine, part, joining.JOIN_ITERATIONS, temperature).p

    cold, groups, first = p, np.arange(p.n_classes), None
    for _ in range(FUSE_ROUNDS):
        merged = warmed(p.merged(groups), joining.JOIN_AT)
        first = merged if first is None else first
        found = joining.joined_groups(merged, warmed)
        onto = np.unique(groups, return_index=True)[1]  # the first code of each group stands for it
        p = replace(merged, indices=onto.astype(np.int32)[merged.indices], n_classes=p.n_classes)
        before, groups = groups, found[groups]
        left = len(np.unique(groups))
        if left < min(least, p.n_classes):
            groups = joining.overlap_groups(first, least=least)
            notice(
                f"{len(np.unique(groups))} codes are kept, because of --n-states {least}: by what they share of "
                "their images, fewer than that are told apart for certain (--n-codes instead of --n-states joins those "
                "as well)"
            )
            return cold, groups
        if left == len(np.unique(before)):
            break
    return p, groups


def _grouped(p: ClassWeights, groups: np.ndarray) -> ClassWeights:
    """Shares of groups of codes; what dropped codes (-1) had is spread over the rest of the row."""
    kept = np.flatnonzero(groups >= 0)
    merged = p.columns(kept).merged(groups[kept])
    rows = np.repeat(np.arange(len(p)), np.diff(merged.indptr))
    total = np.bincount(rows, merged.data, minlength=len(p))
    return replace(merged, data=(merged.data / np.maximum(total[rows], 1e-30)).astype(np.float32))


def refine(engine: VoxelEM, p: ClassWeights, iterations: int, temperature: float = 0.0) -> VoxelResult:
    """EM on all images from given shares, without splitting, with the images an engine has already read.

    Args:
        temperature: in units of T*; 0: that of the options.
    """
    before = engine.options, engine.codes
    changes = {"t_max": temperature, "t_min": temperature} if temperature else {}
    engine.options, engine.codes = engine.options.changed(em_finish=iterations, **changes), p.n_classes
    try:
        result = engine.run(start=p, label="merging twins")
    finally:
        engine.options, engine.codes = before
    _leave_if_stopped(result)
    return result


def _leave_if_stopped(result: VoxelResult) -> None:
    """Raise StopNow where a signal cut the iterations short: what they found is not to be taken for the end."""
    if result.stopped:
        raise StopNow(result.stopped)


def finish(
    particles: ParticleSet,
    p: ClassWeights,
    options: KraqenOptions,
    seed: int = 0,
    device: torch.device | str = "cpu",
    processes: Processes = ALONE,
    before: VoxelEM | None = None,
) -> VoxelResult:
    """``em_finish`` iterations on all images from given shares in the fine box, or the maps of the shares alone (0).

    ``before``: the engine of the search, whose particles these are; their shifts are refined once more.
    """
    from cryosuite.methods.kraqen_cross import engine_for
    from cryosuite.methods.kraqen_voxel import VoxelResult

    fewer = options.changed(n_codes=min(p.n_classes, len(p)))
    engine = engine_for(particles, fewer, seed, device, FINE_BOX, processes)
    engine.codes = p.n_classes  # a network may have more codes than there are images
    if before is not None:
        engine.given_shift, engine.refined_shift = before.given_shift, before.refined_shift
        engine.align(p)
    if options.em_finish:
        return engine.run(start=p, label="last iterations")
    return VoxelResult(engine.maps(p), p, p.usage(), engine)


# --- the embedding ---------------------------------------------------------------------------------------------------


def embed(result: VoxelResult) -> tuple[np.ndarray, np.ndarray]:
    """Where particles and codes lie along the principal components of the codes' maps.

    The components are those of the maps weighted by use, at most 16, orthonormal in the voxels. A particle's place is
    its MAP estimate (`assignment.map_codes`): the mixture of components that explains the image best, drawn towards the
    mean of its codes as far as the image is noisy.

    Returns:
        z (N, M) float32, NaN where an image is broken, and codes (K, M) float32, M = min(K - 1, 16), at least 1.
    """
    engine, p = result.engine, result.p
    mean, basis, codes = principal_components(result.codes, result.usage)
    variance = assignment.code_variance(codes)
    shares = p.matrix @ codes.double().numpy()  # sum_k p_ik c_k
    z = shares.astype(np.float32)
    if float(variance) > 0:
        z = _places(engine, torch.cat([mean[None], basis]), shares, variance)
    z[engine.images.bad] = np.nan  # analyze leaves them out
    return z, codes.numpy()


def _places(engine: VoxelEM, maps: Tensor, shares: np.ndarray, variance: Tensor) -> np.ndarray:
    """z (N, M) of `embed`; maps (1 + M, d, d, d): the mean and the components; shares (N, M): means of the codes.

    An image needs all of the maps at once: where a GPU has no memory for them, the processor takes over.
    """
    rows, r_max = engine.processes.mine(np.arange(engine.count)), engine.box // 2
    z = np.zeros((len(rows), shares.shape[1]), np.float32)

    def place(work: ClassWork) -> None:
        transforms, disc, at = work.transforms(maps, r_max), work.disc(r_max), 0
        for chunk in work.chunks(rows, r_max):
            G, h = kernel.class_gram(transforms, *chunk[1:], disc, work.pool, work.threads)
            system = assignment.Gram(G[:, 1:, 1:], h[:, 1:] - G[:, 0, 1:], h.new_zeros(len(h)))
            own = torch.from_numpy(shares[chunk.rows].astype(np.float32)).to(G)
            z[at : at + len(h)] = assignment.map_codes(system, own, variance.to(G)).float().cpu().numpy()
            at += len(h)

    work, done = engine.work, None
    with work.threads_of_torch():
        while done is None and len(work.groups(len(maps), r_max)) == 1:
            done = work.once(lambda: place(work))
    if done is None:
        if work.device.type != "cpu":
            notice("the latents' maps do not fit the GPU's memory together: latents are made on the processor")
        other = ClassWork(engine.images, processes=engine.processes)
        with other.threads_of_torch():
            other.attempt(lambda: place(other))
    return engine.processes.joined(z)


def principal_components(maps: Tensor, usage: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d, d, d), components (M, d, d, d) and coordinates (K, M) of maps (K, d, d, d), weighted by use."""
    K, shape = len(maps), maps.shape[1:]
    weight = torch.from_numpy(np.asarray(usage, np.float64))
    weight = weight / weight.sum().clamp_min(1e-30)
    flat = maps.flatten(1).double()
    mean = weight @ flat
    offset = flat - mean
    root = weight.sqrt()[:, None]
    values, vectors = torch.linalg.eigh((offset * root) @ (offset * root).T)
    count = max(1, min(K - 1, COMPONENTS))
    values, vectors = values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    scale = torch.where(values > 1e-12 * values.max().clamp_min(1e-300), values.clamp_min(1e-300).rsqrt(), 0.0)
    basis = scale[:, None] * (vectors.T @ (offset * root))
    sign = torch.sign(basis.gather(1, basis.abs().argmax(1, keepdim=True))) + (scale == 0)[:, None]
    basis = basis * sign
    codes = offset @ basis.T
    return mean.reshape(shape).float(), basis.reshape(count, *shape).float(), codes.float()


# --- collapse --------------------------------------------------------------------------------------------------------


def collapsed(usage: np.ndarray, p: ClassWeights) -> str | None:
    """A sentence for the user when the codes tell nothing apart; None when they do.

    Args:
        usage: (K,) particles per code. p: the shares.
    """
    usage = np.asarray(usage, np.float64)
    total, K = usage.sum(), len(usage)
    seen = np.diff(p.indptr) > 0
    if not total > 0:
        return "No particle could be assigned to any code: are the images and the CTF right?"
    if K == 1:
        return (
            "Only one code is left: as far as this run can tell, all particles show the same state. If more are "
            "expected, raise --n-codes, check the poses, or look for smaller changes with --field triplane."
        )
    if usage.max() > 0.97 * total:
        return (
            f"{usage.max() / total:.0%} of the particles went to one of {K} codes: the run collapsed, or the particles "
            "show one state. Try --n-codes, another --seed, or more particles."
        )
    live = math.exp(float(-(usage[usage > 0] / total * np.log(usage[usage > 0] / total)).sum()))
    uncertainty = float(p.entropy()[seen].mean()) / max(math.log(live), 1e-9)
    if uncertainty > 0.9:
        return (
            f"The assignments are undecided ({uncertainty:.0%} of the largest possible uncertainty): the images are "
            "too noisy to be told apart, or the noise spectrum is wrong. The codes' maps should not be read as states."
        )
    return None
