"""cryoSPARC tables: poses and CTF against cryoDRGN and truth, passthrough joins, several classes, write back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryosuite.errors import InputError, UserNotice
from cryosuite.formats import cs
from cryosuite.formats.pickles import read_ctf, read_poses

POSED = ["syn_same_psize", "syn_align_2x", "syn_mixed_psize", "syn_abinit", "syn_noblob", "csparc_P12_J24_rows0-149"]


def table(n: int = 6, **more: np.ndarray) -> np.ndarray:
    """A small particle table with poses."""
    fields = {
        "uid": np.arange(100, 100 + n, dtype=np.uint64),
        "blob/path": np.array([b">J1/a.mrcs"] * (n // 2) + [b"J1/b c.mrcs"] * (n - n // 2)),
        "blob/idx": np.arange(n, dtype=np.uint32),
        "blob/shape": np.full((n, 2), 64, np.uint32),
        "blob/psize_A": np.full(n, 2.0, np.float32),
        "blob/sign": np.full(n, -1.0, np.float32),
        "alignments3D/pose": np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32),
        "alignments3D/shift": np.full((n, 2), 3.2, np.float32),
        "alignments3D/psize_A": np.full(n, 4.0, np.float32),
        "alignments3D/split": (np.arange(n) % 2).astype(np.uint32),
    } | more
    fields = {name: values for name, values in fields.items() if values is not None}
    array = np.empty(n, [(name, values.dtype.str, values.shape[1:]) for name, values in fields.items()])
    for name, values in fields.items():
        array[name] = values
    return array


@pytest.mark.parametrize("name", POSED)
def test_poses_follow_the_truth(name: str, golden: Path) -> None:
    """R = expmap(pose).T to 2e-6, t to 1e-6; where cryoDRGN mis-scales (alignment pixel size) truth decides."""
    path = golden / "poses" / f"{name}.cs"
    array = cs.read_cs(path)
    given = {"box_sizes": 160, "pixel_sizes": 1.5} if name == "syn_noblob" else {}
    vector, shift = cs.poses_from_cs(array, path, **given)
    rotation = Rotation.from_rotvec(vector).as_matrix().transpose(0, 2, 1)
    truth = path.with_name(f"{path.name}.truth.npz")
    if truth.exists():
        with np.load(truth) as expected:
            wanted = expected["R"], expected["t"]
    else:
        wanted = read_poses(f"{path}.pose.pkl")
    np.testing.assert_allclose(rotation, wanted[0], atol=2e-6)
    np.testing.assert_allclose(shift, wanted[1], atol=1e-6)


@pytest.mark.parametrize("name", [*POSED, "cryosparc_J2_particles_exported"])
def test_ctf_agrees_with_cryodrgn(name: str, golden: Path) -> None:
    path = golden / "poses" / f"{name}.cs"
    given = {"box_sizes": 160, "pixel_sizes": 1.5} if name == "syn_noblob" else {}
    ctf, extras = cs.ctf_from_cs(cs.read_cs(path), path, **given)
    np.testing.assert_allclose(ctf, read_ctf(f"{path}.ctf.pkl"), rtol=1e-6, atol=1e-6)
    assert extras == {}  # nothing beyond defocus in these files


def test_images_sign_and_halves() -> None:
    names, code, index = cs.images_from_cs(table(), "x.cs")
    assert [names[c] for c in code] == ["J1/a.mrcs"] * 3 + ["J1/b c.mrcs"] * 3
    assert index.tolist() == list(range(6))
    assert cs.sign_from_cs(table(), "x.cs").tolist() == [-1] * 6
    assert cs.half_from_cs(table(), "x.cs").tolist() == [0, 1, 0, 1, 0, 1]
    np.testing.assert_allclose(cs.poses_from_cs(table(), "x.cs")[1], 3.2 * 4.0 / (2.0 * 64), rtol=1e-6)


def test_several_classes_give_the_most_probable_pose() -> None:
    """alignments_class_k (before cryoSPARC 4.5) and alignments3D_multi (since) mean the same."""
    rng = np.random.default_rng(1)
    pose, posterior = rng.normal(size=(6, 3, 3)).astype(np.float32), rng.dirichlet(np.ones(3), 6).astype(np.float32)
    bare = {f"alignments3D/{name}": None for name in ("pose", "shift", "psize_A", "split")}
    old = dict(bare)
    for k in range(3):
        old |= {
            f"alignments_class_{k}/pose": pose[:, k],
            f"alignments_class_{k}/shift": np.full((6, 2), k + 1.0, np.float32),
            f"alignments_class_{k}/psize_A": np.full(6, 4.0, np.float32),
            f"alignments_class_{k}/class_posterior": posterior[:, k],
        }
    shift = np.broadcast_to(np.arange(1.0, 4.0)[None, :, None], (6, 3, 2)).astype(np.float32)
    new = bare | {
        "alignments3D_multi/pose": pose,
        "alignments3D_multi/shift": shift,
        "alignments3D_multi/psize_A": np.full(6, 4.0, np.float32),
        "alignments3D_multi/class_posterior": posterior,
    }
    best = posterior.argmax(axis=1)
    for fields in (old, new):
        with pytest.warns(UserNotice, match="3 classes"):
            vector, t = cs.poses_from_cs(table(**fields), "x.cs")
        np.testing.assert_array_equal(vector, pose[np.arange(6), best])
        np.testing.assert_allclose(t[:, 0], (best + 1) * 4.0 / (2.0 * 64), rtol=1e-6)


def test_aberrations_in_use_are_kept() -> None:
    ctf = {
        "ctf/df1_A": 12000.0, "ctf/df2_A": 11000.0, "ctf/df_angle_rad": 0.5, "ctf/accel_kv": 300.0, "ctf/cs_mm": 2.7,
        "ctf/amp_contrast": 0.1, "ctf/phase_shift_rad": np.pi / 2, "ctf/bfactor": 5.0, "ctf/scale": 1.0,
    }  # fmt: skip
    fields = {name: np.full(6, value, np.float32) for name, value in ctf.items()}
    fields["ctf/tilt_A"] = np.tile(np.float32([2.7e7 * 1e-3, 0]), (6, 1))  # Cs times 1 mrad
    fields["ctf/trefoil_A"] = np.zeros((6, 2), np.float32)
    fields["ctf/tetra_A"] = np.ones((6, 4), np.float32)
    fields["ctf/anisomag"] = np.tile(np.float32([0.01, 0.002, 0.003, -0.01]), (6, 1))
    values, extras = cs.ctf_from_cs(table(**fields), "x.cs")
    np.testing.assert_allclose(values[0], [64, 2, 12000, 11000, np.rad2deg(0.5), 300, 2.7, 0.1, 90], rtol=1e-6)
    assert set(extras) == {"bfactor", "beam_tilt", "tetrafoil", "mag_matrix"}
    np.testing.assert_allclose(extras["beam_tilt"][0], [1.0, 0.0], rtol=1e-5)
    np.testing.assert_allclose(extras["mag_matrix"][0], [[1.01, 0.002], [0.003, 0.99]], rtol=1e-6)


def test_scale_of_zero_everywhere_is_no_scale() -> None:
    ctf = {"df1_A": 12000, "df2_A": 11000, "df_angle_rad": 0, "accel_kv": 300, "cs_mm": 2.7, "amp_contrast": 0.1}
    fields = {f"ctf/{name}": np.full(6, value, np.float32) for name, value in (ctf | {"scale": 0}).items()}
    with pytest.warns(UserNotice, match="taken as 1"):
        assert cs.ctf_from_cs(table(**fields), "x.cs")[1] == {}


def test_passthrough_is_joined_by_uid(tmp_path: Path) -> None:
    """Rows in another order, more rows than needed: the fields arrive at the right particles."""
    whole = table(8)
    base = np.empty(6, [(n, *whole.dtype.fields[n][:1]) for n in ("uid", "alignments3D/pose", "alignments3D/shift")])
    for name in base.dtype.names:
        base[name] = whole[name][:6]
    extra = whole[[n for n in whole.dtype.names if not n.startswith("alignments3D")]]
    shuffled = np.random.default_rng(0).permutation(8)
    cs.write_cs(tmp_path / "base.cs", base)
    packed = np.empty(8, [(n, extra.dtype[n].base.str, extra.dtype[n].shape) for n in extra.dtype.names])
    for name in packed.dtype.names:
        packed[name] = extra[name][shuffled]
    cs.write_cs(tmp_path / "extra.cs", packed)
    joined = cs.read_cs(tmp_path / "base.cs", [tmp_path / "extra.cs"])
    for name in ("uid", "blob/idx", "blob/path", "alignments3D/pose", "blob/shape"):
        np.testing.assert_array_equal(joined[name], whole[name][:6])
    cs.write_cs(tmp_path / "few.cs", packed[packed["uid"] != 103])
    with pytest.raises(InputError, match=r"few\.cs: lacks 1 of the 6 particles .*103"):
        cs.read_cs(tmp_path / "base.cs", [tmp_path / "few.cs"])


def test_write_back_is_what_numpy_reads(tmp_path: Path, golden: Path) -> None:
    array = cs.read_cs(golden / "poses" / "csparc_P12_J24_rows0-149.cs")
    cs.write_cs(tmp_path / "some.cs", array[[5, 3, 70]])
    back = np.load(tmp_path / "some.cs", allow_pickle=False)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array[[5, 3, 70]])
    with pytest.raises(TypeError):
        cs.write_cs(tmp_path / "bad.cs", np.zeros(3))


def test_fields_are_asked_for_by_name() -> None:
    for name, call in (
        ("alignments3D/pose", cs.poses_from_cs),
        ("alignments3D/shift", cs.poses_from_cs),
        ("blob/path", cs.images_from_cs),
        ("blob/idx", cs.images_from_cs),
    ):
        with pytest.raises(InputError, match=f"x.cs: has no field {name}: "):
            call(table(**{name: None}), "x.cs")
    with pytest.raises(InputError, match=r"blob/sign is 0 in row 2"):
        cs.sign_from_cs(table(**{"blob/sign": np.float32([1, 1, 0, 1, 1, 1])}), "x.cs")
    with pytest.raises(InputError, match=r"blob/path is empty in row 5"):
        cs.images_from_cs(table(**{"blob/path": np.array([b"a"] * 5 + [b""])}), "x.cs")
    with pytest.raises(InputError, match="type"):
        cs.poses_from_cs(table(**{"alignments3D/pose": np.zeros((6, 4), np.float32)}), "x.cs")
    with pytest.raises(InputError, match="0 particles"):
        cs.images_from_cs(table()[:0], "x.cs")


@pytest.mark.parametrize("size", [0.0, -4.0])
def test_no_pixel_size_of_the_alignment_turns_or_loses_a_shift(size: float) -> None:
    """Shifts are multiplied by it: 0 would take them all for none, without a word."""
    sizes = np.float32([4, 4, size, 4, 4, 4])
    with pytest.raises(InputError, match=rf"x.cs: alignments3D/psize_A is {size:g} in row 2 \(0-based\)"):
        cs.poses_from_cs(table(**{"alignments3D/psize_A": sizes}), "x.cs")


def test_header_must_fit_the_file(tmp_path: Path) -> None:
    """A header that promises 2^60 rows is compared with the file before anything is made."""
    cs.write_cs(tmp_path / "a.cs", table())
    data = (tmp_path / "a.cs").read_bytes()
    (tmp_path / "b.cs").write_bytes(data.replace(b"'shape': (6,)", b"'shape': (1152921504606846976,)", 1))
    with pytest.raises(InputError, match=r"b\.cs: .*(truncated|header)"):
        cs.read_cs(tmp_path / "b.cs")
    (tmp_path / "c.cs").write_bytes(b"PK\x03\x04" + data)
    with pytest.raises(InputError, match="npz"):
        cs.read_cs(tmp_path / "c.cs")
    (tmp_path / "d.cs").write_text(json.dumps({"not": "numpy"}))
    with pytest.raises(InputError, match=r"not a \.cs file"):
        cs.read_cs(tmp_path / "d.cs")
    with pytest.warns(UserNotice, match="4 bytes behind"):
        (tmp_path / "e.cs").write_bytes(data + b"abcd")
        assert len(cs.read_cs(tmp_path / "e.cs")) == 6


CTF = {"df1_A": 12000, "df2_A": 11000, "df_angle_rad": 0.3, "accel_kv": 300, "cs_mm": 2.7, "amp_contrast": 0.1}


def with_ctf(**more: object) -> np.ndarray:
    """The small table with a CTF, and fields ctf/NAME of the same value in all rows."""
    fields = {f"ctf/{name}": np.tile(np.float32(value), (6, *[1] * np.ndim(value))) for name, value in more.items()}
    plain = {f"ctf/{name}": np.full(6, value, np.float32) for name, value in CTF.items()}
    return table(**(plain | {name: values.reshape(6, *values.shape[1:]) for name, values in fields.items()}))


def test_image_shift_of_ctf_refinement_is_corrected() -> None:
    """ctf/shift_A, in Angstrom, comes off alignments3D/shift, in alignment pixels."""
    plain = cs.poses_from_cs(table(), "x.cs")[1]
    with pytest.warns(UserNotice, match=r"ctf/shift_A, up to 1\.6 A"):
        shift = cs.poses_from_cs(with_ctf(shift_A=[1.6, -0.8]), "x.cs")[1]
    np.testing.assert_allclose((shift - plain) * 2.0 * 64, np.tile([-1.6, 0.8], (6, 1)), atol=1e-6)


@pytest.mark.parametrize("cs_mm", [0.0, 0.001, -2.0, 2.7])
def test_tilt_is_kept_whatever_the_spherical_aberration(cs_mm: float) -> None:
    """Cs-corrected microscopes have coma too: the phase must be -2 pi lambda^2 k^2 (k . tilt_A) for any Cs."""
    torch = pytest.importorskip("torch")
    from cryosuite.kernels.ctf import CtfParams, odd_phase

    values, extras = cs.ctf_from_cs(with_ctf(tilt_A=[2000.0, -900.0], cs_mm=cs_mm), "x.cs")
    extras = {name: torch.from_numpy(value).double() for name, value in extras.items()}
    params = CtfParams.from_table(torch.from_numpy(values).double())
    for name, value in extras.items():
        setattr(params, name, value)
    frequency = torch.tensor([[0.3, 0.1], [-0.2, 0.4], [0.0, 0.45]], dtype=torch.float64)
    k = frequency.numpy() / 2.0
    wavelength = 12.2639 / np.sqrt(3e5 + 0.97845e-6 * 3e5**2)
    phase = -2 * np.pi * wavelength**2 * (k**2).sum(1) * (k @ [2000.0, -900.0])
    np.testing.assert_allclose(odd_phase(frequency, params)[0].numpy(), np.exp(-1j * phase), atol=1e-5)


def test_the_users_voltage_wins_and_stands_in_for_a_missing_field() -> None:
    with pytest.warns(UserNotice, match="says 300 .*your value 200 is used"):
        assert (cs.ctf_from_cs(with_ctf(), "x.cs", voltage_kv=200)[0][:, 5] == 200).all()
    bare = with_ctf()
    bare = bare[[name for name in bare.dtype.names if name != "ctf/accel_kv"]]
    assert (cs.ctf_from_cs(bare, "x.cs", voltage_kv=200)[0][:, 5] == 200).all()
    with pytest.raises(InputError, match="has no field ctf/accel_kv"):
        cs.ctf_from_cs(bare, "x.cs")


def test_classes_and_one_refinement_together() -> None:
    """A 3D classification joined with the refinement before it: one rule, and it is said."""
    both = {
        "alignments3D_multi/pose": np.ones((6, 2, 3), np.float32),
        "alignments3D_multi/shift": np.ones((6, 2, 2), np.float32),
        "alignments3D_multi/class_posterior": np.ones((6, 2), np.float32),
    }
    with pytest.warns(UserNotice, match=r"alignments3D_multi.*\(alignments3D\): the latter"):
        vector, _ = cs.poses_from_cs(table(**both), "x.cs")
    np.testing.assert_array_equal(vector, table()["alignments3D/pose"])


def test_an_unchosen_class_may_be_nan_but_no_posterior() -> None:
    pose = np.ones((6, 2, 3), np.float32)
    pose[3, 1] = np.nan
    posterior = np.tile(np.float32([1, 0]), (6, 1))
    bare = {f"alignments3D/{name}": None for name in ("pose", "shift", "psize_A", "split")}
    fields = bare | {
        "alignments3D_multi/pose": pose,
        "alignments3D_multi/shift": np.ones((6, 2, 2), np.float32),
        "alignments3D_multi/class_posterior": posterior,
        "alignments3D_multi/psize_A": np.full(6, 4.0, np.float32),
    }
    with pytest.warns(UserNotice, match="2 classes"):
        assert np.isfinite(cs.poses_from_cs(table(**fields), "x.cs")[0]).all()
    posterior[4] = np.nan
    with pytest.raises(InputError, match="class_posterior is NaN or infinite in row 4"):
        cs.poses_from_cs(table(**fields), "x.cs")


def test_the_compressed_form_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.cs").write_bytes(b"\x94CSDAT" + bytes(100))
    with pytest.raises(InputError, match=r"a\.cs: is in cryoSPARC's compressed form.*format=1"):
        cs.read_cs(tmp_path / "a.cs")
