"""Films: what is between two volumes, order and number of pictures, files that programs open."""

from __future__ import annotations

import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cryosuite.analysis import movie
from cryosuite.analysis.volumes import VolumeFile
from cryosuite.errors import InputError, UserNotice
from cryosuite.formats.mrc import write_map


def ball(radius: float, size: int = 24) -> np.ndarray:
    axis = np.arange(size) - size // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    return np.clip(1.0 - (np.sqrt(x**2 + y**2 + z**2) - radius) / 6, 0, 2).astype(np.float32)


@pytest.fixture
def growing(tmp_path: Path) -> list[VolumeFile]:
    """Three balls of radius 4, 6 and 8 voxels at level 1."""
    files = []
    for number, radius in enumerate((4.0, 6.0, 8.0)):
        path = tmp_path / f"vol_{number:03d}.mrc"
        write_map(path, ball(radius), 4.0)
        files.append(VolumeFile(number, path, ("#440f5f", "#2aa083", "#f2dc3a")[number], 1.0, radius / 12))
    return files


def area(frame: np.ndarray) -> int:
    """Pixels of the surface: above the bar and the texts."""
    return int((frame[:-12] < 235).any(axis=-1).sum())


def test_between_two_volumes_lies_their_blend(growing: list[VolumeFile]) -> None:
    """Densities that fall linearly blend to a ball of the radius between, so the picture grows with every frame."""
    frames = list(movie.path_frames(growing, pixels=96, blend=2))
    assert len(frames) == movie.frame_count(3, 2) == 5
    areas = [area(frame) for frame in frames]
    radii = 4 * np.sqrt(np.array(areas) / areas[0])
    np.testing.assert_allclose(radii, [4, 5, 6, 7, 8], rtol=0.06)


def test_a_loop_leads_back_to_the_first(growing: list[VolumeFile]) -> None:
    frames = list(movie.path_frames(growing, pixels=64, blend=2, loop=True))
    assert len(frames) == movie.frame_count(3, 2, loop=True) == 6
    areas = [area(frame) for frame in frames]
    assert areas[0] < areas[5] < areas[4], "the last frame is between the last volume and the first"


def test_one_volume_and_turning(growing: list[VolumeFile]) -> None:
    assert len(list(movie.path_frames(growing[:1], pixels=32))) == 1
    assert movie.frame_count(1, loop=True) == 1
    still, turned = (list(movie.path_frames(growing[:2], 48, 2, spin=spin))[-1] for spin in (0.0, 90.0))
    assert abs(area(still) - area(turned)) < 0.05 * area(still), "a ball looks the same from every side"


def test_the_line_below_fills_up(growing: list[VolumeFile]) -> None:
    frames = list(movie.path_frames(growing, pixels=96, blend=2))
    line = [int((frame[-5, 48:93] == movie.INK).all(axis=-1).sum()) for frame in frames]
    np.testing.assert_allclose(line, np.array([0, 0.25, 0.5, 0.75, 1]) * 45, atol=1)


def test_gif_goes_to_and_fro_for_ever(growing: list[VolumeFile], tmp_path: Path, monkeypatch) -> None:
    from PIL import Image

    monkeypatch.setattr(movie, "ffmpeg", lambda: None)
    frames = list(movie.path_frames(growing, pixels=64, blend=2))
    (tmp_path / "m.mp4").touch()
    with pytest.warns(UserNotice, match="no MP4.*imageio-ffmpeg"):
        written = movie.write_movies(tmp_path / "m.gif", tmp_path / "m.mp4", iter(frames), to_and_fro=True)
    assert written == [tmp_path / "m.gif"] and not (tmp_path / "m.mp4").exists()
    film = Image.open(tmp_path / "m.gif")
    assert film.n_frames == 8 and film.size == (64, 64) and film.info["loop"] == 0
    for number, source in ((0, 0), (4, 4), (7, 1)):
        film.seek(number)
        shown = np.asarray(film.convert("RGB")).astype(int)
        assert np.abs(shown - frames[source]).mean() < 4, "255 colours are enough for one picture"


