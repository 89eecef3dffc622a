from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.testing import assert_close

from rtrl_moe_pl.cells import RecurrentMoE, Routing, Stack
from rtrl_moe_pl.cells.experts import expert_linear, matvec
from rtrl_moe_pl.cells.routed import take_slots
from rtrl_moe_pl.modules.usage import usage_entropy
from tests.cells.cell_case import CellCase, random_run, run


class TestRecurrentMoE(CellCase):
    def make(self, learned_initial_state: bool = False) -> RecurrentMoE:
        return RecurrentMoE(self.input_size, 4, num_slots=5, num_experts=4, learned_initial_state=learned_initial_state)


class TestFullState(CellCase):
    """Everything is read, written and used: a dense cell."""

    def make(self, learned_initial_state: bool = False) -> RecurrentMoE:
        return RecurrentMoE(self.input_size, 4, 3, 2, 3, 3, 2, learned_initial_state=learned_initial_state)


class TestOrthogonal(CellCase):
    def make(self, learned_initial_state: bool = False) -> RecurrentMoE:
        return RecurrentMoE(
            self.input_size, 4, 5, 4, orthogonal=True, temperature=0.5, learned_initial_state=learned_initial_state
        )


def tokens(batch: int, steps: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.one_hot(torch.randint(0, 8, (batch, steps), generator=generator), 8).float()


@pytest.mark.parametrize("orthogonal", [False, True])
def test_slots_that_are_not_written_stay_exactly_as_they_are(orthogonal: bool) -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(8, 6, 7, 5, write_slots=2, orthogonal=orthogonal)
    state = torch.randn(4, cell.state_size)
    with torch.no_grad():
        for x in tokens(4, 50).unbind(1):
            new, routing = cell.advance(x, state)
            kept = torch.ones(4, 7, dtype=torch.bool).scatter(1, routing.written, False)
            old, now = state.view(4, 7, 6), new.view(4, 7, 6)
            assert torch.equal(old[kept], now[kept])
            assert (old[~kept] != now[~kept]).any(-1).all()
            assert all(torch.equal(a, b) for a, b in zip(cell.route(x, state), routing, strict=True))
            state = new


def test_forward_is_route_and_update() -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(8, 6, 7, 5).double()
    x, s = tokens(4, 1)[:, 0].double(), torch.randn(4, 42, dtype=torch.float64)
    routing = cell.route(x, s)
    slots = s.view(4, 7, 6)
    new = cell.update(x, take_slots(slots, routing.read), take_slots(slots, routing.written), routing)
    assert_close(take_slots(cell(x, s).view(4, 7, 6), routing.written), new, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_every_parameter_gets_a_gradient(seed: int) -> None:
    """Gates, norms, routers and all experts, over a batch of random streams; also with one choice of each."""
    torch.manual_seed(seed)
    for chosen in (2, 1):
        cell = RecurrentMoE(8, 6, 4, 4, chosen, chosen, chosen)
        states = run(cell, tokens(64, 30, seed), cell.initial_state(64))
        states.square().sum().backward()
        for name, parameter in cell.named_parameters():
            assert parameter.grad is not None, name
            if name in cell.banks:
                used = usage(cell, 30, seed, lanes=64).experts > 0
                assert used.sum() >= 2
                assert torch.equal(parameter.grad.flatten(1).any(1), used), name  # every one that was ever chosen
            else:
                assert parameter.grad.any(), name


def test_what_was_not_chosen_does_not_matter() -> None:
    """No derivative by the slots not read or written, nor by experts not chosen: what sparse algorithms rest on."""
    torch.manual_seed(0)
    cell = RecurrentMoE(8, 4, 6, 5, read_slots=2, write_slots=1, active_experts=2).double()
    x, s = tokens(1, 1)[0].double(), torch.randn(1, 24, dtype=torch.float64, requires_grad=True)
    routing = cell.route(x, s)
    written = take_slots(cell(x, s).view(1, 6, 4), routing.written)
    by_state, by_router, by_bank = torch.autograd.grad(written.sum(), [s, cell.router, cell.expert_weight])
    touched = torch.zeros(6, dtype=torch.bool)
    touched[torch.cat([routing.read, routing.written], 1)[0]] = True
    assert torch.equal(by_state.view(6, 4).any(1), touched)
    for by_expert in (by_router, by_bank):
        chosen = torch.zeros(5, dtype=torch.bool)
        chosen[routing.experts[0]] = True
        assert torch.equal(by_expert.flatten(1).any(1), chosen)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("orthogonal", "bound", "thousands"), [(False, 1.0, 100), (True, 2.0, 10)])  # 2: sqrt d
def test_the_state_stays_bounded(orthogonal: bool, bound: float, thousands: int) -> None:
    """Over 100,000 steps of inputs of any size, with weights that are not small."""
    torch.manual_seed(0)
    cell = RecurrentMoE(4, 4, 4, 3, orthogonal=orthogonal)
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([[0.1], [1.0], [100.0]])
    state = cell.initial_state(3)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(3.0)
        for _ in range(thousands):
            for x in (scale * torch.randn(1000, 3, 4, generator=generator)).unbind(0):
                state = cell(x, state)
            assert state.abs().max() <= bound
    assert bool((state.abs().amax(1) > 0.1).all())


def test_routing_depends_on_the_input() -> None:
    """Read, written and experts of one state differ with the token: the predecessor's gates saw old slots alone."""
    for seed in range(3):
        torch.manual_seed(seed)
        cell = RecurrentMoE(8, 16, 4, 8)
        routing = cell.route(torch.eye(8), torch.rand(1, 64).expand(8, -1))
        for index in routing:
            assert len({tuple(sorted(row)) for row in index.tolist()}) > 1


def usage(cell: RecurrentMoE, steps: int, seed: int, lanes: int = 8) -> Routing:
    state = cell.initial_state(lanes)
    counts = [torch.zeros(n, dtype=torch.long) for n in (cell.num_slots, cell.num_slots, cell.num_experts)]
    with torch.no_grad():
        for x in tokens(lanes, steps, seed).unbind(1):
            state, routing = cell.advance(x, state)
            for count, index in zip(counts, routing, strict=True):
                count += index.flatten().bincount(minlength=len(count))
    return Routing(*counts)


def test_balancing_brings_in_what_starves() -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(8, 16, 16, 8, balance_rate=0.05, slot_balance_rate=0.05)
    before = usage(cell, 100, 0)
    parameters = [p.detach().clone() for p in cell.parameters()]
    for number in range(100):
        cell.balance(usage(cell, 20, number))
    after = usage(cell, 100, 0)
    for name, one, two in zip(Routing._fields, before, after, strict=True):
        assert usage_entropy(two) > 0.9, name
        assert usage_entropy(two) > usage_entropy(one) + 0.05, name
        assert bool((one == 0).any()), name  # starved without
        assert bool((two > 0).all()), name
    assert all(torch.equal(p, q) for p, q in zip(cell.parameters(), parameters, strict=True))


def test_biases_choose_and_do_not_compute() -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(8, 4, 3, 2, read_slots=3, write_slots=3, active_experts=2).double()
    x, s = tokens(5, 1)[:, 0].double(), torch.randn(5, 12, dtype=torch.float64)
    before = cell(x, s)
    for buffer in cell.buffers():
        buffer.normal_()
    assert_close(cell(x, s), before, rtol=0, atol=1e-12)


def test_temperature_makes_gates_choices() -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(8, 4, 5, 4)
    place, query = torch.randn(50, 2, 4), torch.randn(50, 4)
    soft = cell._gate(place, query)
    cell.temperature = 1e-4
    hard = cell._gate(place, query)
    assert torch.equal(hard.round(), soft.round())
    assert ((hard - hard.round()).abs() < 1e-3).float().mean() > 0.95


def test_penalties() -> None:
    torch.manual_seed(0)
    x, s = tokens(6, 1)[:, 0], 0.1 * torch.randn(6, 20)
    assert RecurrentMoE(8, 4, 5, 4).auxiliary(x, s) is None
    cell = RecurrentMoE(8, 4, 5, 4, drift_penalty=1.0)
    found = cell.auxiliary(x, s)
    assert found is not None
    growth = (cell(x, s).square() - s.square()).sum(1) / 4
    assert_close(found, growth.clamp(min=0))
    assert bool((found > 0).any())
    cell = RecurrentMoE(8, 4, 5, 4, expert_penalty=2.0)
    only, answers = cell.auxiliary(x, s), []
    assert only is not None
    _, content, routing = cell._choose(x, s.view(6, 5, 4))
    for row, experts in enumerate(routing.experts):
        each = cell.expert_weight[experts] @ content[row] + cell.expert_offset[experts]
        answers.append(nn.functional.gelu(each).square().mean())
    assert_close(only, 2 * torch.stack(answers))
    stacked = Stack([cell, RecurrentMoE(20, 3, 2, 2, drift_penalty=1.0)])
    above = stacked.cells[1].auxiliary(cell(x, s), torch.zeros(6, 6))  # type: ignore[operator]
    assert_close(stacked.auxiliary(x, torch.cat([s, torch.zeros(6, 6)], 1)), only + above)
    assert Stack([RecurrentMoE(8, 4, 5, 4)]).auxiliary(x, s) is None


def test_orthogonal_writes() -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(8, 6, 4, 4, orthogonal=True).double()
    with torch.no_grad():  # u = 0: one gate for all numbers of a slot
        for layer in (cell.write_message, cell.write_old):
            layer.weight[:6] = 0.0
        cell.write_message.bias[:6] = 0.0
    plain = RecurrentMoE(8, 6, 4, 4).double()
    plain.load_state_dict(cell.state_dict())
    x, s = tokens(5, 1)[:, 0].double(), torch.rand(5, 24, dtype=torch.float64)
    routing = cell.route(x, s)
    old, now, then = (take_slots(v.view(5, 4, 6), routing.written) for v in (s, cell(x, s), plain(x, s)))

    def along(value: Tensor) -> Tensor:
        return (value * old).sum(-1, keepdim=True) / (old.square().sum(-1, keepdim=True) + 1e-6)

    gate = 1 - along(now)  # all that is left of the old content along itself is 1 - g of it
    assert bool(((gate > 0) & (gate < 1)).all())
    value = old + (then - old) / gate  # tanh v
    assert_close(now, old + gate * (value - along(value) * old - old), rtol=0, atol=1e-5)
    assert not torch.allclose(now, then, atol=1e-2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"read_slots": 5}, r"read_slots must be at most num_slots \(4\), got 5"),
        ({"write_slots": 9}, r"write_slots must be at most num_slots \(4\), got 9"),
        ({"active_experts": 4}, r"active_experts must be at most num_experts \(3\), got 4"),
        ({"read_slots": 0}, "read_slots must be at least 1, got 0"),
        ({"write_slots": 0}, "write_slots must be at least 1, got 0"),
        ({"active_experts": 0}, "active_experts must be at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0, got inf"),
        ({"balance_rate": -0.1}, "balance_rate must be a finite number of at least 0, got -0.1"),
        ({"drift_penalty": math.nan}, "drift_penalty must be a finite number of at least 0, got nan"),
        ({"max_memory": 1}, "max_memory must be at least 2, got 1"),
    ],
)
def test_bad_input(option: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"slot_size": 4, "num_slots": 4, "num_experts": 3} | option
    with pytest.raises(ValueError, match=message):
        RecurrentMoE(8, **options)


