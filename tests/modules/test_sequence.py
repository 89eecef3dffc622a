"""SequenceModule in a Trainer: exact across batches, one step per update, everything logged."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from rtrl_moe_pl.cells import GRU, RecurrentMoE
from rtrl_moe_pl.data import Batch
from rtrl_moe_pl.gradients import (
    BPTT,
    RTRL,
    TBPTT,
    BlockRTRL,
    GradientAlgorithm,
    LazyExpertRTRL,
    sequence_gradient,
)
from rtrl_moe_pl.modules import MLP, SequenceModule, SlotAttention, WeightedCrossEntropy
from rtrl_moe_pl.modules.base import refuse_half
from rtrl_moe_pl.modules.evaluation import evaluate
from tests.modules.helpers import Figures, data, module, trainer


def streamed(count: int, **options: Any) -> Batch:
    """The first batches of the stream of ``data()``, joined along time."""
    source = data(batches_per_epoch=count, **options)
    batches = [source.on_after_batch_transfer(request, 0) for request in source.train_dataloader()]
    inputs, labels, weights, starts = (
        torch.cat(parts, 1) for parts in zip(*((b.inputs, *b.targets, b.starts) for b in batches), strict=True)
    )
    return Batch(inputs, (labels, weights), starts)


def gradient_of_stream(folder: Path, gradient: GradientAlgorithm) -> tuple[dict, dict, float]:
    """p.grad after four batches of a stream with one update, BPTT over their join, and the relative distance."""
    figures = Figures()
    model = module(gradient, lr=0.0, update_every=4, gradient_clip=None).double()
    source = data()
    trainer(folder, max_steps=1, precision="64-true", callbacks=[figures]).fit(model, datamodule=source)
    joined = streamed(4)
    inputs, (labels, weights) = joined.inputs.double(), joined.targets
    reference = sequence_gradient(
        BPTT(),
        model.cell,
        model.readout,
        inputs,
        (labels, weights.double()),
        WeightedCrossEntropy(),
        starts=joined.starts,
    ).grads
    expected = {name: grad / weights.sum() for name, grad in reference.items()}
    got = figures.grads[-1]
    distance = sum((got[name] - expected[name]).norm() ** 2 for name in expected) ** 0.5
    size = sum(grad.norm() ** 2 for grad in expected.values()) ** 0.5
    return got, expected, float(distance / size)


@pytest.mark.parametrize("window", [1, 4, 6, 50])
def test_carried_influence_is_exact_across_batches(tmp_path: Path, window: int) -> None:
    got, expected, distance = gradient_of_stream(tmp_path, RTRL(window=window))
    assert got.keys() == expected.keys()
    assert distance < 1e-9


def test_truncation_differs(tmp_path: Path) -> None:
    """Negative control: the same run without influence is far from the gradient."""
    assert gradient_of_stream(tmp_path, TBPTT(window=4))[2] > 0.1


@pytest.mark.parametrize("update_every", [1, 3])
def test_one_optimizer_step_per_update(tmp_path: Path, update_every: int) -> None:
    figures = Figures()
    run = trainer(tmp_path, max_steps=-1, max_epochs=3, callbacks=[figures])
    model = module(update_every=update_every, lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o))
    run.fit(model, datamodule=data(steps_per_batch=12))  # longer than any sequence: no batch without weight
    assert len(figures.logged) == 15
    assert run.global_step == 15 // update_every
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert scheduler.last_epoch == run.global_step  # type: ignore[union-attr]


def test_every_figure_is_logged(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_val_batches=1.0, max_steps=-1, max_epochs=1)
    run.fit(module(), datamodule=data())
    names = ("loss", "accuracy", "grad_norm", "state_norm", "influence_norm", "tokens_per_second")
    assert {f"train/{name}" for name in names} <= run.callback_metrics.keys()
    validated = {f"val/{figure}{scale}" for figure in ("accuracy", "loss") for scale in ("", "_2x", "_4x")}
    assert validated <= run.callback_metrics.keys()
    assert {"train/loss", "val/accuracy"} <= run.progress_bar_metrics.keys()
    assert "train/grad_norm" not in run.progress_bar_metrics


def test_figures_are_means_since_the_last_log(tmp_path: Path) -> None:
    """And are not computed in between."""
    every = Figures()
    trainer(tmp_path, callbacks=[every]).fit(module(lr=0.0), datamodule=data(steps_per_batch=12))
    second = Figures()
    run = trainer(tmp_path, callbacks=[second], log_every_n_steps=3)
    run.fit(module(lr=0.0), datamodule=data(steps_per_batch=12))
    batch_weights = [float(b.sum()) for b in streamed(6, steps_per_batch=12).targets[1].split(12, 1)]
    losses = [logged["train/loss"] for logged in every.logged]
    expected = sum(w * loss for w, loss in zip(batch_weights[3:], losses[3:], strict=True)) / sum(batch_weights[3:])
    assert second.logged[5]["train/loss"] == pytest.approx(expected)
    assert second.logged[3]["train/loss"] == second.logged[2]["train/loss"]


def test_a_figure_that_there_is_none_of_is_not_logged(tmp_path: Path) -> None:
    """Updates are after batches 3, 6 and 9; Lightning would log at 8 what it had logged at 6."""
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, logger=logger, max_steps=-1, max_epochs=1, log_every_n_steps=2)
    run.fit(module(update_every=3), datamodule=data(steps_per_batch=12, batches_per_epoch=9))
    with open(logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [bool(row["train/grad_norm"]) for row in rows] == [False, False, True, False]
    assert all(row["train/state_norm"] for row in rows)


@pytest.mark.parametrize("kind", [BlockRTRL, LazyExpertRTRL])
def test_a_routed_algorithm_is_refused_for_another_cell_without_a_logger(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} needs a cell that chooses slots"):
        trainer(tmp_path).fit(module(kind(window=4)), datamodule=data())


def test_logged_loss_and_accuracy_are_per_weight(tmp_path: Path) -> None:
    figures = Figures()
    model = module(BPTT(), lr=0.0)
    trainer(tmp_path, max_steps=1, callbacks=[figures]).fit(model, datamodule=data(layout="sequences"))
    source = data(layout="sequences")
    batch = source.on_after_batch_transfer(next(iter(source.train_dataloader())), 0)
    outputs = evaluate(model.cell, model.readout, batch.inputs, batch.starts)
    labels, weights = batch.targets
    asked = weights > 0
    loss = nn.functional.cross_entropy(outputs[asked], labels[asked])
    accuracy = (outputs[asked].argmax(-1) == labels[asked]).float().mean()
    assert figures.logged[0]["train/loss"] == pytest.approx(float(loss), rel=1e-5)
    assert figures.logged[0]["train/accuracy"] == pytest.approx(float(accuracy))


def test_validation_counts_weighted_steps_only(tmp_path: Path) -> None:
    model, source = module(), data(validation_size=7, validation_batch_size=3)
    [got, *_] = trainer(tmp_path, limit_val_batches=1.0).validate(model, datamodule=source, verbose=False)
    right = asked = 0.0
    for request in source.val_dataloader()[0]:
        batch = source.on_after_batch_transfer(request, 0)
        labels, weights = batch.targets
        outputs = evaluate(model.cell, model.readout, batch.inputs, batch.starts)
        right += float(((outputs.argmax(-1) == labels) * weights).sum())
        asked += float(weights.sum())
    assert asked == 7
    assert got["val/accuracy"] == pytest.approx(right / asked)


def test_loaders_without_names_are_numbered(tmp_path: Path) -> None:
    loaders = [loader((3, True)), loader((2, True))]
    got = trainer(tmp_path, limit_val_batches=1.0).validate(module(), loaders, verbose=False)
    assert {name for figures in got for name in figures} == {
        "val/accuracy",
        "val/loss",
        "val/accuracy_1",
        "val/loss_1",
    }


def test_validation_leaves_the_carry_alone(tmp_path: Path) -> None:
    results = []
    for limit in (0, 1.0):
        model = module()
        run = trainer(tmp_path, max_steps=9, limit_val_batches=limit, val_check_interval=2 if limit else 1.0)
        run.fit(model, datamodule=data())
        results.append(torch.cat([p.flatten() for p in model.parameters()]).detach())
    assert torch.equal(*results)


def test_evaluation_in_windows_equals_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, readout = GRU(3, 5, learned_initial_state=True), MLP(5, 4, 2)
    nn.init.normal_(cell.initial)  # type: ignore[arg-type]
    inputs, starts = torch.randn(2, 11, 3), torch.rand(2, 11) < 0.3
    whole = evaluate(cell, readout, inputs, starts)
    monkeypatch.setattr("rtrl_moe_pl.modules.evaluation.WINDOW", 4)
    torch.testing.assert_close(evaluate(cell, readout, inputs, starts), whole)
    steps = sequence_gradient(
        BPTT(), cell, readout, inputs, torch.zeros(2, 11), lambda o, _: o.sum(), starts=starts
    ).outputs
    torch.testing.assert_close(steps, whole)


@pytest.mark.parametrize("labelled", [1, 6])
def test_a_penalty_weighs_the_same_however_much_is_labelled(tmp_path: Path, labelled: int) -> None:
    """Its mean over all steps, beside the mean loss of the labelled ones."""
    (batch,) = loader((4, True))
    batch.targets[1][:, : 6 - labelled] = 0.0
    grads = []
    for penalty in (0.0, 0.5):
        torch.manual_seed(1)
        model = SequenceModule(RecurrentMoE(3, 4, 3, 2, expert_penalty=penalty), 2, BPTT(), gradient_clip=None)
        figures = Figures()
        trainer(tmp_path, max_steps=1, callbacks=[figures]).fit(model, loader_of(batch))
        grads.append(figures.grads[0])
    torch.manual_seed(1)
    cell = RecurrentMoE(3, 4, 3, 2, expert_penalty=0.5)
    state, penalties = cell.initial_state(4), []
    for x in batch.inputs.unbind(1):
        penalties.append(cell.auxiliary(x, state))
        state = cell(x, state)
    torch.stack(penalties).mean().backward()  # type: ignore[arg-type]
    for name, parameter in cell.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = grads[1][f"cell.{name}"] - grads[0][f"cell.{name}"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_module_that_is_no_cell_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^Linear is no cell: it has no state_size and no initial_state; a cell has"):
        SequenceModule(nn.Linear(3, 5), 2, BPTT())


def test_a_readout_that_takes_the_input_is_checked_too() -> None:
    with pytest.raises(ValueError, match=r"model\.readout.num_slots is 4, but the cell's is 3: give both the same"):
        SequenceModule(RecurrentMoE(3, 4, 3, 2), 2, RTRL(window=4), SlotAttention(3, 4, 3, 2))
    with pytest.raises(ValueError, match=r"model\.readout.input_size is 5, but the cell reads 3 numbers"):
        SequenceModule(RecurrentMoE(3, 4, 3, 2), 2, RTRL(window=4), SlotAttention(5, 3, 4, 2))
    with pytest.raises(ValueError, match=r"SlotAttention\) returns \(7,\) values for a state; the data needs \(2,\)"):
        SequenceModule(RecurrentMoE(3, 4, 3, 2), 2, RTRL(window=4), SlotAttention(3, 3, 4, 7))


def test_bptt_is_refused_on_a_stream(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"BPTT\(\) differentiates whole sequences, but data.layout is 'stream'"):
        trainer(tmp_path).fit(module(BPTT()), datamodule=data())


def loader(*batches: tuple[int, bool]) -> DataLoader:
    """Batches of (lanes, whether they start at column 0)."""
    made = []
    for lanes, start in batches:
        starts = torch.zeros(lanes, 6, dtype=torch.bool)
        starts[:, 0] = start
        targets = (torch.zeros(lanes, 6, dtype=torch.long), torch.ones(lanes, 6))
        made.append(Batch(torch.randn(lanes, 6, 3), targets, starts))
    return loader_of(*made)


def loader_of(*batches: Batch) -> DataLoader:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def test_batch_size_is_fixed_under_a_live_carry(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the batch has 2 lanes, but 3 are carried on: keep batch_size"):
        trainer(tmp_path).fit(module(), loader((3, True), (3, False), (2, False)))


def test_batch_size_may_change_where_all_lanes_start(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module(), loader((3, True), (2, True)))
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("readout", "message"),
    [
        (nn.Linear(4, 2), "does not take states of size 5"),
        (nn.Linear(5, 3), r"returns \(3,\) values for a state; the data needs \(2,\)"),
    ],
)
def test_a_readout_that_does_not_fit_is_refused(readout: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(readout=readout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, "set model.gradient_clip instead"),
        ({"accumulate_grad_batches": 2}, "set model.update_every instead"),
    ],
)
def test_trainer_options_that_cannot_be_honoured(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options).fit(module(), datamodule=data())


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", 16])
def test_float16_is_refused(precision: str | int) -> None:
    """On a CPU the Trainer itself turns it into bfloat16, so that only the command line can see what was asked for."""
    with pytest.raises(ValueError, match=r"^trainer.precision=16.* is not supported: the loss scale of float16"):
        refuse_half(precision)


@pytest.mark.parametrize("options", [{"gradient_clip": 0.0}, {"gradient_clip": -1.0}, {"update_every": 0}])
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        module(**options)


def test_weights_in_bfloat16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^trainer.precision=bf16-true is not supported: weights of 8 bits"):
        trainer(tmp_path, precision="bf16-true").fit(module(), datamodule=data())


def test_float64_reaches_everything(tmp_path: Path) -> None:
    """Trained in float64, RTRL and BPTT go to the same weights by that many digits more than in float32."""
    differences = []
    for precision, dtype in (("64-true", torch.float64), ("32-true", torch.float32)):
        weights = []
        for gradient in (BPTT(), RTRL(window=4, chunk=4)):
            model, source = module(gradient), data(layout="sequences")
            trainer(tmp_path, precision=precision).fit(model, datamodule=source)
            assert {p.dtype for p in model.parameters()} == {dtype}
            assert model._memory is not None
            assert model._memory.state.dtype == model._memory.base.dtype == dtype
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        differences.append(float((weights[0] - weights[1]).norm() / weights[0].norm()))
    assert differences[0] < 1e-12
    assert 1e-9 < differences[1] < 1e-5


def test_autocast_does_not_reach_the_window(tmp_path: Path) -> None:
    """Under bf16-mixed the gradients are those of float32."""
    weights = []
    for precision in ("32-true", "bf16-mixed"):
        model = module()
        trainer(tmp_path, precision=precision).fit(model, datamodule=data())
        weights.append(torch.cat([p.flatten() for p in model.parameters()]).detach())
    assert torch.equal(*weights)


def test_predictions_are_outputs(tmp_path: Path) -> None:
    model, source = module(), data()
    predicted = trainer(tmp_path).predict(model, datamodule=source)
    assert predicted is not None
    assert predicted[0].shape == (8, 9, 2)  # type: ignore[union-attr]


def test_default_readout_is_linear() -> None:
    model = SequenceModule(GRU(3, 5), 2, BPTT())
    assert isinstance(model.readout, nn.Linear)
    assert model.readout.weight.shape == (2, 5)
