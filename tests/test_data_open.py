"""open_particles against RELION's and cryoDRGN's own numbers, and against hostile files."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from cryosuite.data.cs_rows import cs_details
from cryosuite.data.export import load_metadata
from cryosuite.data.open import open_particles
from cryosuite.data.orientations import from_cryosparc, from_euler, to_cryosparc, to_euler
from cryosuite.data.preprocess import PreprocessOptions, preprocess
from cryosuite.data.rows import Given
from cryosuite.data.star_rows import star_rows
from cryosuite.errors import InputError
from cryosuite.formats.cs import read_cs, write_cs
from cryosuite.formats.mrc import StackReader, StackWriter
from cryosuite.formats.pickles import read_ctf, read_poses, safe_load, write_pickle
from cryosuite.formats.star import read_star, write_star

STARS = [  # name, what the cryodrgn command line was given
    ("FinalRefinement-OriginalParticles-PfCRT.star", {"pixel_size": 1.035, "amplitude_contrast": 0.1}, 300),
    ("relion31.star", {}, None),
    ("relion31.v2.star", {}, 256),
    ("relion31.6opticsgroups.star", {}, None),
    ("syn_3groups.star", {}, None),
    ("syn_mixedbox.star", {}, None),
]
SPARC = ["csparc_P12_J24_rows0-149.cs", "syn_same_psize.cs", "syn_align_2x.cs", "syn_mixed_psize.cs", "syn_abinit.cs"]


def test_euler_matches_relion_and_the_kernels(golden):
    torch = pytest.importorskip("torch")
    from cryosuite.kernels.rotations import euler_to_matrix, expmap

    data = np.load(golden / "poses/euler.npz")
    rotation = from_euler(data["euler_deg"])
    assert np.abs(rotation - data["R_cryodrgn"]).max() < 1e-12
    assert np.abs(rotation - euler_to_matrix(torch.from_numpy(data["euler_deg"])).numpy()).max() < 1e-12
    assert np.abs(from_euler(to_euler(rotation)) - rotation).max() < 1e-9
    vectors = np.load(golden / "poses/expmap.npz")["rotvec_rad"].astype(np.float64)
    ours = from_cryosparc(vectors)
    assert np.allclose(ours[0], np.eye(3))  # the zero vector
    assert np.abs(ours - expmap(torch.from_numpy(vectors)).numpy().transpose(0, 2, 1)).max() < 1e-12
    assert np.abs(from_cryosparc(to_cryosparc(ours)) - ours).max() < 1e-6


@pytest.mark.parametrize(("name", "given", "box"), STARS)
def test_star_tables_agree_with_cryodrgn(golden, name, given, box):
    path = golden / "poses" / name
    rows = star_rows(path, Given(**given))
    details = rows.details(rows.box if box is None else np.full(rows.n, box), rows.pixel_size)
    rotation, shift = safe_load(golden / "poses" / f"{name}.pose.pkl")[0]
    assert np.abs(details.rotation - rotation).max() < 1e-6
    assert np.abs(details.shift - shift).max() < 1e-6
    ctf = read_ctf(golden / "poses" / f"{name}.ctf.pkl")
    wanted = ctf if box is None else ctf[:, :]
    assert np.allclose(details.ctf[:, 2:], wanted[:, 2:], rtol=1e-6, atol=1e-5)
    if name != "relion31.v2.star":  # there the options of the command overruled the table
        assert np.allclose(details.ctf[:, :2], wanted[:, :2], rtol=1e-6)


def test_star_rows_keep_box_and_pixel_size_per_row(golden):
    rows = star_rows(golden / "poses/syn_mixedbox.star")
    assert set(zip(rows.box.tolist(), rows.pixel_size.tolist(), strict=True)) == {(320, 0.83), (208, 1.245)}
    rows = star_rows(golden / "poses/relion31.6opticsgroups.star")
    details = rows.details(rows.box, rows.pixel_size)
    assert set(details.extras) == {"beam_tilt", "odd_zernike", "even_zernike", "mag_matrix"}
    assert len(np.unique(rows.optics_group)) == 6


@pytest.mark.parametrize("name", SPARC)
def test_cs_tables_agree_with_truth_and_cryodrgn(golden, name):
    path = golden / "poses" / name
    details = cs_details(read_cs(path), path, Given(), None, None)
    truth = golden / "poses" / f"{name}.truth.npz"
    rotation, shift = safe_load(golden / "poses" / f"{name}.pose.pkl")[0]
    if truth.exists():
        rotation, shift = np.load(truth)["R"], np.load(truth)["t"]
    assert np.abs(details.rotation - rotation).max() < 2e-6
    assert np.abs(details.shift - shift).max() < 1e-6
    ctf = read_ctf(golden / "poses" / f"{name}.ctf.pkl")
    # cryoDRGN writes the pixel size of row 0 into all rows
    columns = slice(2, 9) if name == "syn_mixed_psize.cs" else slice(0, 9)
    assert np.allclose(details.ctf[:, columns], ctf[:, columns], rtol=1e-6, atol=1e-5)


def test_cs_without_images_takes_box_and_pixel_size_from_the_user(golden):
    path = golden / "poses/syn_noblob.cs"
    details = cs_details(read_cs(path), path, Given(), 160, 1.5)
    truth = np.load(golden / "poses/syn_noblob.cs.truth.npz")
    assert np.abs(details.rotation - truth["R"]).max() < 2e-6
    assert np.abs(details.shift - truth["t"]).max() < 1e-6
    assert np.allclose(details.ctf, read_ctf(golden / "poses/syn_noblob.cs.ctf.pkl"), rtol=1e-6, atol=1e-5)


def test_a_star_opens_with_its_stack(golden):
    particles = open_particles(golden / "relion/particles.star")
    assert (len(particles), particles.box_size, particles.n_groups) == (200, 64, 2)
    rotation, shift = read_poses(golden / "cryodrgn/pose.pkl")
    assert np.abs(particles.rotation - rotation).max() < 1e-6
    assert np.abs(particles.shift - shift).max() < 1e-6
    assert np.allclose(particles.ctf, read_ctf(golden / "cryodrgn/ctf.pkl"), rtol=1e-6)
    assert set(np.unique(particles.half)) == {0, 1}
    params = particles.ctf_params(np.array([3, 5]))
    assert params.voltage_kv.tolist() == particles.ctf[[3, 5], 5].tolist()


def test_cryodrgn_form_equals_the_star(golden):
    star = open_particles(golden / "relion/particles.star")
    pickles = open_particles(
        golden / "relion/particles.mrcs", poses=golden / "cryodrgn/pose.pkl", ctf=golden / "cryodrgn/ctf.pkl"
    )
    rows = np.array([7, 3, 199, 3])
    assert np.array_equal(star.read(rows), pickles.read(rows))
    assert np.abs(star.rotation - pickles.rotation).max() < 1e-6
    assert np.allclose(star.pixel_size, pickles.pixel_size)


def test_a_downsampled_stack_with_the_full_size_ctf_keeps_the_field_of_view(golden):
    first = golden / "cryodrgn/ind_first50.pkl"
    with pytest.warns(UserWarning, match="taken as downsampled"):
        # cryoDRGN users keep one ctf.pkl for all box sizes; here its first 50 rows
        ctf = read_ctf(golden / "cryodrgn/ctf.pkl")[safe_load(first)[0]]
        particles = _with_ctf(golden / "cryodrgn/particles.32.mrcs", ctf)
    assert np.allclose(particles.pixel_size, 6.0)
    assert np.allclose(particles.ctf[:, :2], [32, 6.0])


def _with_ctf(stack: Path, ctf: np.ndarray):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_pickle(Path(folder) / "ctf.pkl", ctf)
        return open_particles(stack, ctf=Path(folder) / "ctf.pkl", need_poses=False)


def test_the_stale_image_size_of_cryodrgn_downsample_is_refused(golden, tmp_path):
    blocks = read_star(golden / "cryodrgn/downsampled.32.star")
    blocks["particles"] = blocks["particles"].iloc[:50]
    write_star(tmp_path / "d.star", blocks)
    shutil.copy(golden / "cryodrgn/particles.32.mrcs", tmp_path / "particles.mrcs")
    with pytest.raises(InputError, match="says box 64.*32 pixels"):
        open_particles(tmp_path / "d.star")


def test_image_numbers_of_the_star_are_honoured(golden, tmp_path):
    blocks = read_star(golden / "relion/particles.star")
    blocks["particles"] = blocks["particles"].iloc[[17, 3, 50]].reset_index(drop=True)
    write_star(tmp_path / "some.star", blocks)
    whole = open_particles(golden / "relion/particles.star")
    some = open_particles(tmp_path / "some.star", datadir=golden / "relion")
    assert np.array_equal(some.read(slice(None)), whole.read(np.array([17, 3, 50])))
    with pytest.raises(InputError, match="Looked for: .*particles.mrcs.*--datadir"):
        open_particles(tmp_path / "some.star")


def test_ind_selects_from_images_poses_and_ctf_alike(golden, tmp_path):
    write_pickle(tmp_path / "ind.pkl", np.array([9, 2, 150]))
    whole = open_particles(golden / "relion/particles.star")
    some = open_particles(golden / "relion/particles.star", ind=tmp_path / "ind.pkl")
    assert some.index.tolist() == [9, 2, 150]
    for name in ("rotation", "shift", "ctf", "half", "optics_group"):
        assert np.array_equal(getattr(some, name), getattr(whole, name)[[9, 2, 150]])
    assert np.array_equal(some.read(np.arange(3)), whole.read(np.array([9, 2, 150])))
    names = list(load_metadata(some).particles["rlnImageName"])
    assert [name.split("@")[0] for name in names] == ["000010", "000003", "000151"]


def test_blob_sign_makes_particles_white(golden):
    dark = open_particles(golden / "adversarial/good.cs")
    white = open_particles(golden / "adversarial/sign_positive.cs")
    assert (dark.sign, white.sign) == (-1, 1)
    assert np.array_equal(dark.read(np.arange(8)), -white.read(np.arange(8)))


def test_mixed_signs_are_corrected_row_by_row(golden, tmp_path):
    table = read_cs(golden / "adversarial/good.cs")
    table["blob/sign"][::2] = 1
    write_cs(tmp_path / "mixed.cs", table)
    with pytest.warns(UserWarning, match="corrected by its own"):
        mixed = open_particles(tmp_path / "mixed.cs", datadir=golden / "adversarial")
    raw = open_particles(golden / "adversarial/sign_positive.cs").read(np.arange(8))
    assert np.array_equal(mixed.read(np.arange(8)), raw * np.where(np.arange(8) % 2, -1, 1)[:, None, None])


def test_rows_that_show_one_image_share_a_half_set(golden):
    with pytest.warns(UserWarning, match="2 duplicate"):
        particles = open_particles(golden / "adversarial/duplicate_particles.star")
    particles.half = None
    half, identity = particles.half_sets(), particles.images.identity()
    for image in np.unique(identity):
        assert len(np.unique(half[identity == image])) == 1


def test_a_stack_given_by_its_path_is_that_stack(golden, tmp_path, monkeypatch):
    """Not one of the same relative name inside its own folder, nor one under --datadir."""
    whole = golden / "adversarial/good.mrcs"
    monkeypatch.chdir(tmp_path)
    preprocess(open_particles(whole, need_poses=False, need_ctf=False), Path("work"), PreprocessOptions(16))
    wanted = open_particles("work", need_poses=False, need_ctf=False).read(slice(None))
    for other in ("work/work/particles.mrcs", "d/work/particles.mrcs", "d/particles.mrcs"):
        Path(other).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole, other)
    Path("list.txt").write_text("particles.mrcs\n")
    for path, datadir in (("work", None), ("work/particles.mrcs", None), ("work/particles.mrcs", "d")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = open_particles(path, need_poses=False, need_ctf=False, datadir=datadir)
        assert np.array_equal(found.read(slice(None)), wanted)
    listed = open_particles("list.txt", need_poses=False, need_ctf=False, datadir="d")
    assert listed.box_size == open_particles(whole, need_poses=False, need_ctf=False).box_size


def test_bookkeeping_is_small(golden):
    particles = open_particles(golden / "relion/particles.star")
    arrays = [value for value in vars(particles).values() if isinstance(value, np.ndarray)]
    arrays += [particles.images.file_id, particles.images.slices, *particles.extras.values()]
    assert sum(array.nbytes for array in arrays) / len(particles) < 200


REAL = [
    ("cryodrgn/empiar_10076_7.star", "cryodrgn", 7, 320, {}),
    ("cryodrgn/empiar_10076_7.cs", "cryodrgn", 7, 320, {}),
    ("cryodrgn/toy_projections.star", "cryodrgn", 1000, 30, {"pixel_size": 8.0}),
    ("cryojax/test_starfile.star", "cryojax", 3, 16, {}),
]


@pytest.mark.parametrize(("table", "stacks", "n", "box", "options"), REAL)
def test_real_sets_open(shared, table, stacks, n, box, options):
    path = shared / "data/metadata" / table
    particles = open_particles(path, datadir=shared / "data/stacks" / stacks, need_poses=False, **options)
    assert (len(particles), particles.box_size) == (n, box)
    images = particles.read(np.arange(min(n, 3)))
    assert np.isfinite(images).all()
    assert images.std() > 0


def test_real_tilt_series_are_refused_in_plain_words(shared):
    path = shared / "data/metadata/cryodrgn/sta_testing_bin8.star"
    with pytest.raises(InputError, match="tilt-series or subtomogram.*not supported"):
        open_particles(path, datadir=shared / "data/stacks/cryodrgn")


def test_real_pickles_open_with_their_stacks(shared):
    folder = shared / "data/stacks/cryodrgn"
    particles = open_particles(folder / "hand.mrcs", poses=folder / "hand_rot_trans.pkl", need_ctf=False)
    assert len(particles) == len(particles.rotation) == 100
    with pytest.raises(InputError, match="hand_rot.pkl: 100 poses, but .*hand.5.mrcs has 5"):
        open_particles(folder / "hand.5.mrcs", poses=folder / "hand_rot.pkl", need_ctf=False)


def _case(folder: Path, entry: dict) -> tuple[Path, dict]:
    """How a fixture is given to open_particles."""
    path = folder / entry["file"]
    if path.suffix == ".pkl":
        kind = next(kind for kind in ("poses", "ctf", "ind") if kind in path.name or path.name == "zero_byte.pkl")
        return folder / "good.mrcs", {kind: path, "need_poses": kind == "poses", "need_ctf": kind == "ctf"}
    if path.suffix in (".mrcs", ".txt"):
        return path, {"need_poses": False, "need_ctf": False}
    return path, {}


def _outcome(path: Path, options: dict) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            particles = open_particles(path, **options)
            particles.read(np.arange(len(particles)))
        except InputError as error:
            return "refused", str(error)
    return "read", f"{len(particles)} particles, {particles.pixel_size[0]} A. " + " ".join(
        str(warning.message) for warning in caught
    )


def test_every_hostile_file_gets_its_message(golden, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = golden / "adversarial"
    later = {"nan_image.mrcs", "inf_pixel.mrcs", "constant_image.mrcs"}  # preprocess looks at pixels
    for entry in json.loads((folder / "expected.json").read_text()):
        path = folder / entry["file"]
        other = path.suffix in (".yaml", ".mrc") or "_z" in path.name or path.name == "evil_weights.pkl"
        if other or path.name in later:
            continue
        source, options = _case(folder, entry)
        outcome, text = _outcome(source, options)
        must, mention = entry["must"], entry["mention"]
        if "for poses, read for CTF" in must or "refuse for CTF, read for poses" in must:
            relaxed = {"need_poses": False} if must.startswith("refuse for poses") else {"need_ctf": False}
            assert _outcome(source, relaxed)[0] == "read", entry
        wanted = {"read"} if must.startswith("read") else {"refused"}
        wanted = {"read", "refused"} if " or read" in must else wanted
        assert outcome in wanted, (entry, text)
        if outcome == "refused":
            assert path.name in text, (entry, text)
        if mention and "the refused global" not in mention and entry["file"] != "sign_positive.cs":
            assert mention.split(" (or")[0] in text, (entry, text)
    assert not list(tmp_path.iterdir())


def _star_of(golden: Path, folder: Path, names: list[str], **columns: object) -> Path:
    """Rows 0, 1, ... of RELION's star with other image names and columns, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = read_star(golden / "relion/particles.star")
    table = blocks["particles"].iloc[: len(names)].reset_index(drop=True)
    blocks["particles"] = table.assign(rlnImageName=names, **columns)
    write_star(folder / "some.star", blocks)
    return folder / "some.star"


