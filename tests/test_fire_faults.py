"""Stacks that vanish under a running training, and memory that runs out: one sentence, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import training_toy

from cryosuite.data.open import open_particles
from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir
from cryosuite.errors import FileError, InputError, UserNotice
from cryosuite.formats.mrc import StackWriter
from cryosuite.kernels.memory import Portions, out_of_memory
from cryosuite.methods import LoadedRun, _within_memory
from cryosuite.training.checkpoint import load_state
from cryosuite.training.inference import encode_all
from cryosuite.training.loop import FitResult, fit

OOM = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB"


def write_stack(path: Path, count: int) -> None:
    images = training_toy.toy_particles(100).read(np.arange(100))
    with StackWriter(path, count, training_toy.BOX, 2.0) as writer:
        writer.write(images[:count])


def particles_of(path: Path) -> ParticleSet:
    return open_particles(path, need_poses=False, need_ctf=False)


def trained(run: Path, stack: Path, method: training_toy.Toy | None = None, resume: bool = False) -> FitResult:
    options = training_toy.options(epochs=3, checkpoint_every_minutes=60)
    return fit(method or training_toy.Toy(), particles_of(stack), RunDir(run), options, resume=resume)


class Disaster(training_toy.Toy):
    """Something happens to the stack at the tenth step, in the second epoch."""

    def __init__(self, happens) -> None:
        super().__init__()
        self.happens = happens

    def loss(self, model, batch, step):
        if step.index == 9:
            self.happens()
        return super().loss(model, batch, step)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_shorter(path: Path) -> None:
    write_stack(path.with_name("other.mrcs"), 40)
    os.replace(path.with_name("other.mrcs"), path)


def overwrite_by_shorter(path: Path) -> None:
    write_stack(path.with_name("other.mrcs"), 40)
    path.write_bytes(path.with_name("other.mrcs").read_bytes())


def unplug(path: Path) -> None:
    """Removed, and no descriptor open any more, as with more stacks than files that are kept open."""
    particles_of(path).read(np.arange(1))
    path.unlink()


@pytest.mark.parametrize("happens", [truncate, replace_by_shorter, overwrite_by_shorter, unplug])
def test_a_stack_that_vanishes_is_one_sentence_and_a_checkpoint(
    tmp_path: Path, happens, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cryosuite.formats import stacks

    monkeypatch.setattr(stacks, "_FILES", stacks._OpenFiles(0))  # every read opens the file anew
    stack = tmp_path / "p.mrcs"
    write_stack(stack, 100)
    kept = stack.read_bytes()
    undisturbed = trained(tmp_path / "undisturbed", stack)
    with pytest.raises(InputError, match=r"p\.mrcs: .*checkpoint of step 14 was written: go on with --resume"):
        trained(tmp_path / "run", stack, Disaster(lambda: happens(stack)))
    assert load_state(RunDir(tmp_path / "run").checkpoint, "a checkpoint")["place"]["step"] == 14
    stack.write_bytes(kept)
    again = trained(tmp_path / "run", stack, resume=True)
    for name, tensor in undisturbed.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_a_stack_that_vanishes_before_the_first_step_leaves_no_checkpoint(tmp_path: Path) -> None:
    write_stack(tmp_path / "p.mrcs", 100)

    class Early(training_toy.Toy):
        def build(self, particles):
            truncate(tmp_path / "p.mrcs")
            return super().build(particles)

    with pytest.raises(FileError, match=r"p\.mrcs: the file became shorter"):
        trained(tmp_path / "run", tmp_path / "p.mrcs", Early())
    assert not RunDir(tmp_path / "run").checkpoint.exists()


@pytest.mark.parametrize("error", [FileError("p.mrcs: the file became shorter"), InputError("too few particles")])
def test_polishing_forgives_few_particles_but_no_lost_file(
    tmp_path: Path, error: InputError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends without its maps because a stack was away would be taken for a finished one."""
    from cryosuite.methods import deco_finish

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(deco_finish, "polish_to", fail)
    run = LoadedRun("deco", None, np.zeros((4, 2), np.float32), 1, 1.0, 4, None, {})
    labels = np.array([0, 0, 1, 1])
    if isinstance(error, FileError):
        with pytest.raises(FileError, match="became shorter"):
            deco_finish._polish(RunDir(tmp_path), run, labels)
    else:
        with pytest.warns(UserNotice, match="no maps were polished: too few particles"):
            assert deco_finish._polish(RunDir(tmp_path), run, labels) == {}


