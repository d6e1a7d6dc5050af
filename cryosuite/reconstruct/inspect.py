"""Plain checks of a particle set before anything is computed with it: numbers, ranges, duplicates, broken images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cryosuite.data.contrast import SURE, contrast_score
from cryosuite.data.particles import ParticleSet
from cryosuite.errors import InputError
from cryosuite.reconstruct.diagnose import (
    CONTROL,
    MARGIN,
    Trial,
    best_trial,
    map_skewness,
    view_coverage,
)
from cryosuite.reconstruct.shifts import errors_of_shifts

OK, WARN, FAIL = "ok", "warn", "fail"
SAMPLE_IMAGES = 1000
DEFOCUS_A = (1000.0, 60000.0)  # plausible range; outside is a unit error or a bad fit
LARGE_SHIFT = 0.2  # of the box
FEW = 1000  # particles below which heterogeneity is hard to learn
SKEWED = 0.5  # skewness of a map beyond which its sign is plain


@dataclass(frozen=True)
class Finding:
    """One line of the report: status ok/warn/fail, what was looked at, what was found, what to do about it."""

    status: str
    what: str
    found: str
    advice: str = ""


def inspect_numbers(particles: ParticleSet) -> list[Finding]:
    """Counts, box, pixel sizes, duplicates, half sets."""
    n, box = len(particles), particles.box_size
    out = [
        Finding(OK, "particles", f"{n}")
        if n >= FEW
        else Finding(WARN, "particles", f"{n}", f"Fewer than {FEW}: good for a map, too few to learn many states.")
    ]
    pixel = particles.pixel_size
    wide = f"box {box}, {float(pixel.min()):.4g} A per pixel"
    if pixel.max() > pixel.min() * 1.0001:
        wide = f"box {box}, {float(pixel.min()):.4g} to {float(pixel.max()):.4g} A per pixel"
    wide += f", {box * float(np.median(pixel)):.0f} A wide"
    good = float(pixel.min()) > 0.3 and float(pixel.max()) < 20 and pixel.max() < pixel.min() * 1.1
    out.append(
        Finding(OK, "box and pixel size", wide)
        if good
        else Finding(WARN, "box and pixel size", wide, "Unusual: check the pixel size (--Apix).")
    )
    if particles.ctf is not None:
        off = np.abs(particles.ctf[:, 1] / pixel - 1).max()
        if off > 0.01:
            text = f"the CTF table and the images differ by up to {100 * off:.1f} %"
            out.append(Finding(FAIL, "pixel size of the CTF", text, "Write the CTF table again for this stack."))
    _, first = np.unique(particles.images.identity(), return_index=True)
    twice = n - len(first)
    if twice:
        text = f"{twice} of {n} rows show an image again"
        advice = "Right after symmetry expansion (half sets keep copies together); else remove duplicates."
        out.append(Finding(WARN, "duplicates", text, advice))
    else:
        out.append(Finding(OK, "duplicates", "none"))
    if particles.half is None:
        out.append(Finding(OK, "half sets", "not given: a fixed random split", "Half-map FSC may be optimistic."))
    else:
        share = float(np.mean(particles.half))
        status = OK if 0.3 < share < 0.7 else WARN
        out.append(Finding(status, "half sets", f"from the refinement, {1 - share:.0%} and {share:.0%}"))
    return out


def inspect_images(particles: ParticleSet, sample: int = SAMPLE_IMAGES) -> list[Finding]:
    """Broken images and contrast, from a sample spread over the set."""
    rows = np.unique(np.linspace(0, len(particles) - 1, min(sample, len(particles))).astype(np.int64))
    broken, flat, background = [], [], []
    size = particles.box_size
    axis = np.arange(size) - size // 2
    outside = np.hypot(axis[:, None], axis) > 0.45 * size
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        images = particles.read(part)
        finite = np.isfinite(images).all((1, 2))
        broken += part[~finite].tolist()
        spread = np.where(finite, np.nan_to_num(images).std((1, 2)), 1.0)
        flat += part[spread == 0].tolist()
        background += [(one[outside].mean(), one[outside].std()) for one in images[finite]]
    out = []
    for bad, what in ((broken, "images with NaN or infinite values"), (flat, "constant images")):
        if bad:
            text = f"{len(bad)} of {len(rows)} looked at: {_rows(bad)} (0-based)"
            advice = "Leave them out with --ind, or extract them again; preprocess leaves them out and says so."
            out.append(Finding(FAIL if bad is broken else WARN, what, text, advice))
    if not broken and not flat:
        out.append(Finding(OK, "images", f"{len(rows)} looked at: all finite, none constant"))
    mean, sd = np.array(background).T if background else (np.zeros(1), np.ones(1))
    text = f"mean {mean.mean():.3g}, sd {np.median(sd):.3g} around the particles"
    normal = abs(mean.mean()) < 0.2 * max(np.median(sd), 1e-12) and 0.5 < np.median(sd) < 2
    advice = "" if normal else "Not normalised: run `cryosuite preprocess` before training."
    out.append(Finding(OK if normal else WARN, "grey values", text, advice))
    return out


def _rows(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def inspect_metadata(particles: ParticleSet) -> list[Finding]:
    """Shifts, views, defocus and the other CTF parameters."""
    out = []
    if particles.shift is not None:
        largest = np.abs(particles.shift).max(1)
        text = f"up to {largest.max():.3f} of the box ({largest.max() * particles.box_size:.1f} pixels)"
        far = int((largest > LARGE_SHIFT).sum())
        if far:
            advice = "Shifts are fractions of the box: are they in pixels or Angstrom? Or re-centre and extract again."
            out.append(Finding(WARN, "shifts", f"{text}; {far} beyond {LARGE_SHIFT}", advice))
        else:
            out.append(Finding(OK, "shifts", text if largest.max() > 0 else "all zero"))
    if particles.rotation is not None:
        filled, largest = view_coverage(particles.rotation)
        text = f"{filled:.0%} of the sphere seen, concentration {largest:.2f} (0.33 when even)"
        enough = filled > 0.7 or len(particles) < FEW
        advice = "" if enough and largest < 0.6 else "Preferred orientation: expect stretched maps."
        out.append(Finding(OK if not advice else WARN, "views", text, advice))
    if particles.ctf is None:
        return out
    u, v, kv, cs, w = (particles.ctf[:, column] for column in (2, 3, 5, 6, 7))
    mean = (u + v) / 2
    text = f"{mean.min() / 1e4:.2f} to {mean.max() / 1e4:.2f} micrometres, median {np.median(mean) / 1e4:.2f}"
    strange = int(((mean < DEFOCUS_A[0]) | (mean > DEFOCUS_A[1])).sum())
    if strange and not (particles.ctf[:, 8] != 0).all():
        advice = "Defocus is in Angstrom (15000 is 1.5 micrometres), positive for underfocus."
        status = FAIL if strange > 0.5 * len(mean) else WARN
        out.append(Finding(status, "defocus", f"{text}; {strange} outside 0.1 to 6", advice))
    else:
        out.append(Finding(OK, "defocus", text))
    apart = float(np.abs(u - v).max())
    if apart > 5000:
        out.append(Finding(WARN, "astigmatism", f"up to {apart:.0f} A", "Large: are these CTF fits good?"))
    usual = (
        np.isin(np.round(kv), (80, 100, 120, 200, 300)).all() and cs.max() < 5 and (w > 0.01).all() and w.max() < 0.3
    )
    text = f"{_values(kv)} kV, Cs {_values(cs)} mm, amplitude contrast {_values(w)}"
    out.append(Finding(OK if usual else WARN, "microscope", text, "" if usual else "Unusual values: check them."))
    if particles.ctf_premultiplied:
        out.append(Finding(OK, "CTF", "images are already multiplied by their CTF, and this is honoured"))
    return out


def _values(column: np.ndarray) -> str:
    return ", ".join(f"{value:.3g}" for value in np.unique(np.round(column, 4))[:4])


def inspect_conventions(particles: ParticleSet, trials: list[Trial], sample: int) -> list[Finding]:
    """Poses, shifts and CTF as the trial backprojections judge them; the quick map's resolution."""
    given, control = trials[0], next(one for one in trials if one.alternative.name == CONTROL)
    points = 3 * (given.map.shape[-1] // 2) ** 2 // 2
    error = 5.0 / np.sqrt(max(min(sample, len(particles)) * points, 1))
    what = "poses, shifts and CTF"
    text = f"agreement {given.agreement:.3f} with held-out images; with other particles' poses {control.agreement:.3f}"
    best, clear = best_trial(trials, min(sample, len(particles)), points)
    out = []
    if clear:
        reading = best.alternative
        text = f"'{reading.name}' fits the images better: {best.agreement:.3f} against {given.agreement:.3f} as given"
        strong = best.agreement > 1.1 * given.agreement or given.agreement <= control.agreement
        advice = f"Probably {reading.meaning}. {reading.advice}"
        out.append(Finding(FAIL if strong else WARN, what, text, advice))
    elif given.agreement <= control.agreement + max(error, 0.2 * MARGIN * abs(control.agreement)):
        advice = control.alternative.advice
        sure = len(particles) >= FEW
        out.append(Finding(FAIL if sure else WARN, what, text, f"The poses tell nothing about these images. {advice}"))
    else:
        out.append(Finding(OK, what, text))
    nyquist = 2.0 * float(np.median(particles.pixel_size)) * particles.box_size / given.map.shape[-1]
    text = f"{given.resolution:.1f} A from {min(sample, len(particles))} particles (limit of this test {nyquist:.1f} A)"
    poor = given.resolution > 0.25 * float(np.median(particles.pixel_size)) * particles.box_size
    out.append(Finding(WARN if poor else OK, "quick map", text, "Hardly any signal: look at the map." if poor else ""))
    return out


def inspect_shifts(particles: ParticleSet, sample: int) -> Finding:
    """How wrong the shifts are, as one map of a sample of the particles tells it."""
    rows = np.unique(np.linspace(0, len(particles) - 1, min(sample, len(particles))).astype(np.int64))
    try:
        found = errors_of_shifts(particles.subset(rows))
    except InputError as error:
        return Finding(WARN, "errors of shifts", "cannot be told", str(error))
    if found is None:
        return Finding(OK, "errors of shifts", "not measurably wrong (of a mixture one map cannot tell)")
    size = found.error * float(np.median(particles.pixel_size))
    return Finding(
        WARN,
        "errors of shifts",
        f"off by {found.error:.2g} pixels ({size:.2g} A) in each direction",
        "train-hype, train-kraqen and polish refine them by themselves; others take their poses.pkl (--poses).",
    )


def inspect_contrast(particles: ParticleSet, trials: list[Trial] | None) -> Finding:
    """White or dark particles: asked of the images (as preprocess does), and of the map where poses are known."""
    score = contrast_score(particles)
    text = f"images {'whiter' if score > 0 else 'darker'} at the particle by {abs(score):.1f} standard errors"
    skewness = 0.0
    if trials is not None:
        skewness = map_skewness(trials[0].map)
        text += f"; skewness of the map {skewness:+.1f}"
    sure = score if abs(score) > SURE else (skewness if abs(skewness) > SKEWED else 0.0)
    if sure == 0.0:
        return Finding(WARN, "contrast", f"{text}: undecided", "Look at backproject's map: density must be positive.")
    if sure < 0:
        advice = "Particles are dark: add --invert-data, or run preprocess, which turns them white."
        return Finding(FAIL, "contrast", f"{text}: inverted", advice)
    if abs(score) > SURE and skewness < -SKEWED:
        advice = "Images and map disagree: look at both. Are the poses right?"
        return Finding(WARN, "contrast", text, advice)
    return Finding(OK, "contrast", f"{text}: particles are white")


def optics_rows(particles: ParticleSet) -> list[list[str]]:
    """One line per optics group: number, particles, pixel size, kV, Cs, amplitude contrast, defocus range."""
    out = []
    for group in np.unique(particles.optics_group):
        own = particles.optics_group == group
        cells = [str(int(group) + 1), str(int(own.sum())), _values(particles.pixel_size[own])]
        if particles.ctf is not None:
            table = particles.ctf[own]
            cells += [_values(table[:, column]) for column in (5, 6, 7)]
            mean = (table[:, 2] + table[:, 3]) / 2e4
            cells.append(f"{mean.min():.2f} - {mean.max():.2f}")
        else:
            cells += ["-"] * 4
        out.append(cells)
    return out