def test_expert_linear() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 3, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    experts, z = torch.randint(0, 5, (6, 2)), torch.randn(6, 2, 4, dtype=torch.float64)
    expected = torch.stack(
        [torch.stack([weight[e] @ z[n, a] + bias[e] for a, e in enumerate(row)]) for n, row in enumerate(experts)]
    )
    assert_close(expert_linear(z, weight, bias, experts), expected)
    assert_close(expert_linear(z[:, :1], weight, None, experts)[:, 0], (expected - bias[experts])[:, 0])


def test_matvec_derivatives() -> None:
    matrix = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(matvec, (matrix, vector))
    assert torch.autograd.gradgradcheck(matvec, (matrix, vector))
    cotangents = torch.randn(7, 3, 2, 4, dtype=torch.float64)
    output = matvec(matrix, vector)

    def pull(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, (matrix, vector), cotangent, retain_graph=True)

    for i, parts in enumerate(zip(*vmap(pull)(cotangents), strict=True)):
        for found, expected in zip(parts, pull(cotangents[i]), strict=True):
            assert_close(found, expected)
    assert_close(vmap(matvec)(matrix, vector), output)
    assert_close(vmap(matvec, in_dims=(1, None))(matrix, vector[:, 0])[1], matvec(matrix[:, 1], vector[:, 0]))


def test_streams_run_apart_and_together() -> None:
    torch.manual_seed(0)
    cell = RecurrentMoE(3, 4, 5, 4).double()
    inputs, state = random_run(cell)
    assert_close(run(cell, inputs[1:2], state[1:2])[0], run(cell, inputs, state)[1], rtol=0, atol=1e-12)
