"""The tests that every cell inherits, and helpers to compare a cell with its torch.nn counterpart."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.testing import assert_close

from rtrl_moe_pl.cells import Cell

BATCH, STEPS = 4, 6


def run(cell: nn.Module, inputs: Tensor, state: Tensor) -> Tensor:
    """States after each step, [B, T, S], from inputs [B, T, D] and a start state [B, S]."""
    states = []
    for x in inputs.unbind(1):
        state = cell(x, state)
        states.append(state)
    return torch.stack(states, 1)


def random_run(cell: Any, batch_size: int = BATCH, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Inputs [B, T, D] and a start state [B, S] for a float64 cell."""
    inputs = torch.randn(batch_size, steps, cell.input_size, dtype=torch.float64)
    return inputs, torch.randn(batch_size, cell.state_size, dtype=torch.float64)


def copy_to_torch(cell: Any, module: nn.RNNCellBase) -> None:
    """Give a torch.nn cell the weights of ours; a bias that ours leaves out is zero there."""
    values = {
        "weight_ih": cell.input.weight,
        "weight_hh": cell.recurrent.weight,
        "bias_ih": cell.input.bias,
        "bias_hh": cell.recurrent.bias,
    }
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = values[name]
            parameter.copy_(torch.zeros_like(parameter) if value is None else value)


def assert_rows_alone(cell: Any) -> None:
    """Lanes run together give what each gives alone, and no lane feels another one's input or state."""
    inputs, state = random_run(cell)
    together = run(cell, inputs, state)
    for b in range(BATCH):
        assert_close(run(cell, inputs[b : b + 1], state[b : b + 1])[0], together[b], rtol=0, atol=1e-12)
    inputs[0], state[0] = 3.0, -3.0
    others = run(cell, inputs, state)
    assert torch.equal(others[1:], together[1:])
    assert not torch.equal(others[0], together[0])


def assert_pure(cell: Any) -> None:
    """The same arguments give the same result, and stay as they were."""
    inputs, state = random_run(cell)
    x, x_before, s_before = inputs[:, 0], inputs[:, 0].clone(), state.clone()
    parameters = {name: p.detach().clone() for name, p in cell.named_parameters()}
    assert torch.equal(cell(x, state), cell(x, state))
    assert torch.equal(x, x_before)
    assert torch.equal(state, s_before)
    assert all(torch.equal(p, parameters[name]) for name, p in cell.named_parameters())


def assert_gradients(cell: Any) -> None:
    """Derivatives by input, state and every parameter agree with finite differences over three steps."""
    inputs, state = random_run(cell, batch_size=2, steps=3)
    names = [name for name, _ in cell.named_parameters()]

    def function(inputs: Tensor, state: Tensor, *values: Tensor) -> Tensor:
        def step(x: Tensor, s: Tensor) -> Tensor:
            return functional_call(cell, dict(zip(names, values, strict=True)), (x, s))

        for x in inputs.unbind(1):
            state = step(x, state)
        return state

    values = [p.detach().clone().requires_grad_() for p in cell.parameters()]
    assert torch.autograd.gradcheck(function, (inputs.requires_grad_(), state.requires_grad_(), *values))


class CellCase:
    """Inherit, and define ``make``; ``input_size`` is the D that it is made with."""

    input_size = 3

    def make(self, learned_initial_state: bool = False) -> Cell:
        raise NotImplementedError

    @pytest.fixture
    def cell(self) -> Cell:
        return self.make().double()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shapes_and_dtype(self, dtype: torch.dtype) -> None:
        cell = self.make().to(dtype)
        state = cell.initial_state(BATCH)
        assert cell.input_size == self.input_size
        assert state.shape == (BATCH, cell.state_size)
        new = cell(torch.randn(BATCH, self.input_size, dtype=dtype), state)
        assert new.shape == (BATCH, cell.state_size)
        assert new.dtype == state.dtype == dtype
        assert cell.output(new).shape == (BATCH, cell.output_size)

    def test_initial_state_is_zero(self, cell: Cell) -> None:
        state = cell.initial_state(BATCH)
        assert torch.equal(state, torch.zeros(BATCH, cell.state_size, dtype=torch.float64))
        assert not state.requires_grad

    def test_learned_initial_state_gets_the_gradient_of_all_lanes(self) -> None:
        cell = self.make(learned_initial_state=True).double()
        inputs, _ = random_run(cell)
        state = cell.initial_state(BATCH)
        by_lane = state.detach().clone().requires_grad_()
        for start in (state, by_lane):
            run(cell, inputs, start).square().sum().backward()
        initials = [p for name, p in cell.named_parameters() if name.split(".")[-1] == "initial"]
        gradient = torch.cat([p.grad for p in initials if p.grad is not None])
        assert by_lane.grad is not None
        assert gradient.shape == (cell.state_size,)
        assert gradient.abs().min() > 0
        assert_close(gradient, by_lane.grad.sum(0), rtol=1e-12, atol=1e-12)

    def test_rows_do_not_see_each_other(self, cell: Cell) -> None:
        assert_rows_alone(cell)

    def test_is_pure(self, cell: Cell) -> None:
        assert_pure(cell)

    def test_gradients(self, cell: Cell) -> None:
        assert_gradients(cell)

    def test_vmap_over_rows(self, cell: Cell) -> None:
        inputs, state = random_run(cell)
        x = inputs[:, 0]
        one = vmap(lambda x, s: cell(x[None], s[None])[0])(x, state)
        assert_close(one, cell(x, state), rtol=0, atol=1e-12)

    def test_batched_cotangents(self, cell: Cell) -> None:
        inputs, state = random_run(cell)
        sources = [state.requires_grad_(), *cell.parameters()]
        new = cell(inputs[:, 0], state)
        cotangents = torch.randn(3, *new.shape, dtype=torch.float64)

        def pull(cotangent: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(new, sources, cotangent, retain_graph=True)

        together = vmap(pull)(cotangents)
        for i, cotangent in enumerate(cotangents):
            for batched, one in zip(together, pull(cotangent), strict=True):
                assert_close(batched[i], one, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("learned", [False, True])
    def test_state_dict_round_trip(self, learned: bool) -> None:
        cell, other = self.make(learned).double(), self.make(learned).double()
        with torch.no_grad():
            for parameter in cell.parameters():
                parameter.add_(torch.rand_like(parameter))
        inputs, state = random_run(cell)
        expected = run(cell, inputs, state)
        assert not torch.equal(run(other, inputs, state), expected)
        other.load_state_dict(cell.state_dict())
        assert torch.equal(run(other, inputs, state), expected)
        assert torch.equal(other.initial_state(2), cell.initial_state(2))

    def test_pickle_and_copy(self, cell: Cell) -> None:
        inputs, state = random_run(cell)
        for other in (pickle.loads(pickle.dumps(cell)), copy.deepcopy(cell)):
            assert torch.equal(run(other, inputs, state), run(cell, inputs, state))

    def test_wrong_widths_are_refused(self, cell: Cell) -> None:
        inputs, state = random_run(cell)
        x = inputs[:, 0]
        with pytest.raises(RuntimeError, match=r"size|shape"):
            cell(torch.cat([x, x], -1), state)
        with pytest.raises(RuntimeError, match=r"size|shape"):
            cell(x, torch.cat([state, state[:, :1]], -1))
