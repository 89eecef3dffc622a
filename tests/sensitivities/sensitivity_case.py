"""The tests that every representation of the influence matrix inherits.

A new one gives its constructor, and the dense matrix that it must hold after a window (its *dense truth*).
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rtrl_moe_pl.linearization import (
    Block,
    DenseTerm,
    ExpertTerm,
    IndexTerm,
    Member,
    OuterTerm,
    Uses,
    WindowLinearization,
)
from rtrl_moe_pl.linearization.cotangents import StoredCotangents
from rtrl_moe_pl.sensitivities import Sensitivity

BATCH, SIZE, STEPS = 3, 4, 2
SHAPES = {
    "weight": torch.Size([5, 3]),
    "other": torch.Size([2, 5]),  # stored transposed: [columns, rows]
    "bias": torch.Size([5]),
    "table": torch.Size([6, 2]),
    "tensor": torch.Size([2, 2, 3]),
    "scalar": torch.Size([]),
    "bank": torch.Size([3, 2, 2]),
    "offset": torch.Size([3, 2]),
    "unused": torch.Size([4, 4]),
}
JOINT = Block(5, 6, (Member("weight", 0, 3), Member("other", 3, 2, transposed=True), Member("bias", 5, 1)))
BANK = Block(2, 9, (Member("bank", 0, 2), Member("offset", 2, 1)), experts=3)
TABLE = Block(2, 6, (Member("table", 0, 6, transposed=True),))

Dense = dict[str, Tensor]  # [B, S, *shape] by parameter


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def cotangents(rows: int, steps: int = STEPS, batch: int = BATCH) -> StoredCotangents:
    return StoredCotangents(random(steps, batch, rows, SIZE), random(steps, batch, rows))


def window(*names: str, joint: bool = True, batch: int = BATCH) -> WindowLinearization:
    """A random window that reaches these parameters; ``weight``, ``other`` and ``bias`` together or each alone."""
    terms: dict[Block, list[Any]] = {}
    for name in names:
        if name == "joint" and joint:
            terms[JOINT] = [OuterTerm(cotangents(5, batch=batch), random(STEPS, batch, 6)) for _ in range(2)]
        elif name == "joint":
            for member in JOINT.members:
                block = Block.alone(member.name, SHAPES[member.name])
                terms[block] = [DenseTerm(random(batch, 1, block.rows, SIZE), random(1, block.rows))]
        elif name == "bank":
            uses = Uses(torch.randint(0, 3, (STEPS, batch)), 3)
            inputs = torch.cat([random(STEPS, batch, 2), torch.ones(STEPS, batch, 1, dtype=torch.float64)], -1)
            terms[BANK] = [ExpertTerm(cotangents(2, batch=batch), inputs, uses)]
        elif name == "table":
            ids = torch.randint(0, 6, (STEPS, batch))
            terms[TABLE] = [IndexTerm(cotangents(2, batch=batch), ids, 6)]
        else:
            block = Block.alone(name, SHAPES[name])
            terms[block] = [OuterTerm(cotangents(block.rows, batch=batch), None)]
            terms[block].append(DenseTerm(random(batch, 1, block.rows, SIZE), random(1, block.rows)))
    return WindowLinearization(0.6 * random(batch, SIZE, SIZE), random(batch, SIZE), terms, SHAPES)


def everything(joint: bool = True) -> WindowLinearization:
    return window("joint", "table", "tensor", "scalar", "bank", joint=joint)


def contract(dense: Dense, cotangent: Tensor) -> Dense:
    """sum_b cotangent_b P_b, by parameter."""
    return {name: torch.einsum("bs,bs...->...", cotangent, p) for name, p in dense.items()}


def advanced(dense: Dense, linearization: WindowLinearization) -> Dense:
    """J P + M in full, by brute force."""
    jacobian, immediate = linearization.transition.transpose(1, 2), linearization.immediate()
    return {
        name: torch.einsum("bij,bj...->bi...", jacobian, p) + immediate.get(name, torch.zeros_like(p))
        for name, p in dense.items()
    }


def assert_same(found: Dense, expected: Dense, exactly: bool = False) -> None:
    """Equal where both have a parameter; what one leaves out is zero in the other."""
    for name in found.keys() | expected.keys():
        zero = torch.zeros_like(next(d[name] for d in (found, expected) if name in d))
        one, two = found.get(name, zero), expected.get(name, zero)
        assert one.shape == two.shape, name
        if exactly:
            assert torch.equal(one, two), name
        else:
            assert_close(one, two, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


class SensitivityCase:
    """Inherit, and define ``make`` and ``truth``."""

    def make(self, batch_size: int = BATCH) -> Sensitivity:
        raise NotImplementedError

    def truth(self, dense: Dense, linearization: WindowLinearization) -> Dense:
        """What the representation must hold after a window, given what it held before."""
        raise NotImplementedError

    @pytest.fixture
    def sensitivity(self) -> Sensitivity:
        """One that has been through a window."""
        made = self.make()
        made.advance(everything())
        return made

    def test_begins_at_zero(self) -> None:
        made = self.make()
        dense = made.to_dense()
        assert {n: p.shape for n, p in dense.items()} == {n: (BATCH, SIZE, *shape) for n, shape in SHAPES.items()}
        assert not any(bool(p.any()) for p in dense.values())
        assert float(made.norm()) == 0.0
        assert_same(made.vjp(random(BATCH, SIZE)), {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()})

    def test_advance(self) -> None:
        """Over windows that reach all parameters, some, none, and some in other blocks."""
        made = self.make()
        dense = made.to_dense()
        for linearization in (
            everything(),
            window("table"),
            window(),
            everything(joint=False),
            window("scalar", "joint"),
            window("joint", joint=False),
            everything(),
        ):
            dense = self.truth(dense, linearization)
            made.advance(linearization)
            assert_same(made.to_dense(), dense)

    def test_vjp(self, sensitivity: Sensitivity) -> None:
        cotangent = random(BATCH, SIZE)
        dense = sensitivity.to_dense()
        assert_same(sensitivity.vjp(cotangent), contract(dense, cotangent))
        assert_same(sensitivity.to_dense(), dense, exactly=True)

    @pytest.mark.parametrize("joint", [True, False])
    def test_contract_and_advance(self, joint: bool) -> None:
        """Both in one call: contracted as it was before, then advanced."""
        made, apart = self.make(), self.make()
        for linearization in (everything(), window("table"), everything(joint), window("joint", "tensor")):
            expected = linearization.gradient()
            for name, part in apart.vjp(linearization.cotangent).items():
                expected[name] = expected.get(name, torch.zeros_like(part)) + part
            apart.advance(linearization)
            assert_same(made.contract_and_advance(linearization), expected)
            assert_same(made.to_dense(), apart.to_dense())

    def test_arguments_are_left_alone(self, sensitivity: Sensitivity) -> None:
        linearization = everything()
        transition, cotangent = linearization.transition.clone(), linearization.cotangent.clone()
        immediate = linearization.immediate()
        sensitivity.contract_and_advance(linearization)
        assert torch.equal(linearization.transition, transition)
        assert torch.equal(linearization.cotangent, cotangent)
        assert_same(linearization.immediate(), immediate, exactly=True)

    def test_zero(self, sensitivity: Sensitivity) -> None:
        sensitivity.zero_()
        assert float(sensitivity.norm()) == 0.0
        linearization = everything()
        fresh = self.make()
        fresh.advance(linearization)
        assert_same(sensitivity.contract_and_advance(linearization), linearization.gradient())
        assert_same(sensitivity.to_dense(), fresh.to_dense())

    @pytest.mark.parametrize("factor", [0.5, 0.9, -3.0])
    def test_scaled(self, sensitivity: Sensitivity, factor: float) -> None:
        """Every entry; what is behind, pending or never reached too, and what comes later adds to it unscaled."""
        for linearization in (window("joint", "table"), window("scalar")):  # experts stay behind where they can
            sensitivity.advance(linearization)
        dense = {name: factor * p for name, p in sensitivity.to_dense().items()}
        sensitivity.scale_(factor)
        assert_same(sensitivity.to_dense(), dense, exactly=factor == 0.5)  # a power of two rounds nothing
        cotangent, linearization = random(BATCH, SIZE), everything()
        assert_same(sensitivity.vjp(cotangent), contract(dense, cotangent))
        sensitivity.advance(linearization)
        assert_same(sensitivity.to_dense(), self.truth(dense, linearization))

    def test_scaled_by_one(self, sensitivity: Sensitivity) -> None:
        dense = sensitivity.to_dense()
        sensitivity.scale_(1.0)
        assert_same(sensitivity.to_dense(), dense, exactly=True)

    def test_norm_and_bytes(self, sensitivity: Sensitivity) -> None:
        dense = sensitivity.to_dense()
        expected = torch.cat([p.flatten() for p in dense.values()]).norm()
        assert_close(sensitivity.norm(), expected, rtol=1e-12, atol=0)
        assert sensitivity.norm().shape == ()
        bound = sum(p.nbytes for p in dense.values())
        assert 0 <= sensitivity.nbytes <= bound
        held = sensitivity.nbytes
        sensitivity.advance(everything())
        assert sensitivity.nbytes == held  # in place: nothing grows with time

    def test_copies_are_copies(self, sensitivity: Sensitivity) -> None:
        before = sensitivity.to_dense()
        for p in sensitivity.to_dense().values():
            p.fill_(7.0)
        for p in sensitivity.state_dict().values():
            p.fill_(7.0)
        assert_same(sensitivity.to_dense(), before, exactly=True)

    def test_resumed_in_mid_stream(self, sensitivity: Sensitivity) -> None:
        """Saved, loaded and carried on: bit for bit what it would have been without."""
        sensitivity.advance(window("joint", "table"))
        file = io.BytesIO()
        torch.save(sensitivity.state_dict(), file)
        file.seek(0)
        resumed = self.make()
        resumed.load_state_dict(torch.load(file, weights_only=True))
        assert_same(resumed.to_dense(), sensitivity.to_dense(), exactly=True)
        for linearization in (everything(), window("table", "scalar"), everything()):
            expected = sensitivity.contract_and_advance(linearization)
            assert_same(resumed.contract_and_advance(linearization), expected, exactly=True)
            assert_same(resumed.to_dense(), sensitivity.to_dense(), exactly=True)

    def test_loading_replaces_everything(self, sensitivity: Sensitivity) -> None:
        other = self.make()
        other.advance(window("table"))
        saved = other.state_dict()
        sensitivity.load_state_dict(saved)
        assert_same(sensitivity.to_dense(), other.to_dense(), exactly=True)
        other.advance(everything())
        assert_same(self._loaded(saved).to_dense(), sensitivity.to_dense(), exactly=True)

    def _loaded(self, saved: dict[str, Any]) -> Sensitivity:
        made = self.make()
        made.load_state_dict(saved)
        return made

    def test_loading_what_does_not_fit(self, sensitivity: Sensitivity) -> None:
        with pytest.raises(ValueError, match=r"the saved influence covers 'elsewhere', which this cell does not have"):
            sensitivity.load_state_dict({"elsewhere": random(BATCH, SIZE, 2)})
