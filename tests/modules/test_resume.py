"""A run that is interrupted and resumed equals one that is not, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rtrl_moe_pl.cells import GRU, LSTM, RecurrentMoE
from rtrl_moe_pl.cli import main
from rtrl_moe_pl.data import HaystackDataModule
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, BlockRTRL, GradientAlgorithm, LazyExpertRTRL
from rtrl_moe_pl.modules import SequenceModule, TemperatureAnnealing
from rtrl_moe_pl.training import EMA
from rtrl_moe_pl.training.checkpoints import PER_RANK
from tests.modules.helpers import data, module, trainer
from tests.test_cli import CONFIG
from tests.training.faults import DropoutGRU


def final(run: Trainer, model: SequenceModule) -> dict[str, torch.Tensor]:
    """Everything that a later batch depends on."""
    memory = model._memory
    assert memory is not None
    result = {name: p.detach().clone() for name, p in model.named_parameters()}
    result |= {f"state {i}": value for i, value in enumerate(run.optimizers[0].state_dict()["state"][0].values())}
    result["carried state"] = memory.state
    result |= {f"influence {name}": value for name, value in memory.sensitivity.to_dense().items()}
    return result


def assert_resumes(folder: Path, fit: Callable[..., tuple[Trainer, SequenceModule]], stopped: int) -> None:
    """A run of 9 steps, and one that goes on after some, from stopped.ckpt, end alike; ``fit`` takes the steps."""
    first, unbroken = fit(9)
    interrupted, _ = fit(stopped)
    interrupted.save_checkpoint(folder / "stopped.ckpt")
    second, resumed = fit(9, ckpt_path=str(folder / "stopped.ckpt"))
    expected, got = final(first, unbroken), final(second, resumed)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def options(update_every: int) -> dict[str, Any]:
    return {"update_every": update_every, "lr_scheduler": lambda o: torch.optim.lr_scheduler.LinearLR(o)}


@pytest.mark.parametrize(
    ("gradient", "layout"),
    [(RTRL(window=4), "stream"), (TBPTT(window=4), "stream"), (BPTT(), "sequences"), (RTRL(window=4), "sequences")],
    ids=repr,
)
@pytest.mark.parametrize("update_every", [1, 2])
def test_resumed_equals_unbroken(tmp_path: Path, gradient: GradientAlgorithm, layout: str, update_every: int) -> None:
    """Interrupted in mid-epoch and, with update_every=2, between two updates."""
    whole, stopped = 9 // update_every, 7 // update_every
    unbroken = module(gradient, **options(update_every))
    first = trainer(tmp_path, max_steps=whole)
    first.fit(unbroken, datamodule=data(layout=layout, steps_per_batch=12))

    path = tmp_path / "stopped.ckpt"
    interrupted = trainer(tmp_path, max_steps=stopped)
    interrupted.fit(module(gradient, **options(update_every)), datamodule=data(layout=layout, steps_per_batch=12))
    interrupted.save_checkpoint(path)

    torch.manual_seed(99)
    resumed = module(gradient, **options(update_every))
    torch.nn.init.normal_(resumed.cell.input.weight)  # type: ignore[union-attr]  # from the checkpoint or not at all
    second = trainer(tmp_path, max_steps=whole)
    second.fit(resumed, datamodule=data(layout=layout, steps_per_batch=12), ckpt_path=str(path))
    expected, got = final(first, unbroken), final(second, resumed)
    assert second.global_step == whole
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.filterwarnings("ignore:DropoutGRU. the steps of a window cannot be differentiated together")
@pytest.mark.parametrize("stopped", [3, 5, 7])
def test_random_cells_resume_bit_identically(tmp_path: Path, stopped: int) -> None:
    """Dropout goes on from the generator's state, also where a validation was before."""

    def fit(steps: int, seed: int, **how: Any) -> tuple[Trainer, SequenceModule]:
        torch.manual_seed(1)
        model = SequenceModule(DropoutGRU(3, 5), 2, RTRL(window=4))
        run = trainer(tmp_path, max_steps=steps, limit_val_batches=1, num_sanity_val_steps=1)
        torch.manual_seed(seed)
        run.fit(model, datamodule=data(steps_per_batch=12), **how)
        return run, model

    first, unbroken = fit(9, seed=2)
    interrupted, _ = fit(stopped, seed=2)
    interrupted.save_checkpoint(tmp_path / "stopped.ckpt")
    second, resumed = fit(9, seed=3, ckpt_path=str(tmp_path / "stopped.ckpt"))
    third, other = fit(9, seed=3)
    expected, got, control = final(first, unbroken), final(second, resumed), final(third, other)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    assert not torch.equal(expected["cell.input.weight"], control["cell.input.weight"])


