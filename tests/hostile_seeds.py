"""Small valid files of every kind that is read from outside, and a folder of them that belong together."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory

import gemmi
import mrcfile
import numpy as np
import torch
from select_toy import Toy, make_run

from cryosuite.data.encoder_weights import save_encoder
from cryosuite.data.map_weights import save_map_weights
from cryosuite.data.multiview_weights import save_multiview
from cryosuite.data.open import open_particles
from cryosuite.data.work_files import write_work_files
from cryosuite.data.workdir import WorkDir
from cryosuite.formats import cs
from cryosuite.formats.mrc import StackWriter, write_map
from cryosuite.formats.safetensors import write_safetensors
from cryosuite.nets.ief import IefEncoder, IefSpec
from cryosuite.nets.multiview import Multiview, MultiviewSpec
from cryosuite.nets.scunet import Scunet, ScunetSpec

COUNT, BOX = 12, 8
NUMPY_CODE = "cnumpy.f2py.capi_maps\ngetinit\n"  # a way through numpy to eval; refused by name


def star_text() -> bytes:
    """A star file of RELION 3.1: two optics groups, 12 rows."""
    head = "\n# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnVoltage #2\n_rlnImagePixelSize #3\n"
    head += "_rlnImageSize #4\n_rlnSphericalAberration #5\n_rlnAmplitudeContrast #6\n_rlnEvenZernike #7\n"
    rows = "".join(
        f"{i + 1:06d}@st.mrcs {1 + i % 2} {9000 + i}.5 {8900 + i} 12.5 {i}.25 -3.5 12 0.5 -0.25 {1 + i % 2} a_{i}.mrc\n"
        for i in range(COUNT)
    )
    names = ("ImageName", "OpticsGroup", "DefocusU", "DefocusV", "DefocusAngle", "AngleRot", "AngleTilt", "AnglePsi",
             "OriginXAngst", "OriginYAngst", "RandomSubset", "MicrographName")  # fmt: skip
    columns = "".join(f"_rln{name} #{i}\n" for i, name in enumerate(names, 1))
    optics = "1 300 1.5 8 2.7 0.1 [0.1,0,2.5]\n2 200 1.6 8 2.7 0.1 []\n"
    return f"{head}{optics}\n\ndata_particles\n\nloop_\n{columns}{rows}\n".encode()


def old_star_text() -> bytes:
    """The form of RELION 3.0: one table."""
    names = ["ImageName", "DefocusU", "DefocusV", "DefocusAngle", "Voltage", "SphericalAberration"]
    names += ["AmplitudeContrast", "DetectorPixelSize", "Magnification", "AngleRot", "AngleTilt", "AnglePsi"]
    names += ["OriginX", "OriginY"]
    columns = "".join(f"_rln{name} #{i}\n" for i, name in enumerate(names, 1))
    row = "9000 8900 10 300 2.7 0.1 5 33333.3 10 20 30 1 2\n"
    return f"\ndata_\n\nloop_\n{columns}{''.join(f'{i + 1}@st.mrcs {row}' for i in range(COUNT))}\n".encode()


def cs_array() -> np.ndarray:
    """A table with blob, alignments and CTF."""
    fields = [("uid", "<u8"), ("blob/path", "S12"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,)),
              ("blob/psize_A", "<f4"), ("blob/sign", "<f4"), ("alignments3D/pose", "<f4", (3,)),
              ("alignments3D/shift", "<f4", (2,)), ("alignments3D/psize_A", "<f4"), ("alignments3D/split", "<u4"),
              ("ctf/accel_kv", "<f4"), ("ctf/cs_mm", "<f4"), ("ctf/amp_contrast", "<f4"), ("ctf/df1_A", "<f4"),
              ("ctf/df2_A", "<f4"), ("ctf/df_angle_rad", "<f4"), ("ctf/phase_shift_rad", "<f4"),
              ("ctf/exp_group_id", "<u4")]  # fmt: skip
    array = np.zeros(COUNT, fields)
    array["uid"], array["blob/path"], array["blob/idx"] = np.arange(COUNT) + 7, b"st.mrcs", np.arange(COUNT)
    array["blob/shape"], array["blob/psize_A"], array["blob/sign"] = BOX, 1.5, -1
    array["alignments3D/psize_A"], array["ctf/accel_kv"], array["ctf/cs_mm"] = 1.5, 300, 2.7
    array["ctf/amp_contrast"], array["ctf/df1_A"], array["ctf/df2_A"] = 0.1, 9000, 8900
    return array


def file_of(write: object, name: str = "a") -> bytes:
    """The bytes that ``write(path)`` writes."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return path.read_bytes()