@pytest.mark.slow
def test_preprocess_of_a_stack_cut_short_ends_with_code_2(tmp_path: Path) -> None:
    """Not by SIGBUS, as a mapped file would; and nothing is left in the work folder."""
    stack = tmp_path / "p.mrcs"
    write_stack(stack, 100)
    code = (
        "import os, sys\n"
        "from cryosuite.data import preprocess\n"
        "before = preprocess._prepare\n"
        "def cut(*arguments):\n"
        "    os.truncate(sys.argv[2], 5000)\n"
        "    return before(*arguments)\n"
        "preprocess._prepare = cut\n"
        "sys.argv[1:2] = []\n"
        "from cryosuite.cli import main\n"
        "sys.argv = ['cryosuite', 'preprocess', sys.argv[1], '-o', sys.argv[2]]\n"
        "main()\n"
    )
    words = [sys.executable, "-c", code, "-", str(stack), str(tmp_path / "work")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "p.mrcs: the file became shorter while it was read" in " ".join(done.stderr.split())
    assert not any((tmp_path / "work").iterdir())


# --- memory


class Hungry(training_toy.Toy):
    """A method whose memory is good for so many images at a time."""

    most = 8

    def encode(self, model, batch):
        if len(batch.index) > self.most:
            raise torch.OutOfMemoryError(OOM)
        return super().encode(model, batch)


def test_encoding_goes_on_with_half_as_many_images() -> None:
    particles, method = training_toy.toy_particles(), Hungry()
    model = method.build(particles)
    whole = encode_all(training_toy.Toy(), model, particles, 32, progress=False)
    with pytest.warns(UserNotice, match="out of memory with 32 images at a time: going on with 16"):
        found = encode_all(method, model, particles, 32, progress=False)
    assert np.allclose(found, whole, atol=1e-6) and found.shape == (100, 3)
    method.most = 0
    with pytest.raises(InputError, match="not enough memory for one of the images"), pytest.warns(UserNotice):
        encode_all(method, model, particles, 32, progress=False)


def test_decoding_goes_on_with_half_as_many_volumes() -> None:
    asked = []

    def decode(points: np.ndarray) -> np.ndarray:
        asked.append(len(points))
        if len(points) > 3:
            raise torch.OutOfMemoryError(OOM)
        return np.repeat(points[:, :1, None, None], 4, axis=1)

    z = np.arange(20, dtype=np.float32).reshape(10, 2)
    run = _within_memory(LoadedRun("toy", None, z, 1, 1.0, 4, decode, {}))
    with pytest.warns(UserNotice, match="with 5 volumes at a time: going on with 2"):
        found = run.decode(z)
    assert np.array_equal(found[:, 0, 0, 0], z[:, 0]) and asked == [10, 5, 2, 2, 2, 2, 2]
    assert run.decode(z[0]).shape == (1, 4, 1, 1) and run.decode(z[:4]).shape[0] == 4
    assert asked[7:] == [1, 2, 2], "the smaller portion is remembered"


def test_a_pose_network_answers_in_halves() -> None:
    from cryosuite.methods.fastar_predict import Answer, _Portions

    class Small(_Portions):
        def __init__(self) -> None:
            self.portions = Portions("images")

        def answer(self, images):
            if len(images) > 3:
                raise torch.OutOfMemoryError(OOM)
            own = images[:, 0, 0, 0]
            return Answer(own[:, None, None].expand(-1, 3, 3), own[:, None], own[:, None, None, None], own, -own)

    images = torch.arange(10.0)[:, None, None, None].expand(-1, 1, 4, 4)
    with pytest.warns(UserNotice, match="with 5 images at a time: going on with 2"):
        found = Small()(images, torch.arange(10))
    assert torch.equal(found.score, torch.arange(10.0)) and found.rotation.shape == (10, 3, 3)
    assert torch.equal(found.margin, -found.score) and found.rivals.shape == (10, 1, 1, 1)


def test_portions_are_all_rows_once_whatever_fails_on_the_way() -> None:
    limit = {"most": 7}

    def work(rows: slice) -> int:
        limit["most"] -= 1  # memory shrinks as somebody else fills it
        if rows.stop - rows.start > max(limit["most"], 1):
            raise MemoryError
        return rows.stop - rows.start

    with pytest.warns(UserNotice):
        parts = list(Portions("rows", 6).over(work, 23))
    assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == list(range(23))
    assert all(count == rows.stop - rows.start for rows, count in parts)
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(Portions("rows").over(lambda rows: (_ for _ in ()).throw(RuntimeError("shapes differ")), 3))


def test_memory_is_known_by_its_many_names() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError(OOM),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ):
        assert out_of_memory(error), error
    for error in (RuntimeError("shapes differ"), ValueError("out of memory"), OSError(12, "no")):
        assert not out_of_memory(error)


def test_where_images_are_compared_with_each_other_smaller_pieces_are_said_to_matter(tmp_path: Path) -> None:
    class Compared(training_toy.Toy):
        compares_images = True

        def loss(self, model, batch, step):
            if len(batch.index) > 8:
                raise RuntimeError("CUDA error: out of memory")
            return super().loss(model, batch, step)

    with pytest.warns(UserNotice, match="2 pieces of 8 images; images are then compared within a piece only"):
        training_toy.train(tmp_path, Compared())


def test_a_command_without_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from cryosuite import cli

    for error, words in (
        (torch.OutOfMemoryError(OOM), "the GPU has not enough memory for this step (CUDA out of memory)"),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), "the GPU has not enough memory for this step (cuFFT error:"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), "the GPU has not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "this machine has not enough memory"),
        (MemoryError(), "this machine has not enough memory"),
    ):

        def fail(error: BaseException = error, **_: object) -> None:
            raise error

        monkeypatch.setattr(cli, "app", fail)
        monkeypatch.setattr(sys, "argv", ["cryosuite", "analyze", "run"])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = " ".join(capsys.readouterr().err.split())
        assert left.value.code == 2 and words in said and "Traceback" not in said