@pytest.mark.parametrize("cell", [GRU, LSTM])
def test_windows_longer_than_a_part_resume_bit_identically(tmp_path: Path, cell: type[GRU | LSTM]) -> None:
    """Until a cell has been differentiated, how long a part of a window may be is not known: parts are short."""

    def fit(steps: int, **how: Any) -> tuple[Trainer, SequenceModule]:
        torch.manual_seed(1)
        model = SequenceModule(cell(3, 16), 2, RTRL(window=32))
        run = trainer(tmp_path, max_steps=steps)
        run.fit(model, datamodule=data(batch_size=16, steps_per_batch=32), **how)
        return run, model

    assert_resumes(tmp_path, fit, 4)


class Numbered(GRU):
    """Gives each lane something of its own: its steps cannot be evaluated together, the window's graph is needed."""

    def forward(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return super().forward(x, s) + 0.01 * torch.arange(len(s), dtype=s.dtype)[:, None]


@pytest.mark.filterwarnings("ignore:Numbered. the steps of a window cannot be differentiated together")
def test_a_random_readout_resumes_bit_identically(tmp_path: Path) -> None:
    """Of a run and of a resumed one the first window is run twice: the readout draws the same both times."""

    def fit(steps: int, **how: Any) -> tuple[Trainer, SequenceModule]:
        model = module()
        model.cell = Numbered(3, 5)
        model.cell.load_state_dict(module().cell.state_dict())
        model.readout = torch.nn.Sequential(torch.nn.Dropout(0.3), module().readout)
        run = trainer(tmp_path, max_steps=steps)
        torch.manual_seed(2)
        run.fit(model, datamodule=data(steps_per_batch=12), **how)
        return run, model

    assert_resumes(tmp_path, fit, 4)


def test_a_fit_takes_nothing_from_the_one_before(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Neither a checkpoint that had nothing left to train, nor early stopping."""
    run = trainer(tmp_path)
    run.fit(module(), datamodule=data())
    run.save_checkpoint(tmp_path / "whole.ckpt")
    model = module()
    trainer(tmp_path).fit(model, datamodule=data(), ckpt_path=str(tmp_path / "whole.ckpt"))
    assert model.resumed_at == 6
    torch.manual_seed(123)
    expected = torch.get_rng_state()
    trainer(tmp_path, max_steps=7).fit(model, datamodule=data())
    assert model.resumed_at is None
    assert torch.equal(torch.get_rng_state(), expected)
    stop = EarlyStopping("val/loss", patience=1, mode="max", min_delta=100.0)
    for _ in range(2):
        run = trainer(tmp_path, max_epochs=5, max_steps=-1, limit_val_batches=1, callbacks=[stop])
        run.fit(module(), datamodule=data())
        assert run.global_step > 0
    assert not [warning for warning in recwarn if "has ended the run" in str(warning.message)]


@pytest.mark.parametrize("averaged", [False, True])
def test_float64_weights_are_restored_as_they_were(tmp_path: Path, averaged: bool) -> None:
    """Lightning restores them before it makes the module double: they would be rounded to float32."""
    options: dict[str, Any] = {"precision": "64-true"}

    def fit(steps: int, **how: Any) -> tuple[Trainer, SequenceModule]:
        model = module()
        run = trainer(tmp_path, max_steps=steps, callbacks=[EMA(0.9)] if averaged else [], **options)
        run.fit(model, datamodule=data(), **how)
        assert model.dtype == torch.float64
        return run, model

    assert_resumes(tmp_path, fit, 6)
    evaluated = module()
    trainer(tmp_path, limit_val_batches=1, **options).validate(
        evaluated, datamodule=data(), ckpt_path=str(tmp_path / "stopped.ckpt"), verbose=False
    )
    saved = torch.load(tmp_path / "stopped.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in evaluated.state_dict().items() if name in saved)


@pytest.mark.parametrize("stopped", [3, 5, 10])
def test_resumed_equals_unbroken_through_a_curriculum(tmp_path: Path, stopped: int) -> None:
    """Stopped before, right after and long after a promotion: weights, moments, carry, and the length."""

    def fit(steps: int, **how: Any) -> tuple[Trainer, SequenceModule, int]:
        torch.manual_seed(2)
        model = SequenceModule(GRU(8, 5), 4, RTRL(window=4), gradient_clip=None)
        data = HaystackDataModule(
            length=17,
            curriculum=[9, 13],
            min_gap=5,
            promote_at=0.01,
            batch_size=4,
            steps_per_batch=9,
            batches_per_epoch=5,
            validation_size=32,
            validation_scales=[1],
            validation_window=6,
        )
        run = trainer(tmp_path, max_epochs=-1, max_steps=steps, limit_val_batches=1.0)
        run.fit(model, datamodule=data, **how)
        return run, model, data.training_task.max_length

    first, unbroken, length = fit(11)
    assert length == 17
    interrupted, _, _ = fit(stopped)
    interrupted.save_checkpoint(tmp_path / "stopped.ckpt")
    second, resumed, again = fit(11, ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert again == length
    assert second.global_step == 11
    expected, got = final(first, unbroken), final(second, resumed)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


@pytest.mark.parametrize(
    "gradient", [BlockRTRL(window=4, chunk=8), LazyExpertRTRL(window=4, chunk=4, ring=3)], ids=repr
)
@pytest.mark.parametrize("annealed", [True, False])
def test_resumed_equals_unbroken_with_experts(tmp_path: Path, gradient: GradientAlgorithm, annealed: bool) -> None:
    """Biases that balance, experts left behind, gates that are annealed or keep a temperature, a penalty."""

    def fit(steps: int, **how: Any) -> tuple[Trainer, SequenceModule]:
        torch.manual_seed(3)
        cell = RecurrentMoE(3, 4, 4, 6, temperature=0.3, drift_penalty=0.1, balance_rate=0.05)
        model = SequenceModule(cell, 2, gradient, update_every=2)
        callbacks = [TemperatureAnnealing(1.0, 0.1, batches=30)] if annealed else []
        run = trainer(tmp_path, max_steps=steps, callbacks=callbacks)
        run.fit(model, datamodule=data(steps_per_batch=12), **how)
        return run, model

    first, unbroken = fit(7)
    interrupted, _ = fit(4)
    interrupted.save_checkpoint(tmp_path / "stopped.ckpt")
    second, resumed = fit(7, ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert isinstance(resumed.cell, RecurrentMoE)
    assert isinstance(unbroken.cell, RecurrentMoE)
    assert resumed.cell.temperature == unbroken.cell.temperature
    assert resumed.cell.expert_bias.any()
    expected, got = final(first, unbroken), final(second, resumed)
    expected |= dict(unbroken.named_buffers())
    got |= dict(resumed.named_buffers())
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_without_the_influence_it_would_differ(tmp_path: Path) -> None:
    """Negative control: the carried influence matters in this run."""
    path = tmp_path / "stopped.ckpt"
    interrupted = trainer(tmp_path)
    interrupted.fit(module(), datamodule=data())
    interrupted.save_checkpoint(path)
    weights = []
    for forget in (False, True):
        checkpoint = torch.load(path, weights_only=True)
        if forget:
            checkpoint[PER_RANK]["carry"]["tail"] = {}
            checkpoint[PER_RANK]["carry"]["sensitivity"] = {
                name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else value
                for name, value in checkpoint[PER_RANK]["carry"]["sensitivity"].items()
            }
        torch.save(checkpoint, tmp_path / "used.ckpt")
        model = module()
        trainer(tmp_path, max_steps=9).fit(model, datamodule=data(), ckpt_path=str(tmp_path / "used.ckpt"))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert not torch.equal(*weights)


def test_checkpoints_hold_plain_values_only(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(module(), datamodule=data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert checkpoint[PER_RANK]["carry"]["state"].shape == (3, 5)
    assert not any("memory" in name or "sensitivity" in name for name in checkpoint["state_dict"])


def test_the_carry_of_sequences_is_not_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(module(), datamodule=data(layout="sequences"))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)[PER_RANK]["carry"] is None


def other(cell: torch.nn.Module) -> SequenceModule:
    return SequenceModule(cell, 2, RTRL(window=4))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (GRU(3, 6), r"cell\.input\.bias is \[15\] there and \[18\] here"),
        (LSTM(3, 5), "cell is GRU there and LSTM here"),
        (GRU(3, 5, learned_initial_state=True), r"cell\.initial is missing there and \[5\] here"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path, cell: torch.nn.Module, message: str) -> None:
    run = trainer(tmp_path)
    run.fit(module(), datamodule=data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=f"^--ckpt_path: the checkpoint is of another architecture .*: {message}"):
        trainer(tmp_path, max_steps=9).fit(other(cell), datamodule=data(), ckpt_path=str(tmp_path / "a.ckpt"))
    with pytest.raises(ValueError, match="of another architecture"):
        trainer(tmp_path).validate(other(cell), datamodule=data(), ckpt_path=str(tmp_path / "a.ckpt"))


@pytest.mark.parametrize("every", [2, 4])
def test_figures_after_a_resume_at_the_end_of_an_epoch_are_those_of_an_unbroken_run(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, every: int
) -> None:
    """At the same steps: Lightning itself counts one too many then, and misses the best checkpoint's figure.

    Logged after every fourth batch, a figure is the mean of batches before the resume and after it.
    """

    def figures(folder: str) -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(tmp_path / folder)).Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if "per_second" not in tag
        }

    (tmp_path / "config.yaml").write_text(CONFIG)
    for folder, steps, more in (("whole", "15", []), ("parts", "10", []), ("parts", "15", ["--ckpt_path", "last"])):
        arguments = ["--trainer.default_root_dir", str(tmp_path / folder), "--trainer.max_steps", steps, *more]
        assert (
            main(["fit", "--config", str(tmp_path / "config.yaml"), f"--trainer.log_every_n_steps={every}", *arguments])
            == 0
        )
    whole, first, second = map(
        figures, ("whole/lightning_logs/version_0", "parts/lightning_logs/version_0", "parts/lightning_logs/version_1")
    )
    assert whole.keys() == first.keys() == second.keys()
    for tag, values in whole.items():
        steps, numbers = zip(*values, strict=True)
        parts = first[tag] + second[tag]
        assert steps == tuple(step for step, _ in parts), tag
        assert numbers == pytest.approx([value for _, value in parts], rel=1e-5), tag
    assert not [str(warning.message) for warning in recwarn if "ModelCheckpoint" in str(warning.message)]


def test_a_stream_of_another_batch_size_begins_anew(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(module(), datamodule=data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    resumed = trainer(tmp_path, max_steps=9)
    model = module()
    with pytest.warns(UserWarning, match="training data have changed"):
        resumed.fit(model, datamodule=data(batch_size=4), ckpt_path=str(tmp_path / "a.ckpt"))
    assert resumed.global_step == 9
    assert model._memory is not None
    assert model._memory.batch_size == 4