def images(count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, BOX, BOX)).astype(np.float32)


def _stack(path: Path) -> None:
    with StackWriter(path, COUNT, BOX, 1.5) as writer:
        writer.write(images())


def mrc_of(dtype: str, volumes: bool = False) -> bytes:
    """A map as mrcfile writes it, of any number type, or a stack of two volumes."""

    def write(path: Path) -> None:
        with mrcfile.new(path) as mrc:
            mrc.set_data((10 * images(6)).astype(dtype).reshape(*((2, 3) if volumes else (6,)), BOX, BOX))
            mrc.voxel_size = 1.5
            mrc.header.origin.x = 3.0
            mrc.set_extended_header(np.zeros(16, "V1"))

    return file_of(write, "a.mrc")


def model() -> gemmi.Structure:
    """Two residues, a water and an alternate location."""
    text = """\
ATOM      1  N   ALA A   5      11.104   6.134  -6.504  1.00  0.00           N
ATOM      2  CA AALA A   5      11.639   6.071  -5.147  0.60  1.00           C
ATOM      3  CA BALA A   5      11.739   6.171  -5.247  0.40  1.00           C
ATOM      4  P     G B   1       1.639   6.071  -5.147  1.00 20.00           P
HETATM    5  O   HOH A 101       0.000   0.000   0.000  1.00  0.00           O
HETATM    6 ZN    ZN A 102       2.000   0.000   0.000  1.00  0.00          ZN
END
"""
    return gemmi.read_pdb_string(text)


