"""The box in which classes are told apart: as large as the noise lets fine shells speak."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cryosuite.data.particles import ParticleSet
from cryosuite.reconstruct.class_images import ENOUGH, FALL, LEAST_SHELL, search_box


def falling(shells: int, knee: float = 8.0, floor: float = 0.1) -> np.ndarray:
    """Noise (shells,) that falls beyond a knee to a floor, as that of ``simulate --colored``."""
    return floor + (1 - floor) / (1 + (np.arange(shells) / knee) ** 2)


def particles(noise: np.ndarray, box: int = 64) -> ParticleSet:
    """Two images with noise (G, box // 2 + 1)."""
    return replace(ParticleSet.from_array(np.zeros((2, box, box), np.float32), 5.0), noise=noise.astype(np.float32))


def told(noise: np.ndarray, box: int) -> float:
    """The share of the signal over noise of a box of 64 that a smaller one holds, coefficient by coefficient."""
    y, x = np.mgrid[-31:32, 0:32]
    shell = np.hypot(x, y)
    inside = (shell >= LEAST_SHELL) & (shell < 32)
    each = shell[inside] ** -FALL / np.interp(shell[inside], np.arange(33), noise)
    return each[shell[inside] < box // 2].sum() / each.sum()


@pytest.mark.parametrize("knee, box", [(1e9, 32), (40.0, 32), (20.0, 40), (8.0, 48)])
def test_the_finer_the_less_noise_there_is(knee: float, box: int) -> None:
    noise = falling(33, knee)
    assert search_box(particles(noise[None])) == box
    assert told(noise, box) > ENOUGH - 0.02
    assert box == 32 or told(noise, box - 8) < ENOUGH + 0.02


def test_how_loud_the_noise_is_does_not_matter_nor_how_many_groups() -> None:
    noise = falling(33)
    assert search_box(particles(1e4 * noise[None])) == search_box(particles(np.stack([noise, noise]))) == 48


def test_small_images_are_taken_whole() -> None:
    assert [search_box(particles(np.ones((1, d // 2 + 1)), d)) for d in (16, 32, 40)] == [16, 32, 32]
    assert search_box(particles(falling(21, floor=0.0)[None], 40)) == 40


def test_the_box_does_not_depend_on_the_size_of_the_images() -> None:
    noise = falling(65)[None]
    assert search_box(particles(noise, 128)) == search_box(particles(noise[:, :33])) == 48


def test_levels_that_are_no_numbers_are_left_out() -> None:
    falls = falling(33)
    for bad in (np.nan, 0.0, np.inf):
        assert search_box(particles(np.stack([np.full(33, bad), falls]))) == 48
        assert search_box(particles(np.full((1, 33), bad))) == 32
