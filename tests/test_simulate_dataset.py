"""A simulated set on disk: signal and noise as announced, truth that fits the images, seeds that do what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cryosuite.data.truth import find_truth
from cryosuite.data.workdir import WorkDir
from cryosuite.errors import InputError
from cryosuite.formats.mrc import read_map, write_map
from cryosuite.formats.pickles import read_ctf, read_labels, read_poses, safe_load
from cryosuite.formats.stacks import StackReader
from cryosuite.formats.star import read_star
from cryosuite.kernels.ctf import CtfParams, ctf
from cryosuite.kernels.fourier import half_disc, phase_shift, to_half_disc
from cryosuite.kernels.rotations import euler_to_matrix, geodesic_deg
from cryosuite.simulate import images
from cryosuite.simulate.build import RecipeOptions, build_states
from cryosuite.simulate.dataset import simulate
from cryosuite.simulate.images import Renderer, projection_spectrum
from cryosuite.simulate.imaging import SimulateOptions, draw_particles
from cryosuite.simulate.maps import map_state
from cryosuite.simulate.noise import NoiseModel
from cryosuite.simulate.states import State, StateSet

BASE = SimulateOptions(n_particles=240, box_size=32, pixel_size=8.0, seed=3, keep_clean=True)


@pytest.fixture(scope="module")
def states() -> StateSet:
    """Three phantoms of one atom per residue: quick to image."""
    full = build_states(RecipeOptions(structures="phantom:3", occupancies="3,2,1"), 3, 4.0)
    full.states = [State(s.name, s.xyz[1::8], 8 * s.weight[1::8]) for s in full.states]
    return full


@pytest.fixture(scope="module")
def sim(states, tmp_path_factory) -> tuple[WorkDir, dict]:
    out = tmp_path_factory.mktemp("sim") / "a"
    return WorkDir(out), simulate(states, BASE, out)


def _images(path: Path) -> np.ndarray:
    with StackReader(path) as reader:
        return reader.read()


def _slice(volume: np.ndarray, rotation: np.ndarray, xy: torch.Tensor) -> torch.Tensor:
    """The map's transform at (kx, ky, 0) @ R by the plain sum over voxels: nothing is interpolated."""
    D = volume.shape[0]
    z, y, x = (np.argwhere(np.ones_like(volume)) - D // 2).T
    points = torch.from_numpy(np.stack([x, y, z])).double()
    k = torch.cat([xy.double(), torch.zeros(len(xy), 1, dtype=torch.float64)], 1) @ torch.from_numpy(rotation).double()
    values = torch.from_numpy(volume.reshape(-1)).to(torch.complex128)
    return torch.cat([torch.exp(-2j * np.pi / D * (part @ points)) @ values for part in k.split(64)])


def test_a_clean_image_is_the_ctf_times_a_central_slice_of_its_map(sim):
    """Up to where the map's own box ends its sinc tails: a few per mille to 0.7 Nyquist, grey scale included."""
    work, record = sim
    rotation, shift = read_poses(work.poses)
    label, table = read_labels(work.labels), torch.from_numpy(read_ctf(work.ctf))
    disc = half_disc(32, 11)
    clean = torch.from_numpy(_images(work.path / "clean.mrcs")[:3] * np.float32(record["image_scale"]))
    observed = phase_shift(to_half_disc(clean, disc), disc, torch.from_numpy(shift[:3]))
    for i in range(3):
        volume = read_map(work.volume(int(label[i])))
        assert volume.pixel_size == pytest.approx(8.0)
        expected = _slice(volume.data, rotation[i], disc.xy)
        expected *= ctf(disc.frequency, CtfParams.from_table(table[i : i + 1]))[0].double()
        error = (observed[i] - expected).abs().pow(2).sum() / expected.abs().pow(2).sum()
        assert error.sqrt() < 5e-3
        for r in range(1, 12):
            ring = disc.shell == r
            difference = (observed[i] - expected)[ring].abs().pow(2).sum() / expected[ring].abs().pow(2).sum()
            assert difference.sqrt() < 0.03, f"shell {r}"


def test_snr_is_what_was_asked_for(sim, states):
    """Nominal: variance of all clean pixels before the crop over the noise's. Effective: the same at D, measured."""
    work, record = sim
    clean = _images(work.path / "clean.mrcs") * np.float32(record["image_scale"])
    noise = _images(work.particles) - clean
    assert noise.std() == pytest.approx(1.0, abs=0.01) and abs(noise.mean()) < 0.01
    assert record["snr_effective"] == pytest.approx(clean.var() / noise.var(), rel=0.03)
    label = read_labels(work.labels)
    for k, value in enumerate(record["snr_effective_per_state"]):
        assert value == pytest.approx(clean[label == k].var(), rel=0.01)
    # a box twice as large holds the same signal in four times the pixels: .1 becomes about .37 (BENCHMARKS, 1)
    assert 0.32 < record["snr_effective"] < 0.41


def test_nominal_snr_measured_in_the_render_box(states, tmp_path):
    """With D as large as the render box was, the clean images themselves can be measured."""
    small = replace(BASE, n_particles=60, snr=0.2)
    record = simulate(states, small, tmp_path / "a")
    large = replace(small, box_size=64, pixel_size=4.0, render_box=128, resolution=8.0)
    simulate(states, large, tmp_path / "b")
    # the large set holds in its pixels what the small one had before its crop: same seeds, same molecules
    clean = _images(tmp_path / "b" / "clean.mrcs")
    variance_before_crop = 1 / record["image_scale"] ** 2 / NoiseModel(small.optics).variance_at_size()
    assert clean.var() / variance_before_crop == pytest.approx(0.2, rel=0.01)


def test_noise_at_d(states, tmp_path):
    record = simulate(states, replace(BASE, noise_at="D"), tmp_path / "d")
    assert record["snr_effective"] == pytest.approx(0.1, rel=1e-3)


def test_noise_per_structure_gives_every_state_the_same_snr(states, tmp_path):
    record = simulate(states, replace(BASE, noise_at="D", noise_scope="per-structure"), tmp_path / "p")
    assert np.allclose(record["snr_effective_per_state"], 0.1, rtol=1e-3)
    assert len(record["image_scale"]) == 3


def test_one_clean_set_serves_all_noise_levels_bitwise(sim, states, tmp_path):
    work, _ = sim
    simulate(states, replace(BASE, snr=0.01), tmp_path / "low")
    for name in ("clean.mrcs", "poses.pkl", "ctf.pkl", "labels.pkl"):
        a, b = (work.path / name).read_bytes(), (tmp_path / "low" / name).read_bytes()
        assert a == b, name


def test_the_same_seed_gives_the_same_files_and_another_seed_others(sim, states, tmp_path):
    work, _ = sim
    simulate(states, BASE, tmp_path / "again")
    for name in ("particles.mrcs", "particles.star", "noise.pkl", "volumes/vol_001.mrc", "mask.mrc"):
        assert (work.path / name).read_bytes()[1024:] == (tmp_path / "again" / name).read_bytes()[1024:], name
    other = draw_particles(states, replace(BASE, seed=4))
    assert not np.allclose(other.rotation, read_poses(work.poses)[0])


@pytest.mark.parametrize("coloured", [False, True])
def test_noise_spectrum_is_known_exactly(states, tmp_path, coloured):
    out = tmp_path / "n"
    record = simulate(states, replace(BASE, n_particles=600, coloured=coloured), out)
    noise = _images(out / "particles.mrcs") - _images(out / "clean.mrcs") * np.float32(record["image_scale"])
    (table,) = safe_load(out / "noise.pkl")
    disc = half_disc(32)
    power = to_half_disc(torch.from_numpy(noise), disc).abs().pow(2).mean(0)
    measured = np.array([float(power[disc.shell == r].mean()) for r in range(1, 16)])
    assert table.shape == (1, 17)
    assert np.allclose(measured / table[0, 1:16], 1, atol=0.1)
    assert np.mean(measured / table[0, 1:16]) == pytest.approx(1, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.01)
    flat = table[0, 1:15].max() / table[0, 1:15].min()
    assert flat > 3 if coloured else flat < 1.001


def test_files_say_the_same(sim):
    work, record = sim
    rotation, shift = read_poses(work.poses)
    table = read_ctf(work.ctf)
    blocks = read_star(work.star)
    rows = blocks["particles"]
    euler = torch.from_numpy(rows[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(np.float64).copy())
    assert np.abs(euler_to_matrix(euler).numpy() - rotation).max() < 1e-4
    origin = rows[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy(np.float64)
    assert np.allclose(origin, shift * 32 * 8.0, atol=1e-3)
    assert np.allclose(rows["rlnDefocusU"], table[:, 2], atol=0.1)
    assert blocks["optics"]["rlnImagePixelSize"].iloc[0] == 8.0
    defocus = table[:, 2:4].mean(1)
    assert (defocus > 8000).all() and (defocus < 25000).all()
    assert (np.abs(table[:, 2] - table[:, 3]) <= 500.01).all()
    assert np.abs(shift).max() <= 0.078
    label = read_labels(work.labels)
    assert np.bincount(label).tolist() == [120, 80, 40] == record["images_per_state"]
    assert (np.diff(label) != 0).sum() > 80, "labels are shuffled"


def test_the_folder_is_a_particle_set_with_its_truth(sim):
    from cryosuite.data.open import open_particles

    work, _ = sim
    particles = open_particles(work.path)
    assert len(particles) == 240 and particles.box_size == 32 and particles.sign == 1
    assert np.allclose(particles.noise, safe_load(work.noise)[0])
    assert np.array_equal(particles.read(np.array([5, 2])), _images(work.particles)[[5, 2]])
    truth = find_truth(work.path)
    assert truth is not None and len(truth.volumes) == 3 and truth.mask is not None
    mask = read_map(truth.mask).data
    assert mask.min() == 0 and mask.max() == 1 and 0.02 < mask.mean() < 0.5
    for path in truth.volumes:
        volume = read_map(path).data
        assert (volume * mask).sum() == pytest.approx(volume.sum(), rel=0.02)


def test_poses_are_uniform():
    label = StateSet("mix", build_states(RecipeOptions(structures="phantom:1"), 0, 4.0).states)
    rotation = draw_particles(label, replace(BASE, n_particles=20_000)).rotation
    assert np.abs(rotation.mean(0)).max() < 0.02
    assert np.abs((rotation**2).mean(0) - 1 / 3).max() < 0.02
    assert np.allclose(np.linalg.det(rotation[:50]), 1, atol=1e-5)


def test_wrong_poses_and_defocus_are_written_and_the_truth_kept(sim, states, tmp_path):
    work, _ = sim
    options = replace(BASE, pose_error_deg=3.0, shift_error=4.0, defocus_error=300.0)
    record = simulate(states, options, tmp_path / "e")
    wrong, true = read_poses(tmp_path / "e" / "poses.pkl"), read_poses(tmp_path / "e" / record["truth"]["poses"])
    assert np.array_equal(true[0], read_poses(work.poses)[0])
    angle = geodesic_deg(torch.from_numpy(wrong[0]), torch.from_numpy(true[0])).numpy()
    assert np.sqrt((angle**2).mean()) == pytest.approx(3.0, rel=0.15)
    assert ((wrong[1] - true[1]) * 256).std() == pytest.approx(4.0, rel=0.15)
    defocus = read_ctf(tmp_path / "e" / "ctf.pkl")[:, 2] - read_ctf(tmp_path / "e" / record["truth"]["ctf"])[:, 2]
    assert defocus.std() == pytest.approx(300.0, rel=0.15)
    assert (tmp_path / "e" / "clean.mrcs").read_bytes() == (work.path / "clean.mrcs").read_bytes()


def test_neighbours_and_ice_come_on_top(sim, states, tmp_path):
    work, _ = sim
    plain = _images(work.particles)
    simulate(states, replace(BASE, neighbours=1.5), tmp_path / "n")
    extra = _images(tmp_path / "n" / "particles.mrcs") - plain
    y, x = np.mgrid[:32, :32] - 16
    power = (extra**2).mean(0)
    assert power[np.hypot(x, y) > 13].mean() > 3 * power[np.hypot(x, y) < 5].mean(), "neighbours stay at the rim"
    simulate(states, replace(BASE, ice_gradient=0.5), tmp_path / "i")
    ramp = _images(tmp_path / "i" / "particles.mrcs") - plain
    assert np.sqrt((ramp**2).mean()) == pytest.approx(0.5, rel=0.15)
    assert np.allclose(np.diff(ramp, n=2, axis=2), 0, atol=1e-4), "a ramp is linear"


def test_envelope_and_half_precision(sim, states, tmp_path):
    work, record = sim
    dull = simulate(states, replace(BASE, bfactor=400.0, float16=True), tmp_path / "b")
    assert dull["snr_effective"] > record["snr_effective"], "the same nominal SNR with less at high resolution"
    assert StackReader(tmp_path / "b" / "particles.mrcs").header.mode == 12
    clean, blurred = (_images(p / "clean.mrcs")[:40] for p in (work.path, tmp_path / "b"))
    disc = half_disc(32)
    a, b = (to_half_disc(torch.from_numpy(v), disc).abs().pow(2).sum(0) for v in (clean, blurred))
    ring = disc.shell == 10
    envelope = np.exp(-2 * 400 / 4 * (10 / 256) ** 2)
    assert float(b[ring].sum() / a[ring].sum()) == pytest.approx(envelope, rel=0.02)


def test_a_render_box_larger_than_twice(states, tmp_path):
    """The D = 32 crop of a set made at D = 64: nominal .1 at 128 leaves more at 32."""
    record = simulate(states, replace(BASE, n_particles=40, render_box=128, resolution=4.0), tmp_path / "r")
    assert 0.7 < record["snr_effective"] < 1.7


def test_maps_as_sources(sim, tmp_path):
    """Images made from a map are those of the atoms behind it (the map holds all that D can show)."""
    work, record = sim
    scale = np.float32(1 / record["image_scale"])
    paths = []
    for k in range(3):
        volume = read_map(work.volume(k))
        paths.append(tmp_path / f"m{k}.mrc")
        write_map(paths[-1], volume.data * scale, volume.pixel_size)
    from_maps = StateSet("mix", [map_state(p, 4.0) for p in paths], np.array([3, 2, 1]))
    simulate(from_maps, replace(BASE, resolution=0.0), tmp_path / "m")
    a, b = _images(work.path / "clean.mrcs"), _images(tmp_path / "m" / "clean.mrcs")
    disc = half_disc(32, 14)
    a, b = (to_half_disc(torch.from_numpy(v[:40]), disc) for v in (a, b))
    assert ((a - b).abs().pow(2).sum(1) / a.abs().pow(2).sum(1)).max() < 0.02**2


def test_many_points_are_turned_in_parts(states, monkeypatch):
    """A map of millions of points does not ask for the memory of a whole batch at once; the images are the same."""
    renderer = Renderer(states.states, BASE.optics)
    particles = draw_particles(states, replace(BASE, n_particles=20)).batch(slice(None), renderer.device)
    whole = renderer.spectra(*particles)
    held = []

    def counted(points, *rest):
        held.append(points.shape[0] * points.shape[1])
        return projection_spectrum(points, *rest)

    most = 3 * max(len(state.xyz) for state in states.states)
    monkeypatch.setattr(images, "POINTS", most)
    monkeypatch.setattr(images, "projection_spectrum", counted)
    assert torch.equal(renderer.spectra(*particles), whole)
    assert max(held) <= most and len(held) > 3


@pytest.mark.parametrize(
    ("change", "match"),
    [({"box_size": 33}, "even"), ({"snr": 0.0}, "snr"), ({"render_box": 40}, "render-box"),
     ({"pixel_size": -1.0}, "Apix"), ({"n_particles": 0}, "at least one"), ({"defocus_um": (2.0, 1.0)}, "defocus"),
     ({"defocus_um": (1.0, np.inf)}, "defocus"), ({"astigmatism": -1.0}, "astigmatism"), ({"seed": -1}, "seed"),
     ({"voltage_kv": 0.0}, "voltage"), ({"amplitude_contrast": 2.0}, "amplitude-contrast"),
     ({"neighbours": -1.0}, "neighbours"), ({"resolution": -3.0}, "resolution"), ({"snr": np.inf}, "snr"),
     ({"device": "gpu"}, "expected cpu or cuda"), ({"device": "cuda:99"}, "GPUs")],
)  # fmt: skip
def test_impossible_options_are_refused(states, tmp_path, change, match):
    with pytest.raises(InputError, match=match):
        simulate(states, replace(BASE, **change), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_nothing_of_an_earlier_simulation_stays_that_does_not_belong_to_the_new_one(states, tmp_path):
    simulate(states, replace(BASE, n_particles=6, pose_error_deg=3.0, keep_clean=True), tmp_path)
    assert (tmp_path / "truth_poses.pkl").exists() and (tmp_path / "clean.mrcs").exists()
    with pytest.raises(InputError, match="holds a simulated set already: add --overwrite"):
        simulate(states, replace(BASE, n_particles=6), tmp_path)
    simulate(states, replace(BASE, n_particles=6, keep_clean=False), tmp_path, overwrite=True)
    left = {entry.name for entry in tmp_path.iterdir()}
    assert "dataset.yaml" in left and not left & {"truth_poses.pkl", "truth_ctf.pkl", "clean.mrcs"}


def test_files_of_others_are_not_replaced_unless_asked(states, tmp_path):
    (tmp_path / "volumes").mkdir()
    for name in ("particles.star", "volumes/vol_000.mrc"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=r"volumes/vol_000\.mrc, but no dataset\.yaml.*--overwrite"):
        simulate(states, replace(BASE, n_particles=6), tmp_path)
    assert (tmp_path / "volumes/vol_000.mrc").read_text() == (tmp_path / "particles.star").read_text() == "mine"
    simulate(states, replace(BASE, n_particles=6), tmp_path, overwrite=True)
    assert not (tmp_path / ".unfinished").exists()


def test_does_not_overwrite_another_kind_of_set(states, tmp_path):
    (tmp_path / "dataset.yaml").write_text("kind: preprocessed\n")
    with pytest.raises(InputError, match="not simulated"):
        simulate(states, BASE, tmp_path)


def test_noise_of_a_sorted_set_is_that_of_the_shuffled_one(states, tmp_path):
    """The noise level belongs to the set, not to the states that happen to come first."""
    from cryosuite.simulate import dataset

    label = np.repeat([0, 1], 6000)
    sums = np.stack([np.zeros(12000), np.where(label, 9.0, 1.0) * 32**2], 1)
    options = replace(BASE, noise_at="D", snr=1.0)
    noise = NoiseModel(options.optics)
    scale = dataset._scales(dataset.Signal(sums, sums), label, 2, noise, options)
    assert scale == pytest.approx(5**-0.5)
    absent = dataset._scales(dataset.Signal(sums, sums), label, 3, noise, replace(options, noise_scope="per-structure"))
    assert absent == pytest.approx([1.0, 1 / 3, 5**-0.5])  # a state without images has an ordinary map


def test_an_axis_without_direction_is_refused():
    from cryosuite.simulate.recipes import loop, loop_phantom

    structure, moving, hinge = loop_phantom(np.random.default_rng(0))
    with pytest.raises(InputError, match="coincide"):
        loop(structure, moving, hinge, hinge)