def pickles() -> list[bytes]:
    """Poses, CTF, indices, latents, labels in the forms and protocols that are about, and some that would run code."""
    pose = np.tile(np.eye(3, dtype=np.float32), (COUNT, 1, 1))
    table = np.tile(np.array([BOX, 1.5, 9000, 8900, 10, 300, 2.7, 0.1, 0], np.float32), (COUNT, 1))
    z = np.random.default_rng(0).normal(size=(COUNT, 2)).astype(np.float32)
    objects = [(pose, np.zeros((COUNT, 2), np.float32)), (pose,), table, np.arange(COUNT), list(range(COUNT)), z,
               np.asfortranarray(z), {"index": np.arange(COUNT), "optics_group": np.zeros(COUNT, np.int32)},
               [z, z], np.float32(3), np.array(["a", "b"]), {"dataset_args": {"particles": "x"}}]  # fmt: skip
    found = [pickle.dumps(value, protocol=protocol) for value in objects for protocol in (0, 2, 4, 5)]
    hostile = [b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", b"P0\n."]
    hostile += [NUMPY_CODE.encode() + b"(S'1'\ntR.", pickle.dumps(z) + b"cos\nsystem\n(S'true'\ntR."]
    return [*found, pickle.dumps(z) + pickle.dumps(z), *hostile]


def noise() -> list[bytes]:
    """Noise spectra of two optics groups, and whatever else."""
    return [pickle.dumps(np.ones((2, BOX // 2 + 1), kind)) for kind in (np.float32, np.float64)] + pickles()


def shares() -> list[bytes]:
    """A sparse table of classes."""
    parts = (np.ones(4, np.float32), np.arange(4, dtype=np.int32), np.array([0, 2, 4]), np.array([2, 4]))
    return [pickle.dumps(parts, protocol=protocol) for protocol in (2, 4)]


def torch_files() -> list[bytes]:
    """Checkpoints: zip and the old form, of tensors and of what asks for more."""
    state = {"format": 1, "model": {"a.weight": torch.zeros(3, 4)}, "epoch": 3}
    named = {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1.0)}
    found = []
    for said, zipped in ((state, True), (state, False), (named, True), ({"a": torch.ones(3).half()}, True)):
        stream = io.BytesIO()
        torch.save(said, stream, _use_new_zipfile_serialization=zipped)
        found.append(stream.getvalue())
    return [*found, b"\x80\x02cos\nsystem\n(S'true'\ntR."]


def weights() -> list[bytes]:
    """Safetensors: plain, and the kinds of weights of ours in small."""
    torch.manual_seed(0)
    plain = {"a": np.ones((2, 3), np.float32), "b": np.arange(5), "c": np.zeros((), np.float16)}
    spec = IefSpec("vit_8x1", dim=8, depth=1, heads=2, patch=14, image_size=28)
    said = {"task": "sharpen", "voxel": 1.5, "norm": "robust"}
    writers = [
        lambda path: write_safetensors(path, plain, {"kind": "x"}),
        lambda path: save_multiview(path, Multiview(MultiviewSpec(16, 8, 8, 1, 2, 8, 1, 2)), {"mode": "x"}),
        lambda path: save_map_weights(path, Scunet(ScunetSpec(d=4, head_dim=4, mlp=1)), **said),
        lambda path: save_encoder(path, IefEncoder(spec), "ief", 0.5, 0.2, {"command": "x"}),
    ]
    return [file_of(write, "a.safetensors") for write in writers]


def npz_files() -> list[bytes]:
    """What runs keep as npz: molecules, margins."""
    kept = {"key": np.array([1, 2]), "ends": np.array([3, 5]), "names": np.array(["a", "b"])}
    kept |= {"xyz": np.zeros((5, 3), np.float32), "number": np.ones(5, np.uint8), "residue": np.arange(5)}
    files = [kept, {"margin": np.zeros(COUNT, np.float32)}]
    return [file_of(lambda path, one=one: np.savez(path, **one), "a.npz") for one in files]


YAML = [
    b"a: 1\nb: [1, 2, {c: d}]\nlattice_args:\n  D: 65\n",
    b"sets:\n- {path: a.star, weight: 2.0}\n- path: b.cs\n  sign: -1\n  pixel_size: 1.5\n- work\n",
    b"pairs:\n- map: m.mrc\n  model: m.pdb\n  resolution: 3.4\n- {map: m.mrc, model: m.pdb}\n",
    b"x: &a [1, 2]\ny: *a\nz: !!python/object/apply:os.system ['true']\n",
    b"a: &a {b: 1, c: 2}\nd:\n  <<: *a\n  e: 2020-01-01\n  f: 1:30:00\n  g: .nan\n  h: 0o17\n  i: !!binary aGk=\n",
    b"? [a, b]\n: 1\n--- \n'q': \"\\x41\\u0041\"\n...\n",
]
CRYODRGN = {
    "cmd": ["train_vae"], "dataset_args": {"particles": "st.mrcs", "poses": "poses.pkl", "ctf": "ctf.pkl", "ind": None,
    "datadir": None, "norm": [0, 1], "invert_data": True, "keepreal": False}, "lattice_args": {"D": 9, "extent": 0.5},
    "model_args": {"zdim": 2, "qlayers": 3, "qdim": 8}, "seed": 0,
}  # fmt: skip
LASSO = {"kind": "cryosuite selection", "version": 1, "n_particles": COUNT, "run": "run", "epoch": 2, "rows": [1, 2, 5]}
CSV = b"map,model,resolution\nm.mrc,m.pdb,3.4\nm.mrc,m.pdb,\n"
METRICS = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25, "lr": 1e-3, "epoch": 1}\n'


def particles_csv() -> bytes:
    """A table as analyze leaves it."""
    rows = "".join(f"{i},{i},{i % 3},0.5,{i}.25,{9000 + i},m/a_{i}.mrc\n" for i in range(COUNT))
    return b"row,index,cluster,confidence,z1,defocus_u,micrograph\n" + rows.encode()


def gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def lasso() -> list[bytes]:
    return [json.dumps(LASSO).encode(), b"[1, 2, 3]", b"# rows\n1 2 3\n4, 5\n", b"# original indices\n1 2\n"]


def scene(folder: Path) -> Toy:
    """Files that belong together: stack, star, cs, pickles, map and model, a work folder, a run with an analysis."""
    folder.mkdir(parents=True, exist_ok=True)
    _stack(folder / "st.mrcs")
    (folder / "a.star").write_bytes(star_text())
    cs.write_cs(folder / "a.cs", cs_array())
    (folder / "poses.pkl").write_bytes(pickles()[0])
    (folder / "ctf.pkl").write_bytes(pickles()[8])
    write_map(folder / "m.mrc", np.pad(images(BOX), 2), 1.5)
    model().write_pdb(str(folder / "m.pdb"))
    work = WorkDir(folder / "work")
    work.path.mkdir(exist_ok=True)
    (work.path / "particles.mrcs").write_bytes((folder / "st.mrcs").read_bytes())
    opened = open_particles(folder / "a.star")
    write_work_files(work, opened, BOX, opened.pixel_size, np.ones((2, BOX // 2 + 1)), {"seed": 0})
    toy = make_run(folder / "run", work.path, COUNT)
    (toy.analysis.path / "particles.csv").write_bytes(particles_csv())
    return toy
