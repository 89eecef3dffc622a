"""Options of tasks, of recurrent mixtures of experts, and of reasoning models."""

from pathlib import Path

import pytest

from tests.bad_input.case import Case, run, table

CELL, DATA = "--model.cell", "--data"
GRADIENT, DECODER = "--model.gradient", "--model.decoder"
CASES = [
    # tasks
    Case(
        "delay",
        ["--data=DelayedCopyDataModule", f"{DATA}.delay=500"],
        ["data.length (delay is 500) must be at least 501, got 400"],
    ),
    Case(
        "gap",
        ["--data=DelayedRecallDataModule", f"{DATA}.min_gap=50"],
        ["data.max_gap (min_gap is 50) must be at least 50, got 40"],
    ),
    Case(
        "needles",
        ["--data=HaystackDataModule", f"{DATA}.needles=50"],
        ["data.length (for 50 key-value pairs and min_gap 33) must be"],
    ),
    Case(
        "places",
        ["--data=HaystackDataModule", f"{DATA}.insert_from=.nan"],
        ["insert_from and insert_to must be 0 <= insert_from <="],
    ),
    Case(
        "curriculum",
        ["--data=HaystackDataModule", f"{DATA}.curriculum=[100]"],
        ["curriculum must be increasing lengths, all below"],
    ),
    # experts
    Case("experts", [f"{CELL}.num_experts=0"], ["model.cell.num_experts must be at least 1, got 0"], config="moe"),
    Case(
        "slots", [f"{CELL}.read_slots=9"], ["model.cell.read_slots must be at most num_slots (4), got 9"], config="moe"
    ),
    Case(
        "active experts",
        [f"{CELL}.active_experts=9"],
        ["model.cell.active_experts must be at most num_experts (3), got 9"],
        config="moe",
    ),
    Case(
        "temperature",
        [f"{CELL}.temperature=.nan"],
        ["model.cell.temperature must be a finite number above 0, got nan"],
        config="moe",
    ),
    Case(
        "balance",
        [f"{CELL}.balance_rate=-1"],
        ["model.cell.balance_rate must be a finite number of at least 0"],
        config="moe",
    ),
    Case(
        "option of no expert",
        [f"{CELL}.heads=3"],
        ["unknown key model.cell.heads: RecurrentMoE takes input_size, slot_size"],
        config="moe",
    ),
    Case("ring", [f"{GRADIENT}.ring=0"], ["model.gradient.ring must be at least 2, got 0"], config="moe"),
    Case(
        "catch-up",
        [f"{GRADIENT}.catch_up=run"],
        ["model.gradient.catch_up: needs one of 'walk', 'tree', 'block', got run"],
        config="moe",
    ),
    Case(
        "chunk",
        [f"{GRADIENT}.chunk=0"],
        ["model.gradient.chunk must be a whole number of steps, at least 1; got 0"],
        config="moe",
    ),
    Case(
        "blocks of a dense cell",
        [f"{GRADIENT}=BlockRTRL"],
        ["BlockRTRL needs a cell that chooses slots (a RoutedCell", "and GRU is none: use RTRL(window=4)"],
    ),
    Case(
        "experts of a dense cell",
        [f"{GRADIENT}=LazyExpertRTRL"],
        ["LazyExpertRTRL needs a cell that chooses slots (a RoutedCell", "GRU is none"],
    ),
    # puzzles
    Case("colours", [f"{DATA}.colors=-1"], ["data.colors must be at least 2, got -1"], config="reasoning"),
    Case("many colours", [f"{DATA}.colors=10"], ["data.colors must be at most 9, got 10"], config="reasoning"),
    Case(
        "large grids", [f"{DATA}.size=1000000000"], ["model.decoder: ", "GB was asked for at once"], config="reasoning"
    ),
    Case(
        "dropout",
        [f"{DATA}.demo_dropout=1"],
        ["data.demo_dropout must be a probability below 1, got 1.0"],
        config="reasoning",
    ),
    Case(
        "sudoku",
        ["--data=SudokuDataModule", f"{DATA}.size=5"],
        ["data.size: needs one of 4, 6, 9, got 5"],
        config="bare",
    ),
    Case(
        "clues",
        ["--data=SudokuDataModule", f"{DATA}.clues_min=20"],
        ["clues must be clues_min <= clues_max < 16, got 20 and 8"],
        config="bare",
    ),
    Case(
        "maze",
        ["--data=MazeDataModule", f"{DATA}.size=3", f"{DATA}.min_path=100"],
        ["data.min_path must be at most 6, the longest path for size 3"],
        config="bare",
    ),
    Case("width", [f"{DECODER}.width=0"], ["model.decoder.width must be at least 1, got 0"], config="reasoning"),
    Case(
        "heads",
        [f"{DECODER}.heads=3"],
        ["model.decoder.heads must divide the width (8, decoder.width for encoders too), got 3"],
        config="reasoning",
    ),
    Case("cycles", [f"{DECODER}.l_cycles=0"], ["model.decoder.l_cycles must be at least 1, got 0"], config="reasoning"),
    Case(
        "expansion",
        [f"{DECODER}.expansion=-1"],
        ["model.decoder.expansion must be a finite number above 0"],
        config="reasoning",
    ),
    Case("positions", [f"{DECODER}.positions=no"], ["model.decoder.positions"], config="reasoning"),
    Case(
        "heads of an encoder",
        ["--model.encoder.heads=3"],
        ["model.encoder.heads must divide the width (8, decoder.width for encoders too), got 3"],
        config="reasoning",
    ),
    Case(
        "exploration",
        ["--model.halting.exploration=2"],
        ["model.halting.exploration must be a probability, got 2.0"],
        config="reasoning",
    ),
    Case(
        "evaluation",
        ["--model.evaluation_steps=[0]"],
        ["model.evaluation_steps must be at least 1, got 0"],
        "validate",
        "reasoning",
    ),
    Case(
        "embedding",
        ["--model.embedding_optimizer=SignSGD"],
        ["embedding_optimizer is for a PuzzleEmbedding"],
        config="reasoning",
    ),
    Case(
        "cached",
        ["--model.encoder=IterativeEncoder", "--model.mode=cached"],
        ["model.mode 'cached' encodes a puzzle once"],
        config="bare",
    ),
    Case(
        "distances of puzzles",
        ["--trainer.callbacks=AccuracyByDistance"],
        ["AccuracyByDistance needs a data module whose task has gaps"],
        config="reasoning",
    ),
]


@table(CASES)
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], case: Case) -> None:
    run(case, here, capsys)
