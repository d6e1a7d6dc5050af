"""Every reader of files from outside, each with the valid files that its hostile ones are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import hostile_seeds as seeds
import numpy as np
from hostile import judge

from cryosuite.analysis.columns import Columns
from cryosuite.analysis.report_read import read_analysis
from cryosuite.data.cryodrgn_run import read_cryodrgn_config
from cryosuite.data.cs_rows import cs_rows
from cryosuite.data.encoder_weights import load_encoder
from cryosuite.data.latents import read_umap
from cryosuite.data.map_grid import read_grid, write_like
from cryosuite.data.map_sets import read_pairs
from cryosuite.data.map_weights import load_map_encoder, load_map_weights
from cryosuite.data.multiview_weights import load_multiview, load_released
from cryosuite.data.open import open_particles
from cryosuite.data.select import rows_from
from cryosuite.data.source import open_source
from cryosuite.data.star_rows import star_rows
from cryosuite.data.truth import find_truth
from cryosuite.data.workdir import AnalysisDir, RunDir
from cryosuite.errors import InputError
from cryosuite.formats import cs, star
from cryosuite.formats.atoms import read_atoms
from cryosuite.formats.config import read_yaml, write_yaml
from cryosuite.formats.mrc import StackReader, read_map
from cryosuite.formats.pickles import (
    read_ctf,
    read_indices,
    read_labels,
    read_latent,
    read_poses,
    read_torch,
    safe_load,
    write_pickle,
)
from cryosuite.formats.safetensors import read_safetensors, read_safetensors_header
from cryosuite.methods.deco_auto import _read as read_trials
from cryosuite.methods.iev_run import list_sets
from cryosuite.metrics.oracle import read_cached
from cryosuite.reconstruct.weights import ClassWeights
from cryosuite.simulate.map_structures import _cached as read_molecules
from cryosuite.training.checkpoint import load_state
from cryosuite.training.logs import read_metrics
from cryosuite.training.runs import particles_path, read_run_config, train_options

Seeds = Sequence[bytes]


@dataclass(frozen=True)
class Reader:
    """A reader and its food.

    Attributes:
        name: where the file lies in the scene's folder. read: takes its path. seeds: makes valid files. words: that
            mean something to it. writes: it writes files too, beside the one it reads.
    """

    name: str
    read: Callable[[Path], object]
    seeds: Callable[[], Seeds]
    words: Seeds = ()
    writes: bool = False


def each(path: Path, *calls: Callable[[Path], object]) -> None:
    """Let all of them read the file, whatever the others say of it; the last refusal is passed on where all refuse."""
    read, refusal = 0, None
    for call in calls:
        try:
            call(path)
            read += 1
        except InputError as error:
            refusal = error
            judge(error)
    if refusal is not None and not read:
        raise refusal


def _stack(path: Path) -> None:
    def rows(path: Path) -> None:
        reader = StackReader(path, check=True)
        reader.read([reader.count - 1, 0])
        assert reader.read().shape == (reader.count, *reader.shape)

    each(path, rows, lambda path: open_particles(path, need_poses=False, need_ctf=False))


def _map(path: Path) -> None:
    def there_and_back(path: Path) -> None:
        grid = read_grid(path)
        write_like(path.with_name("out.mrc"), grid.data, grid)
        again = read_grid(path.with_name("out.mrc"))
        assert np.array_equal(again.data, grid.data) and np.allclose(again.voxel, grid.voxel, rtol=1e-3)

    each(path, read_map, there_and_back)


def _star_columns(path: Path) -> None:
    tables = star.particle_tables(path)
    star.images_from_star(tables)
    for call in (star.pixel_sizes_from_star, star.box_sizes_from_star, star.half_from_star, star.tubes_from_star):
        call(tables)
    star.poses_from_star(tables, 64, 1.5)
    star.ctf_from_star(tables, 64, 1.5, 300, 2.7, 0.1)


def _star_rewritten(path: Path) -> None:
    tables = star.read_star(path)
    out = path.with_name("out.star")
    star.write_star(out, tables)
    again = star.read_star(out)
    assert list(again) == list(tables), "blocks changed"
    for name, table in tables.items():
        assert again[name].shape == table.shape and list(again[name].columns) == list(table.columns), name


def _star(path: Path) -> None:
    def rows(path: Path) -> None:
        star_rows(path, need_poses=False, need_ctf=False)

    each(path, _star_columns, rows, open_particles, _star_rewritten)


def _cs(path: Path) -> None:
    def columns(path: Path) -> None:
        array = cs.read_cs(path)
        cs.images_from_cs(array, path)
        for call in (cs.box_sizes_from_cs, cs.pixel_sizes_from_cs, cs.sign_from_cs, cs.half_from_cs):
            call(array, path)
        cs.poses_from_cs(array, path, 64, 1.5)
        cs.ctf_from_cs(array, path, 64, 1.5)

    def joined(path: Path) -> None:
        cs.read_cs(path.with_name("a.cs"), passthrough=[path])

    def rows(path: Path) -> None:
        cs_rows(path, need_poses=False, need_ctf=False)

    each(path, columns, joined, rows, open_particles)


def _pickle(path: Path) -> None:
    def written(path: Path) -> None:
        for value in safe_load(path):
            if isinstance(value, np.ndarray):
                write_pickle(path.with_name("out.pkl"), value)

    readers = (read_poses, read_ctf, read_indices, read_labels, read_latent, written)
    each(path, *readers, lambda path: read_indices(path, seeds.COUNT))


def _with_pickles(path: Path) -> None:
    stack = path.with_name("st.mrcs")
    rest = {"poses": path.with_name("poses.pkl"), "ctf": path.with_name("ctf.pkl")}

    def given(option: str) -> Callable[[Path], object]:
        return lambda path: open_particles(stack, pixel_size=1.5, **rest | {option: path})

    each(path, given("poses"), given("ctf"), lambda path: open_particles(path.with_name("a.star"), ind=path))


def _torch(path: Path) -> None:
    each(path, read_torch, lambda path: load_state(path, "a checkpoint"), load_released)


def _yaml(path: Path) -> None:
    def rewritten(path: Path) -> None:
        try:
            write_yaml(path.with_name("out.yaml"), read_yaml(path))
        except TypeError as error:  # dates and sets have no form that we write
            assert str(error).startswith("cannot write a ")

    each(path, read_yaml, rewritten, lambda path: list_sets([path]), read_pairs)


def _dataset(path: Path) -> None:
    each(path, lambda path: open_particles(path.parent), lambda path: find_truth(path.parent))


def _rows_of_work(path: Path) -> None:
    open_particles(path.parent)


def _run_config(path: Path) -> None:
    def options(path: Path) -> None:
        run = RunDir(path.parent)
        config = read_run_config(run)
        train_options(config)
        particles_path(config, run)

    each(path, options, lambda path: RunDir(path.parent).read_config(), lambda path: open_source(path.parent),
         lambda path: read_cryodrgn_config(path.parent), lambda path: find_truth(path.parent))  # fmt: skip


def _summary(path: Path) -> None:
    z = np.random.default_rng(0).normal(size=(seeds.COUNT, 3)).astype(np.float32)

    def centres(path: Path) -> None:
        source = open_source(path.parent)
        source.centre_row(0)

    each(path, lambda path: read_analysis(AnalysisDir(path.parent), z), centres)


def _umap(path: Path) -> None:
    read_umap(AnalysisDir(path.parent), seeds.COUNT)


def _latents(path: Path) -> None:
    open_source(path.parent)


def _list_of_stacks(path: Path) -> None:
    each(path, star.read_stack_list, lambda path: open_particles(path, need_poses=False, need_ctf=False))


def _table_of_particles(path: Path) -> None:
    source = SimpleNamespace(
        analysis=AnalysisDir(path.parent), labels=None, labels_from=None, z=None, particles=range(seeds.COUNT)
    )
    columns = Columns(source)
    columns._made, columns._file = {}, {}
    names = columns.names()
    each(path, *(lambda _, name=name: columns(name) for name in names[:12]))


def _safetensors(path: Path) -> None:
    each(path, read_safetensors_header, read_safetensors, load_multiview, load_map_weights, load_map_encoder,
         load_encoder)  # fmt: skip


def _records(path: Path) -> None:
    read_metrics(path)
    read_trials(path)
    read_cached(path, {"a": 1})


def _shares(path: Path) -> None:
    ClassWeights.from_arrays(safe_load(path)[0], str(path))


def _npz(path: Path) -> None:
    read_molecules(path, np.array([1, 2]))


def _jsons() -> list[bytes]:
    return [seeds.METRICS, json.dumps({"1": [0.5, 0.25]}).encode(), b'{"c3d8cb0a": {"scores": {"a": 1}}}']


RELION = (b"_rlnImageName", b"_rlnDefocusU", b"_rlnMagnification", b"_rlnDetectorPixelSize", b"_rlnOriginX",
          b"_rlnOpticsGroup", b"_rlnCtfDataAreCtfPremultiplied", b"_rlnEvenZernike", b"_rlnMagMat00", b"data_optics",
          b"data_particles", b"_rlnRandomSubset", b"_rlnHelicalTubeID", b"_rlnBeamTiltX", b"[1,2]")  # fmt: skip
KEYS = (b"path:", b"sets:", b"pairs:", b"particles:", b"method:", b"dataset_args:", b"pixel_size:", b"truth:", b"mask:")
DATASET = b"truth: {mask: m.mrc, labels: labels.pkl, volumes: [v.mrc]}\nctf_premultiplied: false\n"


def _work_yaml() -> list[bytes]:
    text = b"kind: preprocessed\nsource: /x/a.star\nsource_relative: ../a.star\npixel_size: 1.5\nbox_size: 8\n"
    text += b"n_particles: 12\noptics_groups: 2\npassthrough: [/x/b.cs]\ninvert: false\ndatadir: /x\n"
    return [text, text + DATASET]


def _run_yaml() -> list[bytes]:
    text = b"method: hype\nparticles: ../work\nparticles_relative: ../work\noptions: {zdim: 3}\nposes_found: false\n"
    import yaml

    return [text + b"train: {epochs: 2, seed: 0}\nversion: 1\n", yaml.safe_dump(seeds.CRYODRGN).encode()]


def _summary_yaml() -> list[bytes]:
    return [
        b"kind: analysis\nrun: ..\nepoch: 2\nn_particles: 12\nlatents: abc\nkmeans: {clusters: 3, folder: kmeans3, "
        b"colours: ['#112233', '#112233', '#112233'], levels: [0.1, 0.2, 0.3]}\ngmm: {groups: 2}\n"
        b"volumes: {start_index: 1}\n"
    ]


def _rows_pickle() -> list[bytes]:
    import pickle

    table = {"index": np.arange(12), "optics_group": np.zeros(12, np.int32), "half": np.arange(12) % 2}
    table |= {"bfactor": np.zeros(12, np.float32), "even_zernike": np.zeros((12, 3), np.float32)}
    return [pickle.dumps(table), *seeds.pickles()]


READERS: dict[str, Reader] = {
    "mrcs": Reader("x.mrcs", _stack, lambda: [seeds.file_of(seeds._stack, "a.mrcs"), seeds.mrc_of("i2")]),
    "mrc": Reader("x.mrc", _map, lambda: [seeds.mrc_of(kind) for kind in ("f4", "i1", "i2", "u2", "f2", ">f4")]
                  + [seeds.mrc_of("f4", True)], writes=True),
    "mrc.gz": Reader("x.mrc.gz", _map, lambda: [seeds.gz(seeds.mrc_of("f4")), seeds.gz(seeds.mrc_of("i1"))],
                     writes=True),
    "star": Reader("x.star", _star, lambda: [seeds.star_text(), seeds.old_star_text()], RELION, writes=True),
    "cs": Reader("x.cs", _cs, lambda: [seeds.file_of(lambda path: cs.write_cs(path, seeds.cs_array()), "a.cs")],
                 (b"'descr'", b"'<f4'", b"'|O'", b"'blob/path'", b"(2,)", b"'alignments3D/pose'", b"'ctf/df1_A'")),
    "pkl": Reader("x.pkl", _pickle, seeds.pickles, writes=True),
    "poses, ctf, ind": Reader("x.pkl", _with_pickles, seeds.pickles),
    "pt": Reader("x.pt", _torch, seeds.torch_files),
    "yaml": Reader("x.yaml", _yaml, lambda: seeds.YAML, KEYS, writes=True),
    "dataset.yaml": Reader("work/dataset.yaml", _dataset, _work_yaml, KEYS),
    "rows.pkl": Reader("work/rows.pkl", _rows_of_work, _rows_pickle),
    "noise.pkl": Reader("work/noise.pkl", _rows_of_work, seeds.noise),
    "config.yaml": Reader("run/config.yaml", _run_config, _run_yaml, KEYS),
    "z.pkl": Reader("run/z.2.pkl", _latents, seeds.pickles),
    "analyze.yaml": Reader("run/analyze.2/analyze.yaml", _summary, _summary_yaml, KEYS),
    "umap.pkl": Reader("run/analyze.2/umap.pkl", _umap, seeds.pickles),
    "txt": Reader("x.txt", _list_of_stacks, lambda: [b"st.mrcs\n# x\nst.mrcs\n", b"\xef\xbb\xbfst.mrcs\r\n"]),
    "lasso.json": Reader("x.json", lambda path: rows_from(path, seeds.COUNT, "run", 2), seeds.lasso,
                         (b'"rows"', b'"version"', b'"n_particles"', b'"run"', b"true", b"1e3", b"NaN")),
    "csv": Reader("x.csv", read_pairs, lambda: [seeds.CSV], (b"map", b"model", b"resolution", b"m.mrc", b"m.pdb")),
    "particles.csv": Reader("run/analyze.2/particles.csv", _table_of_particles, lambda: [seeds.particles_csv()]),
    "jsonl": Reader("metrics.jsonl", _records, _jsons, (b'"step"', b"NaN", b"Infinity", b"1e999", b'"scores"')),
    "p.pkl": Reader("x.pkl", _shares, seeds.shares),
    "npz": Reader("x.npz", _npz, seeds.npz_files),
    "safetensors": Reader("x.safetensors", _safetensors, seeds.weights,
                          (b'"dtype":"F32"', b'"shape":[', b'"data_offsets":[', b'"__metadata__"', b'"spec"')),
    "pdb": Reader("x.pdb", read_atoms, lambda: [seeds.model().make_pdb_string().encode()],
                  (b"HETATM", b"ATOM  ", b"MODEL", b"CONECT", b"CRYST1")),
    "cif": Reader("x.cif", read_atoms, lambda: [seeds.model().make_mmcif_document().as_string().encode()],
                  (b"_atom_site.id", b"loop_", b"data_x", b"_cell.length_a", b"_entity.id")),
    "cif.gz": Reader("x.cif.gz", read_atoms,
                     lambda: [seeds.gz(seeds.model().make_mmcif_document().as_string().encode())]),
}  # fmt: skip
