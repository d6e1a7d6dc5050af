"""Tables learnt row by row: alone, in a training that stops and goes on, and in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import training_toy
from pretend_gpu import pretend_gpu
from torch import Tensor, nn
from training_toy import Toy, options, toy_particles

from cryosuite.data.particles import ParticleSet
from cryosuite.data.workdir import RunDir
from cryosuite.errors import InputError
from cryosuite.training import table as training_table
from cryosuite.training.checkpoint import load_state, save_state
from cryosuite.training.loop import fit
from cryosuite.training.table import Table

BETAS = (0.9, 0.999)


class Offsets(Toy):
    """The toy with a learnt offset of the latent per particle; some are written anew in the middle."""

    name = "offsets"

    def build(self, particles: ParticleSet) -> nn.Module:
        model = super().build(particles)
        model.table = Table({"a": torch.zeros(len(particles), 2), "b": torch.zeros(len(particles), 1)}, 3.0)
        model.not_sent_around = [f"table.{name}" for name, _ in model.table.named_buffers()]
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict]:
        return [{"params": list(model.parameters())}]

    def loss(self, model: nn.Module, batch, step) -> dict[str, Tensor]:
        if step.index == 9:
            model.table.set(torch.arange(5, device=batch.index.device), {"a": torch.full((5, 2), 0.5)})
        flat = batch.images.flatten(1)
        z = model[0](flat) + torch.cat(model.table.take(batch.index), 1)
        return {"loss": (model[1](z) - flat).square().mean()}


def train(run: Path, epochs: int = 3, n: int = 101, resume: bool = False, method: Toy | None = None, **changed):
    """A training with a table; 101 images in batches of 20: in the last batch there is one."""
    torch.set_num_threads(1)
    chosen = options(epochs=epochs, batch_size=20, **changed)
    return fit(method or Offsets(), toy_particles(n), RunDir(run), chosen, resume=resume).model


def descend(table: Table, index: Tensor, gradient: Tensor, lr: float = 0.01) -> None:
    """One step in which the rows have these gradients (b, 3)."""
    (sum(table.take(index)) * gradient).sum().backward()
    table.gather(len(index))
    table.step(lr, BETAS)
    table.drop()


def test_a_row_follows_its_own_adam() -> None:
    """It moves as a parameter of its own would that is only stepped when it is seen; rows not seen stay."""
    torch.manual_seed(0)
    start = torch.randn(6, 3)
    table = Table({"a": start})
    alone = [nn.Parameter(row.clone()) for row in start]
    adams = [torch.optim.Adam([row], 0.01, BETAS) for row in alone]
    for seen in ([1, 4], [4, 2], [4], [1, 2, 4], [4, 1]):
        gradient = torch.randn(len(seen), 3) * 10 ** torch.randint(-3, 3, (len(seen), 1))
        before = table.a.clone()
        descend(table, torch.tensor(seen), gradient)
        for row, own in zip(seen, gradient, strict=True):
            alone[row].grad = own.clone()
            adams[row].step()
        others = [row for row in range(6) if row not in seen]
        assert torch.equal(table.a[others], before[others])
    torch.testing.assert_close(table.a, torch.stack([row.detach() for row in alone]), rtol=1e-5, atol=1e-7)
    assert table.steps.tolist() == [0, 3, 2, 0, 5, 0]


def test_a_row_that_occurs_twice_gets_the_sum() -> None:
    """As one gradient of one row; the norm that is clipped by counts it once."""
    torch.manual_seed(0)
    twice, once = Table({"a": torch.zeros(4, 3)}), Table({"a": torch.zeros(4, 3)})
    gradient = torch.randn(3, 3)
    for _ in range(2):
        descend(twice, torch.tensor([2, 0, 2]), gradient)
        descend(once, torch.tensor([0, 2]), torch.stack([gradient[1], gradient[0] + gradient[2]]))
    torch.testing.assert_close(twice.a, once.a)
    assert twice.steps.tolist() == [2, 0, 2, 0]
    (twice.take(torch.tensor([2, 0, 2]))[0] * gradient).sum().backward()
    norm = nn.utils.clip_grad_norm_([twice.gather(3)], 1e9)
    assert float(norm) == pytest.approx(
        float((gradient[1].square().sum() + (gradient[0] + gradient[2]).square().sum()).sqrt())
    )


def test_a_row_that_is_written_begins_anew() -> None:
    """Its next step is an Adam's first one: as long as the learning rate."""
    table = Table({"a": torch.zeros(3, 3)})
    for _ in range(4):
        descend(table, torch.tensor([0, 1]), torch.ones(2, 3))
    table.set(torch.tensor([1]), {"a": torch.zeros(1, 3)})
    moved = table.a[0].clone()
    descend(table, torch.tensor([0, 1]), -torch.ones(2, 3))
    torch.testing.assert_close(table.a[1], torch.full((3,), 0.01))
    assert (table.a[0] - moved).abs().max() < 0.009 and table.steps.tolist() == [5, 1, 0]


