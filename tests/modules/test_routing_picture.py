"""The picture of what a routed cell chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor

from rtrl_moe_pl.cells import GRU, RecurrentMoE, RoutedCell, Routing
from rtrl_moe_pl.data import AnBnDataModule, HaystackDataModule
from rtrl_moe_pl.gradients import RTRL, LazyExpertRTRL
from rtrl_moe_pl.modules import RoutingPicture, SequenceModule
from rtrl_moe_pl.modules.routing_picture import EVERY, cost_table, draw, influence_norms, trace
from rtrl_moe_pl.modules.usage import usage_entropy


def test_trace_is_what_the_cell_chose() -> None:
    torch.manual_seed(0)
    cell, inputs = RecurrentMoE(3, 4, 6, 5, read_slots=2, write_slots=1, active_experts=2), torch.randn(20, 3)
    found = trace(cell, inputs)
    assert found.jacobian_norm is not None
    state = cell.initial_state(1)
    for t, x in enumerate(inputs):
        jacobian = torch.func.jacrev(lambda s, x=x: cell(x[None], s)[0])(state)
        assert float(found.jacobian_norm[t]) == pytest.approx(float(jacobian.detach().norm()) / 24**0.5, rel=1e-4)
        state, routing = cell.advance(x[None], state)
        for chosen, index in zip(found[:3], routing, strict=True):
            assert chosen[t].nonzero().flatten().tolist() == sorted(index[0].tolist())
        assert float(found.state_norm[t]) == pytest.approx(float(state.detach().norm()), rel=1e-5)


class Slots(RoutedCell):
    """No experts: what is read is added to what is written."""

    def __init__(self) -> None:
        super().__init__(3, num_slots=4, slot_size=3, read_slots=1, write_slots=1)
        self.layer = torch.nn.Linear(3, 3)

    def route(self, x: Tensor, s: Tensor) -> Routing:
        order = x.abs().argsort(1)
        return Routing(order[:, :1], order[:, -1:] + 1, order[:, :0])

    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        return torch.tanh(old + self.layer(read) + x[:, None])


@pytest.mark.parametrize("experts", [False, True])
def test_influence_norms_are_those_of_the_dense_influence(experts: bool) -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(3, 4, 6, 5, write_slots=1, active_experts=1) if experts else Slots()
    inputs = torch.randn(2 * EVERY + 3, 3)
    found = influence_norms(cell, inputs)
    assert found is not None
    algorithm, expected = RTRL(window=1, chunk=1), []
    memory = algorithm.init(cell, 1)
    for x in inputs:
        step = x[None, None], torch.zeros(1, 1), lambda o, _: 0 * o.sum()
        memory = algorithm.step(cell, torch.nn.Identity(), *step, memory).memory
        expected.append(float(memory.sensitivity.norm()))
    assert found.tolist() == pytest.approx([expected[EVERY - 1], expected[2 * EVERY - 1], expected[-1]], rel=1e-4)


def test_no_influence_norm_of_a_cell_that_cannot_be_trained_by_its_rows() -> None:
    class Drifting(RecurrentMoE):
        def advance(self, x: Tensor, s: Tensor) -> tuple[Tensor, Routing]:
            new, routing = super().advance(x, s)
            return 0.99 * new, routing

    found = trace(Drifting(3, 4, 6, 5), torch.randn(9, 3))
    assert found.influence_norm is None
    assert draw(Drifting(3, 4, 6, 5), found, "", {"here": torch.arange(9) == 4})


def test_norms_of_a_cell_that_vmap_refuses() -> None:
    class Branching(RecurrentMoE):
        def advance(self, x: Tensor, s: Tensor) -> tuple[Tensor, Routing]:
            return super().advance(x if x.sum() > 0 else -x, s)

    found = trace(Branching(3, 4, 6, 5), torch.randn(9, 3))
    assert found.jacobian_norm is None
    assert found.read.any()


def test_norms_under_validate_are_those_under_fit(tmp_path: Path) -> None:
    picture = RoutingPicture(steps=12)
    data = AnBnDataModule(2, 4, batch_size=4, steps_per_batch=8, batches_per_epoch=4, validation_size=8)
    trainer = fit(RecurrentMoE(3, 4, 5, 6), LazyExpertRTRL(window=4), tmp_path, picture, data)
    fitted = picture.latest
    model: Any = trainer.model
    trainer.validate(model, data)  # in inference mode
    assert fitted is not None
    assert picture.latest is not None
    assert fitted.influence_norm is not None
    for drawn, expected in zip(picture.latest, fitted, strict=True):
        torch.testing.assert_close(drawn, expected)


def test_costs() -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(3, 4, 6, 5, read_slots=2, write_slots=1, active_experts=2)
    rows = {name: (dense, done) for name, dense, done in cost_table(cell, trace(cell, torch.randn(20, 3)))}
    dense, done = rows["experts"]
    assert dense == 5 * (16 + 4 + 4)
    assert done == 2 * (16 + 4 + 4)
    dense, done = rows["ds'/ds"]
    assert dense == 24**2
    assert 4 * 8 <= done <= 4 * 12  # one slot written; it may be one of the two read
    full = RecurrentMoE(3, 4, 2, 2)
    for _, dense, done in cost_table(full, trace(full, torch.randn(5, 3))):
        assert done == dense


def test_usage_entropy() -> None:
    assert float(usage_entropy(torch.tensor([5, 5, 5, 5]))) == pytest.approx(1.0)
    assert float(usage_entropy(torch.tensor([9, 0, 0]))) == 0.0
    assert float(usage_entropy(torch.tensor([1, 1, 0, 0]))) == pytest.approx(0.5)
    assert float(usage_entropy(torch.tensor([7]))) == 1.0
    assert float(usage_entropy(torch.zeros(3))) == 0.0


def fit(
    cell: torch.nn.Module, gradient: RTRL, folder: Path, picture: RoutingPicture, data: Any = None, **options: Any
) -> Trainer:
    data = data or AnBnDataModule(2, 4, batch_size=4, steps_per_batch=8, batches_per_epoch=4, validation_size=8)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[picture],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(SequenceModule(cell, data.output_size, gradient, **options), data)
    return trainer


def test_it_is_drawn(tmp_path: Path) -> None:
    picture = RoutingPicture(steps=6)
    trainer = fit(RecurrentMoE(3, 4, 5, 6), LazyExpertRTRL(window=4), tmp_path, picture)
    assert picture.latest is not None
    assert picture.latest.experts.shape == (6, 6)
    assert trainer.log_dir is not None
    assert (Path(trainer.log_dir) / "val_routing.png").stat().st_size > 10_000
    figures = trainer.callback_metrics
    assert 0 < figures["train/expert_entropy"] <= 1
    assert {"train/read_entropy", "train/write_entropy", "train/dead_experts", "train/unwritten_slots"} <= set(figures)


@pytest.mark.parametrize("window", [None, 7])
def test_a_lane_in_windows_is_drawn_as_one(tmp_path: Path, window: int | None) -> None:
    task: dict[str, Any] = {
        "length": 20,
        "values": 2,
        "min_gap": 5,
        "batch_size": 4,
        "steps_per_batch": 8,
        "batches_per_epoch": 1,
    }
    data = HaystackDataModule(**task, validation_size=8, validation_batch_size=4, validation_window=window)
    picture = RoutingPicture(steps=18)
    cell = RecurrentMoE(data.input_size, 4, 5, 6)
    fit(cell, LazyExpertRTRL(window=4), tmp_path, picture, data)
    assert picture.latest is not None
    stream = data.evaluation_stream("validation", 0)
    tokens = stream.task.sample(stream.seed, torch.tensor([0])).tokens[0, :18]
    expected = trace(cell, torch.nn.functional.one_hot(tokens, data.input_size).float())
    for drawn, meant in zip(picture.latest, expected, strict=True):
        torch.testing.assert_close(drawn, meant)


class Watched(RecurrentMoE):
    """Keeps what it was balanced by."""

    def balance(self, used: Routing) -> None:
        super().balance(used)
        self.told = [*getattr(self, "told", []), used]


@pytest.mark.parametrize("update_every", [1, 2])
def test_balancing_happens_once_an_update(tmp_path: Path, update_every: int) -> None:
    """By what all batches since the last one chose, each counted once, towards what was used too little."""
    torch.manual_seed(0)
    cell = Watched(3, 4, 5, 6, balance_rate=0.5, slot_balance_rate=0.25)
    fit(cell, LazyExpertRTRL(window=4), tmp_path, RoutingPicture(), update_every=update_every)
    assert len(cell.told) == 4 // update_every
    expected = {"expert_bias": torch.zeros(6), "read_bias": torch.zeros(5), "write_bias": torch.zeros(5)}
    for used in cell.told:
        steps = 4 * 8 * update_every  # of all lanes
        assert [int(counts.sum()) for counts in used] == [2 * steps] * 3
        for name, counts, rate in zip(
            expected, (used.experts, used.read, used.written), (0.5, 0.25, 0.25), strict=True
        ):
            mean = 2 * steps / len(counts)
            expected[name] += rate * torch.tensor([(count < mean) - float(count > mean) for count in counts.tolist()])
    for name, bias in expected.items():
        assert torch.equal(getattr(cell, name), bias), name
        assert bool(bias.any())


def test_other_cells_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="needs a cell that chooses slots, such as RecurrentMoE, got GRU"):
        fit(GRU(3, 4), RTRL(window=4), tmp_path, RoutingPicture())
