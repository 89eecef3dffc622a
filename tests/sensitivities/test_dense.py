"""The full influence matrix, in one tile and in many."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from rtrl_moe_pl.linearization import WindowLinearization
from rtrl_moe_pl.sensitivities import DenseSensitivity, dense
from tests.sensitivities.sensitivity_case import (
    BATCH,
    SHAPES,
    SIZE,
    Dense,
    SensitivityCase,
    advanced,
    assert_same,
    everything,
    window,
)


class TestDenseSensitivity(SensitivityCase):
    def make(self, batch_size: int = BATCH) -> DenseSensitivity:
        return DenseSensitivity(SHAPES, batch_size, SIZE, torch.float64, torch.device("cpu"))

    def truth(self, dense: Dense, linearization: WindowLinearization) -> Dense:
        return advanced(dense, linearization)

    def test_truth_is_not_blind(self) -> None:
        """Control: J the other way round, or M alone, is something else."""
        first, second = everything(), everything()
        dense = advanced({n: torch.zeros(BATCH, SIZE, *s, dtype=torch.float64) for n, s in SHAPES.items()}, first)
        right = advanced(dense, second)["weight"]
        second.transition = second.transition.transpose(1, 2)
        assert (advanced(dense, second)["weight"] - right).norm() > 0.1 * right.norm()
        assert (second.immediate()["weight"] - right).norm() > 0.1 * right.norm()

    def test_what_was_never_reached_costs_nothing(self) -> None:
        made = self.make()
        assert made.nbytes == 0
        made.advance(window("table"))
        assert made.nbytes == BATCH * SIZE * SHAPES["table"].numel() * 8
        made.advance(everything())
        reached = sum(shape.numel() for name, shape in SHAPES.items() if name != "unused")
        assert made.nbytes == BATCH * SIZE * reached * 8

    def test_written_in_place(self) -> None:
        """One piece of memory for good, larger than P by no more than its largest tile."""
        made = self.make()
        made.advance(everything())
        _, first = next(made._matrix.tiles())
        memory = first.untyped_storage()
        sizes = [-(-values.nbytes // 128) * 128 for _, values in made._matrix.tiles()]
        assert memory.nbytes() == sum(sizes) + max(sizes)
        for _ in range(3):
            made.advance(everything())
            assert {t.untyped_storage().data_ptr() for _, t in made._matrix.tiles()} == {memory.data_ptr()}
            assert all(t.data_ptr() % 64 == 0 for _, t in made._matrix.tiles())

    def test_other_batch(self) -> None:
        made = self.make()
        message = r"a window of 2 lanes cannot advance an influence matrix of 3: the batch size must stay the same"
        with pytest.raises(ValueError, match=message):
            made.contract_and_advance(window("table", batch=2))
        with pytest.raises(ValueError, match=message):
            made.advance(window("table", batch=2))
        assert made.nbytes == 0
        assert made.exact

    def test_loading_another_batch(self) -> None:
        made = self.make()
        made.advance(window("table"))
        with pytest.raises(ValueError, match=r"table has shape \(3, 4, 6, 2\), this run needs \(5, 4, 6, 2\): resume"):
            self.make(5).load_state_dict(made.state_dict())

    def test_float32_window_of_long_contraction(self) -> None:
        """Influence that fades is flushed to zero, not kept in subnormal numbers."""
        made = DenseSensitivity(SHAPES, BATCH, SIZE, torch.float32, torch.device("cpu"))
        shrink = WindowLinearization(torch.eye(SIZE).expand(BATCH, -1, -1) * 1e-3, torch.ones(BATCH, SIZE), {}, SHAPES)
        made.load_state_dict({n: m.float() for n, m in everything().immediate().items()})
        sizes = []
        for _ in range(20):
            made.advance(shrink)
            sizes.append(float(made.norm()))
        assert sizes[0] > 0
        assert sizes[-1] == 0.0
        assert all(value == 0.0 or value > 1e-37 for value in sizes)


class TestManyTiles(TestDenseSensitivity):
    """The same in tiles of a single row, one lane at a time."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dense, "CPU_TILE_BYTES", 8)

    def test_tiles(self) -> None:
        made = self.make()
        made.advance(everything())
        count = Counter(tile.block for tile, _ in made._matrix.tiles())
        assert set(count.values()) == {5 * BATCH, 2 * BATCH, 12 * BATCH, BATCH}


class TestUnevenTiles(TestDenseSensitivity):
    """Tiles of three rows and two, one lane at a time."""

    @pytest.fixture(autouse=True)
    def _uneven(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dense, "CPU_TILE_BYTES", 6 * SIZE * 8 * 3)

    def test_tiles(self) -> None:
        made = self.make()
        made.advance(everything())
        tiles = [values for tile, values in made._matrix.tiles() if tile.block.rows == 5]
        assert [tile.shape[2] for tile in tiles] == [3, 2] * BATCH


def test_tilings_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut of lanes and rows gives the same numbers."""
    windows = [everything(), window("joint", "table"), everything()]
    results = []
    for size in (8, 100, 300, 700, 1500, 10**6):
        monkeypatch.setattr(dense, "CPU_TILE_BYTES", size)
        made = TestDenseSensitivity().make()
        grads = [made.contract_and_advance(w) for w in windows]
        results.append((made.to_dense(), grads[-1]))
    for found, gradient in results[1:]:
        assert_same(found, results[0][0])
        assert_same(gradient, results[0][1])
