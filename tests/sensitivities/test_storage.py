"""P kept in bfloat16: rounded when it is written, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.sensitivities import BlockSparseSensitivity, DenseSensitivity, LazyExpertSensitivity
from tests.sensitivities.sensitivity_case import (
    BATCH,
    SHAPES,
    SIZE,
    advanced,
    assert_same,
    contract,
    everything,
    random,
)

SIZES = SHAPES, BATCH, SIZE, torch.float64, torch.device("cpu")
KINDS: dict[str, Any] = {
    "dense": lambda storage: DenseSensitivity(*SIZES, storage=storage),
    "block": lambda storage: BlockSparseSensitivity(*SIZES, slot_size=2, storage=storage),
    "lazy": lambda storage: LazyExpertSensitivity(*SIZES, slot_size=2, ring=2, storage=storage),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([parts[name].flatten() for name in SHAPES if name in parts])


@each_kind
def test_one_advance_rounds_once(make: Any) -> None:
    made, exact = make(torch.bfloat16), make(None)
    first = everything()
    made.advance(first)
    exact.advance(first)
    dense = exact.to_dense()
    for name, p in made.to_dense().items():
        assert p.dtype == torch.float64
        assert torch.equal(p, dense[name].bfloat16().double()), name
    assert not torch.equal(flat(made.to_dense()), flat(dense))
    assert float(made.norm()) == pytest.approx(float(exact.norm()), rel=1e-3)


@each_kind
def test_later_advances_add_no_more_than_a_rounding_each(make: Any) -> None:
    made, dense = make(torch.bfloat16), make(None).to_dense()
    for _ in range(6):
        window = everything()
        made.advance(window)
        dense = advanced(dense, window)
    error = (flat(made.to_dense()) - flat(dense)).norm() / flat(dense).norm()
    assert 1e-5 < error < 6 * 2**-8
    cotangent = random(BATCH, SIZE)
    assert_same(made.vjp(cotangent), contract(made.to_dense(), cotangent))  # reading does not round


@each_kind
def test_it_claims_no_exactness_and_takes_a_quarter_of_float64(make: Any) -> None:
    made, exact = make(torch.bfloat16), make(None)
    for one in (made, exact):
        one.advance(everything())
    assert exact.exact
    assert not made.exact
    if not isinstance(made, LazyExpertSensitivity):  # which also keeps J's
        assert 4 * made.nbytes == exact.nbytes


@each_kind
def test_what_is_saved_is_bfloat16_and_goes_on_bit_for_bit(make: Any) -> None:
    made = make(torch.bfloat16)
    made.advance(everything())
    saved = copy.deepcopy(made.state_dict())
    tensors = [*saved.get("shared", saved).values(), *(pool["values"] for pool in saved.get("pools", ()))]
    assert tensors
    assert {t.dtype for t in tensors} == {torch.bfloat16}
    again, window = make(torch.bfloat16), everything()
    again.load_state_dict(saved)
    for one in (made, again):
        one.advance(window)
    assert torch.equal(flat(made.to_dense()), flat(again.to_dense()))


@each_kind
def test_another_type_is_converted_and_said(make: Any) -> None:
    rounded, exact = make(torch.bfloat16), make(None)
    rounded.advance(everything())
    with pytest.warns(UserWarning, match=r"saved influence is kept in bfloat16, this run's in float64: converted"):
        exact.load_state_dict(rounded.state_dict())
    assert torch.equal(flat(exact.to_dense()), flat(rounded.to_dense()))
    again = make(torch.bfloat16)
    with pytest.warns(UserWarning, match="kept in float64, this run's in bfloat16: converted"):
        again.load_state_dict(exact.state_dict())
    assert torch.equal(flat(again.to_dense()), flat(rounded.to_dense()))
