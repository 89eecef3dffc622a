"""The influence of experts, left behind and caught up with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import RecurrentMoE
from rtrl_moe_pl.gradients import LazyExpertRTRL
from rtrl_moe_pl.linearization import WindowLinearization
from rtrl_moe_pl.linearization.window import Block
from rtrl_moe_pl.sensitivities import LazyExpertSensitivity
from tests.sensitivities.sensitivity_case import (
    BATCH,
    SHAPES,
    SIZE,
    Dense,
    SensitivityCase,
    advanced,
    assert_same,
    everything,
    random,
    window,
)


def tensors(saved: Any) -> Iterator[Tensor]:
    """All of them, however deep."""
    if isinstance(saved, Tensor):
        yield saved
    elif isinstance(saved, dict | list):
        for value in saved.values() if isinstance(saved, dict) else saved:
            yield from tensors(value)


@pytest.mark.parametrize("hashed", [lambda block: block.rows, lambda block: 8 - block.rows], ids=["up", "down"])
def test_pools_have_one_order_in_every_process(monkeypatch: pytest.MonkeyPatch, hashed: Any) -> None:
    """Not that of hashes of names: the sum over all would be rounded otherwise in the next process."""
    monkeypatch.setattr(Block, "__hash__", hashed)
    cell, gradient = RecurrentMoE(input_size=3, slot_size=4, num_slots=3, num_experts=5), LazyExpertRTRL(window=4)
    memory, x = gradient.init(cell, 2), torch.randn(2, 40, 3)
    gradient.run(cell, nn.Linear(12, 2), x, (x,), lambda outputs, _: outputs.square().sum(), memory, None)
    influence: Any = memory.sensitivity
    assert [block.members[0].name for block in influence.pools] == ["cell.router", "cell.expert_weight"]


class LazyCase(SensitivityCase):
    ring = 2
    tree = False

    def make(self, batch_size: int = BATCH, ring: int | None = None, tree: bool | None = None) -> LazyExpertSensitivity:
        options: dict[str, Any] = {"slot_size": 2, "ring": self.ring if ring is None else ring}
        options["tree"] = self.tree if tree is None else tree
        return LazyExpertSensitivity(SHAPES, batch_size, SIZE, torch.float64, torch.device("cpu"), **options)

    def truth(self, dense: Dense, linearization: WindowLinearization) -> Dense:
        return advanced(dense, linearization)

    def test_norm_and_bytes(self, sensitivity: LazyExpertSensitivity) -> None:  # type: ignore[override]
        expected = torch.cat([p.flatten() for p in sensitivity.to_dense().values()]).norm()
        assert float(sensitivity.norm()) == pytest.approx(float(expected), rel=1e-12)
        for _ in range(6):
            sensitivity.advance(everything())
        held = sensitivity.nbytes
        for _ in range(6):
            sensitivity.advance(everything())
        assert sensitivity.nbytes == held  # bounded: nothing grows with time

    def test_copies_are_copies(self, sensitivity: LazyExpertSensitivity) -> None:  # type: ignore[override]
        before = sensitivity.to_dense()
        for p in sensitivity.to_dense().values():
            p.fill_(7.0)
        for value in tensors(sensitivity.state_dict()):
            value.fill_(7)
        assert_same(sensitivity.to_dense(), before, exactly=True)
        sensitivity.advance(window("joint"))  # the bank is left behind
        saved, cotangent = sensitivity.state_dict(), random(BATCH, SIZE)
        expected = sensitivity.vjp(cotangent)
        for _ in range(4):
            sensitivity.advance(everything())
        sensitivity.load_state_dict(saved)
        assert_same(sensitivity.vjp(cotangent), expected, exactly=True)

    @pytest.mark.parametrize("tree", [False, True])
    @pytest.mark.parametrize("ring", [0, 2, 3, 8])
    def test_another_ring_may_follow(self, ring: int, tree: bool) -> None:
        made, other = self.make(), self.make(ring=ring, tree=tree and ring > 0)
        for number in range(9):
            made.advance(everything() if number < 2 else window("joint"))
        other.load_state_dict(made.state_dict())
        for number in range(9):
            linearization = window("joint") if number % 4 else everything()
            assert_same(other.contract_and_advance(linearization), made.contract_and_advance(linearization))
            assert all(pool.oldest(other.windows) <= ring for pool in other.pools.values())
        assert_same(other.to_dense(), made.to_dense())

    def test_many_windows(self) -> None:
        made = self.make()
        dense = made.to_dense()
        for number in range(30):
            linearization = window("bank", "joint") if number % 5 == 0 else window("joint", "table")
            if number % 7 == 3:
                linearization.transition[1] = 0.0  # a start in one lane
            dense = self.truth(dense, linearization)
            made.advance(linearization)
            if number % 4 == 0:
                cotangent = linearization.cotangent
                found, expected = made.vjp(cotangent)["bank"], torch.einsum("bs,bs...->...", cotangent, dense["bank"])
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert_same(made.to_dense(), dense)

    def test_another_cell_is_refused(self, sensitivity: LazyExpertSensitivity) -> None:
        other = self.make()
        other.shapes = {name: shape for name, shape in SHAPES.items() if name != "bank"}
        with pytest.raises(ValueError, match="covers 'bank', which this cell does not have"):
            other.load_state_dict(sensitivity.state_dict())
        other.shapes = SHAPES | {"bank": torch.Size([SHAPES["bank"][0] + 1, *SHAPES["bank"][1:]])}
        with pytest.raises(
            ValueError, match=r"the saved influence of bank is of .* resume with the model it was saved"
        ):
            other.load_state_dict(sensitivity.state_dict())
        with pytest.raises(ValueError, match="resume with the"):
            self.make(1).load_state_dict(sensitivity.state_dict())


class TestRingOfTwo(LazyCase):
    pass


class TestRingOfFive(LazyCase):
    ring = 5


class TestTree(LazyCase):
    ring = 5
    tree = True


class TestEveryWindow(LazyCase):
    ring = 0


def test_what_was_never_used_costs_nothing() -> None:
    made = TestRingOfTwo().make()
    linearization = window("bank")
    made.advance(linearization)
    (pool,) = made.pools.values()
    (term,) = next(iter(linearization.terms.values()))
    assert pool.used == len(term.uses.pairs) < BATCH * 3  # type: ignore[attr-defined]
    assert pool.nbytes == pool.used * SIZE * 6 * 8
    whole = window()
    whole.transition[:] = 0.0
    made.advance(whole)
    assert not len(pool.live())  # every lane has started


def test_idle_pairs_are_left_behind_and_no_further_than_the_ring() -> None:
    made = TestRingOfFive().make()
    made.advance(window("bank"))
    (pool,) = made.pools.values()
    seen = []
    for _ in range(12):
        made.advance(window("joint"))
        seen.append(pool.oldest(made.windows))
    assert seen == [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0]
