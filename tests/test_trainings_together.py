"""Every training command in two processes learns what it learns in one: the same losses, latents in the same order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forked import one_and_two, together
from hype_toy import blob_particles, blobs
from test_commands_pretrain_lvm import SHORT as LVM
from test_commands_train_fastar import TINY
from test_methods_iev import SMALL

from cryosuite.data import encoder_cache
from cryosuite.data.workdir import RunDir
from cryosuite.formats.mrc import write_map
from cryosuite.formats.pickles import read_latent, write_pickle
from cryosuite.formats.stacks import StackWriter
from cryosuite.methods import fastar_target, fastar_validate, lvm_validate
from cryosuite.nets import ief
from cryosuite.nets.multiview import SPECS
from cryosuite.ranks import process_rank
from cryosuite.simulate import pool
from cryosuite.training.logs import read_metrics

pytestmark = pytest.mark.slow
N, D = 78, 16  # 78 = 4 * 16 + 14: the last batch is short
HYPE = ["--dim", 16, "--depth", 1, "--heads", 2, "--patch", 4, "--groups", 2, "--inr-dim", 16, "--inr-layers", 2,
        "--knn", 4, "-n", 2, "-b", 16, "--log-interval", 1, "--precision", 32, "--reading", "halves"]  # fmt: skip
DECO = ["--encoder", "random", "--encoder-size", "micro", "--zdim", 4, "--dim", 32, "--layers", 1, "--features", 16,
        "--precision", 32, "-n", 2, "-b", 16, "-k", 2, "--cluster", "gmm-direct"]  # fmt: skip
NET = ["--field", "triplane", "--n-codes", 3, "--rank", 3, "-n", 2, "-b", 16, "--em-finish", 2, "--width", 16]
IEV = ["--preset", "tiny", "--images", 32, "--every", 16, "-b", 8, "--views", 4, "--simulate", "phantom:4",
       "--hold-out", 2, "--Apix", 6, "--precision", 32]  # fmt: skip
FASTAR = ["--preset", "micro", "--images", 64, "--every", 32, "-b", 16, "--views", "3:8"]
CPU = ["--accelerator", "cpu"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Path:
    """particles.mrcs with poses.pkl and ctf.pkl: two molecules in turn; a work folder of them; a map of one."""
    folder = tmp_path_factory.mktemp("stack")
    particles, _ = blob_particles([blobs(D, 0), blobs(D, 1)], N, noise=0.3)
    with StackWriter(folder / "particles.mrcs", N, D, 6.0) as writer:
        writer.write(particles.read(np.arange(N)))
    write_pickle(folder / "poses.pkl", (particles.rotation, particles.shift))
    write_pickle(folder / "ctf.pkl", particles.ctf)
    write_map(folder / "ref.mrc", blobs(D, 0).numpy(), 6.0)
    posed = ["--poses", folder / "poses.pkl", "--ctf", folder / "ctf.pkl"]
    (made,) = together(folder / "said", ["preprocess", folder / "particles.mrcs", *posed, "-o", folder / "work"], 1)
    assert made.code == 0, made.err
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are tinier than the smallest, and less to test them on."""
    monkeypatch.setitem(ief.SPECS, "vit_tiny", SMALL)
    monkeypatch.setitem(SPECS, "micro", TINY)
    monkeypatch.setattr(fastar_validate, "GRID", 0)
    monkeypatch.setattr(fastar_target, "FEWEST", 50)
    monkeypatch.setattr(lvm_validate, "EACH", 1)