def test_pictures_of_a_long_film_do_not_wait_in_memory(tmp_path: Path, monkeypatch) -> None:
    """100 pictures of 360 x 360: 39 MB as they are drawn, 13 MB as Pillow holds them before it writes the GIF."""
    monkeypatch.setattr(movie, "ffmpeg", lambda: None)
    noise = np.random.default_rng(0).integers(0, 255, (360, 360, 3), np.uint8)
    noise[40:] = 255
    frames = (np.roll(noise, number, axis=1) for number in range(100))
    tracemalloc.start()
    with pytest.warns(UserNotice, match="no MP4"):
        movie.write_movies(tmp_path / "m.gif", tmp_path / "m.mp4", frames, to_and_fro=False)
    assert tracemalloc.get_traced_memory()[1] < 8e6, "what numpy and Python hold at the worst moment"
    tracemalloc.stop()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gif"]


def test_mp4_is_piped_to_ffmpeg(tmp_path: Path) -> None:
    """A stand-in for ffmpeg writes what it was told and given: sizes are even, nothing is lost."""
    program = tmp_path / "ffmpeg"
    program.write_text(
        f"#!{sys.executable}\nimport sys\ndata = sys.stdin.buffer.read()\n"
        "open(sys.argv[-1], 'w').write(' '.join(sys.argv[1:-1]) + '|' + str(len(data)))\n"
    )
    os.chmod(program, 0o755)
    pictures = [np.full((33, 31, 3), value, np.uint8) for value in (0, 100, 200)]
    movie.write_mp4(tmp_path / "a film.mp4", pictures, 12, str(program))
    told, size = (tmp_path / "a film.mp4").read_text().split("|")
    assert int(size) == 3 * 32 * 30 * 3 and "-s 30x32" in told and "rawvideo" in told and "yuv420p" in told
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.stderr.write('a\\nno such encoder')\nsys.exit(1)\n")
    with pytest.raises(InputError, match="no such encoder"):
        movie.write_mp4(tmp_path / "b.mp4", pictures, 12, str(program))
    assert not (tmp_path / "b.mp4").exists()


def test_a_film_without_x264_is_told_and_the_gif_stays(tmp_path: Path, monkeypatch) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.stderr.write('Unknown encoder libx264')\nsys.exit(1)\n")
    os.chmod(program, 0o755)
    monkeypatch.setattr(movie, "ffmpeg", lambda: str(program))
    pictures = [np.full((32, 32, 3), value, np.uint8) for value in (0, 100, 200)]
    with pytest.warns(UserNotice, match="no MP4.*Unknown encoder libx264.*m.gif"):
        written = movie.write_movies(tmp_path / "m.gif", tmp_path / "m.mp4", iter(pictures), to_and_fro=False)
    assert written == [tmp_path / "m.gif"] and not (tmp_path / "m.mp4").exists()


def test_a_program_that_gives_up_early_says_why(tmp_path: Path) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.stderr.write('x' * 200000 + '\\nno room')\nsys.exit(1)\n")
    os.chmod(program, 0o755)
    pictures = [np.zeros((256, 256, 3), np.uint8)] * 8  # more than a pipe holds
    with pytest.raises(InputError, match="film: no room"):
        movie.write_mp4(tmp_path / "b.mp4", pictures, 12, str(program))


@pytest.mark.skipif(movie.ffmpeg() is None, reason="ffmpeg is not installed")
def test_a_real_mp4(tmp_path: Path) -> None:
    pictures = [np.full((64, 64, 3), 10 * i, np.uint8) for i in range(20)]
    movie.write_mp4(tmp_path / "m.mp4", pictures, 12, movie.ffmpeg())
    assert (tmp_path / "m.mp4").read_bytes()[4:8] == b"ftyp"