def _stack(golden: Path, path: Path, rows: list[int]) -> Path:
    """A stack of some of RELION's images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with StackWriter(path, len(rows), 64, 3.0) as writer:
        writer.write(StackReader(golden / "relion/particles.mrcs").read(rows))
    return path


def test_two_names_never_become_one_file(golden, tmp_path):
    """job1/a.mrcs and job2/a.mrcs with all stacks thrown into one folder: a wrong image looks like a right one."""
    star = _star_of(golden, tmp_path / "here", ["000001@job1/a.mrcs", "000001@job2/a.mrcs"])
    _stack(golden, tmp_path / "flat/a.mrcs", [0, 1])
    with pytest.raises(InputError, match="job1/a.mrcs and job2/a.mrcs would both be read from .*flat/a.mrcs"):
        open_particles(star, datadir=tmp_path / "flat")
    _stack(golden, tmp_path / "flat/job2/a.mrcs", [1])
    assert len(open_particles(star, datadir=tmp_path / "flat")) == 2


def test_a_moved_project_is_found_by_the_end_of_absolute_names(golden, tmp_path):
    star = _star_of(golden, tmp_path / "x", [f"000001@/gone/project/Extract/job{i}/a.mrcs" for i in (1, 2)])
    for i in (1, 2):
        _stack(golden, tmp_path / f"project/Extract/job{i}/a.mrcs", [i])
    whole = open_particles(golden / "relion/particles.star")
    for folder in (tmp_path / "project", tmp_path / "project/Extract"):
        moved = open_particles(star, datadir=folder)
        assert np.array_equal(moved.read(np.arange(2)), whole.read(np.array([1, 2])))


def test_a_stand_in_for_an_absolute_name_is_told_once(golden, tmp_path):
    star = _star_of(golden, tmp_path, ["000001@/gone/a.mrcs", "000001@/gone/b.mrcs"])
    for name in "ab":
        _stack(golden, tmp_path / f"{name}.mrcs", [0])
    with pytest.warns(UserWarning, match="/gone/a.mrcs is not there: .*a.mrcs is used") as caught:
        open_particles(star)
    assert sum("is used" in str(one.message) for one in caught) == 1


def test_a_name_means_the_project_before_a_namesake_beside_the_star(golden, tmp_path):
    star = _star_of(golden, tmp_path / "Refine3D/job5", ["000001@Extract/job1/a.mrcs"])
    _stack(golden, tmp_path / "Extract/job1/a.mrcs", [7])
    _stack(golden, tmp_path / "Refine3D/job5/a.mrcs", [9])
    assert np.array_equal(
        open_particles(star).read(np.arange(1)), open_particles(golden / "relion/particles.star").read(np.array([7]))
    )


def test_single_image_files_and_forced_types(golden, tmp_path):
    """One .mrc per particle without NUMBER@, and the ':mrcs' of Xmipp and Scipion."""
    star = _star_of(golden, tmp_path, ["a.mrc", "000002@b.mrc:mrcs"])
    _stack(golden, tmp_path / "a.mrc", [5])
    _stack(golden, tmp_path / "b.mrc", [8, 6])
    whole = open_particles(golden / "relion/particles.star")
    assert np.array_equal(open_particles(star).read(np.arange(2)), whole.read(np.array([5, 6])))


def test_helical_segments_of_one_tube_share_a_half_set(golden, tmp_path):
    names = [f"{i + 1:06d}@a.mrcs" for i in range(12)]
    _stack(golden, tmp_path / "a.mrcs", list(range(12)))
    tubes = {"rlnMicrographName": ["m"] * 6 + ["n"] * 6, "rlnHelicalTubeID": [1, 2, 1, 2, 3, 3] * 2}
    star = _star_of(golden, tmp_path, names, rlnRandomSubset=1, **tubes)
    with pytest.warns(UserWarning, match="6 tubes: half sets are made of whole tubes"):
        half = open_particles(star).half_sets()
    for tube in set(zip(*tubes.values(), strict=True)):
        rows = [row for row in range(12) if (tubes["rlnMicrographName"][row], tubes["rlnHelicalTubeID"][row]) == tube]
        assert len(set(half[rows])) == 1
    assert half.sum() == 6


def test_half_sets_that_are_missing_in_some_rows_are_made_anew(golden, tmp_path):
    names = [f"{i + 1:06d}@a.mrcs" for i in range(6)]
    _stack(golden, tmp_path / "a.mrcs", list(range(6)))
    for value in (0, "None"):
        star = _star_of(golden, tmp_path, names, rlnRandomSubset=[1, 2, 1, 2, value, value])
        with pytest.warns(UserWarning, match="neither 1 nor 2 in 2 of 6 rows"):
            particles = open_particles(star)
        assert particles.half is None
        assert np.bincount(particles.half_sets()).tolist() == [3, 3]


def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "particles.star")
    with pytest.raises(InputError, match="no regular file"):
        open_particles(tmp_path / "particles.star")


def test_a_mask_given_by_a_program_selects_where_it_is_true(golden):
    mask = np.zeros(200, bool)
    mask[[4, 9]] = True
    with pytest.warns(UserWarning, match="bool mask"):
        assert open_particles(golden / "relion/particles.star", ind=mask).index.tolist() == [4, 9]
    with pytest.raises(InputError, match="bool mask of 3 values"):
        open_particles(golden / "relion/particles.star", ind=mask[:3])


def test_an_image_in_both_half_sets_makes_new_ones(golden, tmp_path):
    """As after joining two refinements of the same particles: their half maps would agree for the wrong reason."""
    _stack(golden, tmp_path / "a.mrcs", list(range(4)))
    names = [f"{i % 4 + 1:06d}@a.mrcs" for i in range(8)]
    star = _star_of(golden, tmp_path, names, rlnRandomSubset=[1, 2, 1, 2, 1, 2, 2, 2])
    with pytest.warns(UserWarning, match="1 images are in both half sets"):
        particles = open_particles(star)
    half = particles.half_sets()
    assert np.array_equal(half[:4], half[4:])
    assert np.bincount(half).tolist() == [4, 4]


def test_a_stack_that_a_list_names_twice_is_one_in_the_half_sets(golden, tmp_path):
    (tmp_path / "twice.txt").write_text(f"{golden}/adversarial/good.mrcs\n" * 2)
    with pytest.warns(UserWarning, match="8 duplicate rows"):
        particles = open_particles(tmp_path / "twice.txt", need_poses=False, need_ctf=False)
    half = particles.half_sets()
    assert np.array_equal(half[:8], half[8:]) and set(half) == {0, 1}