def words(name: str, stack: Path) -> list[object]:
    """A training of seconds."""
    posed = [stack / "particles.mrcs", "--poses", stack / "poses.pkl", "--ctf", stack / "ctf.pkl"]
    return {
        "hype": ["train-hype", *posed, *HYPE, *CPU],
        "kraqen": ["train-kraqen", *posed, *NET, *CPU],
        "voxel": ["train-kraqen", *posed, "--n-codes", 3, "-i", 4, *CPU],
        "deco": ["deco-classify", *posed, *DECO, *CPU],
        "iev": ["pretrain-iev", stack / "particles.mrcs", *IEV, *CPU],
        "fastar": ["train-fastar", *FASTAR, *CPU],
        "fastar-star": ["train-fastar", *FASTAR, "--mode", "ab-initio", *CPU],
        "fastar-real": ["train-fastar", *FASTAR, "--map", stack / "ref.mrc", "--finetune", stack / "work", *CPU],
        "jepa": ["pretrain-lvm", *LVM, "--precision", 32],
        "lvm": ["train-lvm", "--task", "sharpen", *LVM, "--precision", 32],
    }[name]


@pytest.mark.parametrize(
    "name", ["hype", "kraqen", "voxel", "deco", "iev", "fastar", "fastar-star", "fastar-real", "jepa", "lvm"]
)
def test_two_processes_learn_what_one_learns(name: str, stack: Path, tmp_path: Path) -> None:
    runs = [RunDir(run) for run in one_and_two(tmp_path, words(name, stack))]
    one, two = (read_metrics(run.metrics) for run in runs)
    assert [line["step"] for line in one] == [line["step"] for line in two] and len(one) >= 1
    for a, b in zip(one, two, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-4), (a, b)
        assert sorted(a) == sorted(b)
    if name not in ("iev", "fastar", "fastar-star", "fastar-real", "jepa", "lvm"):
        last = runs[0].last_epoch()
        z, other = (read_latent(run.z(last))[0] for run in runs)
        assert z.shape == other.shape and len(z) == N
        np.testing.assert_allclose(z, other, rtol=1e-3, atol=2e-3 * np.abs(z).max())
        assert np.abs(z - z[::-1]).max() > 0.05 * np.abs(z).max()  # in another order they would not be equal


def test_images_kept_for_an_encoder_are_prepared_once(
    stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pretrain-iev --cache: each process prepares its part, the first makes projections, before the training."""
    original = encoder_cache.read_encoder_images

    def reading(particles, rows: np.ndarray, *rest: object) -> tuple[np.ndarray, np.ndarray]:
        with open(tmp_path / f"read{process_rank()}", "a") as file:
            print(*rows, file=file)
        return original(particles, rows, *rest)

    project = pool._project

    def projecting(*arguments: object) -> None:
        (tmp_path / f"projected{process_rank()}").touch()
        project(*arguments)

    monkeypatch.setattr(pool, "_project", projecting)
    monkeypatch.setattr(encoder_cache, "read_encoder_images", reading)
    monkeypatch.setattr(encoder_cache, "CHUNK_BYTES", 4 * D * D * 10)
    ended = together(tmp_path / "said", [*words("iev", stack), "--cache", "-o", tmp_path / "run"])
    assert [one.code for one in ended] == [0, 0], ended[0].err
    parts = [np.array((tmp_path / f"read{rank}").read_text().split(), int) for rank in (0, 1)]
    assert np.concatenate(parts).tolist() == list(range(N)) and min(map(len, parts)) >= 30
    assert [path.name for path in tmp_path.glob("projected*")] == ["projected0"]


@pytest.mark.parametrize("name", ["hype", "kraqen", "deco", "iev", "fastar", "jepa", "lvm"])
def test_a_folder_that_the_first_process_refuses_ends_all(name: str, stack: Path, tmp_path: Path) -> None:
    """Under srun nobody ends a process that waits for the first one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("method: other\n")
    found = together(tmp_path / "said", [*words(name, stack), "-o", tmp_path / "run"], ended=False)
    assert [one.code for one in found] == [2, 2], found
    assert "holds a run already" in found[0].err and "Traceback" not in found[1].err, found
    assert (tmp_path / "run" / "config.yaml").read_text() == "method: other\n"