def test_a_training_goes_on_exactly(tmp_path: Path) -> None:
    """Rows and what is known of how they move are in the checkpoint, not in the weights."""
    whole = train(tmp_path / "whole", epochs=4)
    cut = Offsets()
    inner = cut.loss

    def loss(model, batch, step):
        if step.index == 8:
            raise KeyboardInterrupt
        return inner(model, batch, step)

    cut.loss = loss
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", epochs=4, method=cut, checkpoint_every_minutes=0)
    again = train(tmp_path / "cut", epochs=4, resume=True, checkpoint_every_minutes=0)
    assert torch.equal(again.table.a, whole.table.a) and torch.equal(again.table.b, whole.table.b)
    assert whole.table.a.abs().min() > 0
    weights = load_state(RunDir(tmp_path / "whole").weights(4), "weights")["model_state_dict"]
    assert {name for name in weights if name.startswith("table")} == {"table.a", "table.b"}
    assert torch.equal(weights["table.a"], whole.table.a)


def test_pieces_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    whole, pieces = (train(tmp_path / str(n), micro_batches=n) for n in (1, 3))
    torch.testing.assert_close(pieces.table.a, whole.table.a, rtol=1e-3, atol=1e-5)
    for name, value in whole.named_parameters():
        torch.testing.assert_close(pieces.get_parameter(name), value, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::cryosuite.errors.UserNotice")
def test_memory_that_runs_out_leaves_no_rows_behind(tmp_path: Path) -> None:
    """The step is taken anew with the batch in two pieces; rows of the first attempt do not count."""
    method, failed = Offsets(), []
    inner = method.loss

    def loss(model, batch, step):
        losses = inner(model, batch, step)
        if step.index == 7 and not failed:
            failed.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    method.loss = loss
    whole, halved = train(tmp_path / "whole"), train(tmp_path / "halved", method=method)
    assert failed and torch.equal(halved.table.steps, whole.table.steps)
    torch.testing.assert_close(halved.table.a, whole.table.a, rtol=1e-3, atol=1e-5)


def test_clipping_counts_the_rows(tmp_path: Path) -> None:
    """All gradients, of parameters and rows, are made smaller by one factor."""
    norms = []
    real = nn.utils.clip_grad_norm_

    def clip(parameters, most):
        parameters = list(parameters)
        norms.append((len(parameters), float(real(parameters, most)), [float(p.grad.norm()) for p in parameters]))
        return torch.tensor(norms[-1][1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", clip)
        train(tmp_path, epochs=1, grad_clip=0.01)
    for count, norm, parts in norms:
        assert count == 5 and norm > 0.01
        assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(0.01, rel=1e-3) and parts[4] > 0


def test_a_checkpoint_from_before_is_told(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    path = RunDir(tmp_path).checkpoint
    state = load_state(path, "a checkpoint")
    del state["tables"]
    save_state(path, state)
    with pytest.raises(InputError, match="earlier cryosuite"):
        train(tmp_path, epochs=2, resume=True)


def test_on_a_gpu(tmp_path: Path) -> None:
    """Everything stays on the device, and is what the processor finds."""
    here = train(tmp_path / "cpu", epochs=2, precision="32")
    with pretend_gpu():
        gpu = train(tmp_path / "gpu", epochs=2, precision="32", accelerator="gpu")
        assert gpu.table.a.is_cuda and gpu.table.mean.is_cuda
        found = gpu.table.a.cpu()
        train(tmp_path / "gpu", epochs=3, precision="32", accelerator="gpu", resume=True)
    torch.testing.assert_close(found, here.table.a, rtol=1e-3, atol=1e-5)


def test_gradients_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with two rows and one: the mean of what both found, for the norm and for the rows of both."""
    torch.manual_seed(0)
    gradient = torch.randn(3, 3)
    tables = [Table({"a": torch.zeros(5, 3)}) for _ in range(3)]
    descend(tables[2], torch.tensor([3, 1, 4]), gradient)
    mine = [
        (torch.tensor([3, 4]), 2 * gradient[[0, 2]]),
        (torch.tensor([1, 1]), 2 * torch.stack([gradient[1], torch.zeros(3)])),
    ]
    monkeypatch.setattr(training_table, "world", lambda: (0, 2))

    def of_all(values: Tensor, processes: int) -> Tensor:
        return torch.cat([part[0 if values.dim() == 1 else 1] for part in mine])

    monkeypatch.setattr(training_table, "_of_all", of_all)
    for table, (index, own) in zip(tables, ((mine[0][0], mine[0][1]), (mine[1][0][:1], mine[1][1][:1])), strict=False):
        (table.take(index)[0] * own).sum().backward()
        norm = nn.utils.clip_grad_norm_([table.gather(2)], 1e9)
        table.step(0.01, BETAS)
        torch.testing.assert_close(norm, gradient.norm())
        torch.testing.assert_close(table.a, tables[2].a)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Rows of all processes move in all of them, with the last batch of a single image too."""
    import json
    import subprocess
    import sys

    one = train(tmp_path / "one")
    two = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "two"), json.dumps({"devices": 2})], capture_output=True, text=True,
        timeout=200, cwd=Path(training_toy.__file__).parent,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    state = load_state(RunDir(tmp_path / "two").checkpoint, "a checkpoint")
    torch.testing.assert_close(state["model"]["table.a"], one.table.a, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state["tables"][0]["mean"], one.table.mean, rtol=1e-2, atol=1e-6)
    assert torch.equal(state["tables"][0]["steps"], one.table.steps)


if __name__ == "__main__":
    import json
    import sys

    train(Path(sys.argv[1]), **json.loads(sys.argv[2]))
