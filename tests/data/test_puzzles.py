"""DataModules of puzzles: what loaders deliver to each rank, and what stays the same."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.data import (
    ArcDataModule,
    MazeDataModule,
    PuzzleBatch,
    PuzzleDataModule,
    PuzzleDemoDataModule,
    PuzzleStream,
    SudokuDataModule,
)
from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleTask, RulePuzzles
from tests.tasks.puzzles.arc_case import content, write

SMALL: dict[str, Any] = {"size": 2, "colors": 3, "train_rules": 4, "held_out_rules": 2, "demos": 2}
SPLITS = ["held_out", "train_rules", "shuffled_demos"]


def data(rank: int = 0, world_size: int = 1, **options: Any) -> PuzzleDemoDataModule:
    made = PuzzleDemoDataModule(**{**SMALL, **options})
    trainer = SimpleNamespace(global_rank=rank, world_size=world_size, lightning_module=None)
    made.trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
    return made


def batches(module: PuzzleDataModule, loader: Any) -> list[PuzzleBatch]:
    made = [module.on_after_batch_transfer(request, 0) for request in loader]
    assert all(isinstance(batch, PuzzleBatch) for batch in made)
    return made  # type: ignore[return-value]


def stream(module: PuzzleDataModule) -> PuzzleStream:
    made = module.on_after_batch_transfer(next(iter(module.train_dataloader())), 0)
    assert isinstance(made, PuzzleStream)
    return made


def everything(made: list[PuzzleBatch]) -> Puzzles:
    return Puzzles(*(torch.cat(parts) for parts in zip(*(batch.puzzles for batch in made), strict=True)))


def same(one: Puzzles, two: Puzzles) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def rows(puzzles: Puzzles) -> set[bytes]:
    """Queries and answers."""
    return {row.numpy().tobytes() for row in torch.cat([puzzles.inputs, puzzles.labels], 1)}


# ---- evaluation


@pytest.mark.parametrize("size", [1, 4, 7, 12, 13])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_an_evaluation_set(size: int, ranks: int):
    """Every puzzle once, in as many batches on each."""
    options = {"validation_size": size, "validation_batch_size": 3}
    modules = [data(rank, ranks, **options) for rank in range(ranks)]
    [alone] = [data(**options)]
    for number, loader in enumerate(alone.val_dataloader()):
        whole = everything(batches(alone, loader))
        assert len(whole.inputs) == size
        shares = [module.val_dataloader()[number] for module in modules]
        assert {len(share) for share in shares} == {-(-size // (3 * ranks))}
        made = [batches(module, share) for module, share in zip(modules, shares, strict=True)]
        assert [len(share) for share in shares] == [len(share) for share in made]
        found: list[int] = []
        for batch in (batch for of_rank in made for batch in of_rank):
            assert 1 <= len(batch.index) <= 3
            assert torch.equal(batch.puzzles.valid, batch.index >= 0)
            there = batch.index[batch.index >= 0]
            assert len(there) in (0, len(batch.index))  # padding where there would be no row else
            found += there.tolist()
            assert same(batch.puzzles.rows(batch.index >= 0), whole.rows(there))
        assert sorted(found) == list(range(size))


def test_padding_stands_alone():
    module = data(1, 2, validation_size=4, validation_batch_size=3)
    assert [batch.index.tolist() for batch in batches(module, module.val_dataloader()[0])] == [[3]]
    module = data(1, 2, validation_size=3, validation_batch_size=3)
    [batch] = batches(module, module.val_dataloader()[0])
    assert batch.index.tolist() == [-1]
    assert not batch.puzzles.valid.any()


def test_evaluation_sets_are_the_same_at_every_call_and_apart_from_training():
    options: dict[str, Any] = {"size": 4, "colors": 5, "train_rules": 96, "held_out_rules": 24}  # 5^16 grids
    module, again, other = data(**options), data(**options), data(seed=1, **options)

    def sets(module: PuzzleDataModule, loaders: Any) -> list[Puzzles]:
        return [everything(batches(module, loader)) for loader in loaders]

    validation = sets(module, module.val_dataloader())
    stream(module).draw(torch.arange(50))
    for made in (
        sets(module, module.val_dataloader()),
        sets(module, module.test_dataloader()),
        sets(again, again.val_dataloader()),
    ):
        assert all(same(one, two) for one, two in zip(made, validation, strict=True))
    assert same(everything(batches(module, module.predict_dataloader())), validation[0])
    assert not same(sets(other, other.val_dataloader())[0], validation[0])
    trained = rows(stream(module).draw(torch.arange(2000)))
    assert len(trained) == 2000
    assert not any(trained & rows(evaluated) for evaluated in validation)
    held_out, train_rules, shuffled = validation
    assert not rows(held_out) & rows(train_rules)
    assert rows(held_out) == rows(shuffled)  # the control differs in the demonstrations' answers alone
    assert torch.equal(held_out.demo_inputs, shuffled.demo_inputs)
    assert not torch.equal(held_out.demo_labels, shuffled.demo_labels)


def test_sizes_of_evaluation_sets(tmp_path: Path):
    def sizes(module: PuzzleDataModule) -> list[int]:
        return [len(everything(batches(module, loader)).inputs) for loader in module.val_dataloader()]

    write(tmp_path, "training", {"a": content(0), "b": content(1, 3, 2)})
    arc: dict[str, Any] = {"source": str(write(tmp_path, "evaluation", {"c": content(2)})), "max_size": 6}
    assert sizes(data()) == [512] * 3  # of an endless set
    assert sizes(data(validation_size=600)) == [600] * 3
    assert sizes(SudokuDataModule(puzzles=5, held_out=9)) == [9]  # all of another
    assert sizes(SudokuDataModule(puzzles=5, held_out=9, validation_size=4)) == [4]
    assert sizes(SudokuDataModule(puzzles=5, held_out=9, validation_size=400)) == [9]  # there are no more
    assert sizes(MazeDataModule(size=3, validation_size=5)) == [5]
    assert sizes(ArcDataModule(**arc)) == [1, 3, 1]
    assert sizes(ArcDataModule(**arc, validation_size=2)) == [1, 2, 1]
    assert ArcDataModule(**arc).validation_names == data().validation_names == SPLITS


# ---- training


def test_a_training_epoch_is_turns_of_the_stream():
    module = data(batches_per_epoch=7, batch_size=3)
    loader = module.train_dataloader()
    assert len(loader) == len(list(loader)) == len(list(loader)) == 7
    made = [module.on_after_batch_transfer(item, 0) for item in loader]
    assert len({batch.identity for batch in made if isinstance(batch, PuzzleStream)}) == 1
    assert all(isinstance(batch, PuzzleStream) for batch in made)
    loader.load_state_dict(loader.state_dict())  # its position is the lanes' own
    assert len(list(loader)) == 7


def test_lanes_of_all_ranks_draw_what_one_process_draws():
    alone, ranks = stream(data(batch_size=6)), [stream(data(rank, 3, batch_size=2)) for rank in range(3)]
    assert {part.identity for part in [alone, *ranks]} == {alone.identity}
    assert [part.lanes for part in ranks] == [6] * 3
    first = torch.cat([part.first() for part in ranks])
    assert first.tolist() == alone.first().tolist() == list(range(6))
    for turn in range(3):  # each lane's next puzzle
        together = [part.draw(part.first() + turn * part.lanes) for part in ranks]
        whole = alone.draw(alone.first() + turn * alone.lanes)
        assert same(whole, Puzzles(*(torch.cat(parts) for parts in zip(*together, strict=True))))


def test_the_identity_tells_streams_apart():
    others = [data(), data(seed=1), data(batch_size=3), data(demo_dropout=0.5), data(0, 2)]
    assert len({stream(module).identity for module in others}) == len(others)
    assert stream(data(validation_size=3)).identity == stream(data(batches_per_epoch=2)).identity


def test_a_stream_is_drawn_from_the_training_set_of_its_seed():
    index = torch.tensor([5, 0, 99])
    made, task = stream(data(seed=3)), data().task
    assert same(made.draw(index), task.draw("train", 3, index))
    assert not same(made.draw(index), task.draw("train", 0, index))


# ---- questions


@pytest.fixture
def question(tmp_path: Path) -> str:
    pair = {"input": [[0, 1], [2, 0]], "output": [[1, 1], [2, 2]]}
    path = tmp_path / "question.json"
    path.write_text(json.dumps({"train": [pair], "test": [pair, {"input": pair["output"]}, pair]}))
    return str(path)


def test_the_puzzles_of_a_file_are_shared_out_between_the_ranks(question: str):
    module = data(puzzle=question, validation_batch_size=2)
    made = batches(module, module.predict_dataloader())
    assert [batch.index.tolist() for batch in made] == [[0, 1], [2]]
    assert everything(made).inputs.tolist() == [[2, 3, 4, 2], [3, 3, 4, 4], [2, 3, 4, 2]]
    assert everything(made).valid.tolist() == [True, False, True]
    ranks = [data(rank, 4, puzzle=question, validation_batch_size=1) for rank in range(4)]
    shares = [batches(module, module.predict_dataloader()) for module in ranks]
    assert [[batch.index.tolist() for batch in share] for share in shares] == [[[0]], [[1]], [[2]], [[-1]]]
    assert same(everything([batch for share in shares[:3] for batch in share]), everything(made))


def test_a_file_changes_nothing_but_prediction(question: str):
    asked, plain = data(puzzle=question), data()
    assert stream(asked).identity == stream(plain).identity
    pair = [everything(batches(module, module.val_dataloader()[0])) for module in (asked, plain)]
    assert same(*pair)


def test_a_file_that_is_missing_or_bad_is_refused_at_once(tmp_path: Path):
    gone = tmp_path / "gone.json"
    with pytest.raises(FileNotFoundError, match=r'data\.puzzle: there is no file .*gone\.json: name .*"train": \['):
        data(puzzle=str(gone))
    with pytest.raises(FileNotFoundError, match=r"data\.puzzle: .* is a folder: name a JSON file"):
        data(puzzle=str(tmp_path))  # a folder
    gone.write_text("[")
    with pytest.raises(ValueError, match=r"gone\.json: not JSON"):
        data(puzzle=str(gone))


# ---- options


@pytest.mark.parametrize("option", ["batch_size", "batches_per_epoch", "validation_size", "validation_batch_size"])
def test_bad_options_are_refused(option: str):
    with pytest.raises(ValueError, match=f"^{option} must be at least 1, got 0$"):
        PuzzleDemoDataModule(**{**SMALL, option: 0})
    with pytest.raises(TypeError, match=rf"^{option} must be an integer, got 1\.5$"):
        PuzzleDemoDataModule(**{**SMALL, option: 1.5})


def test_an_unknown_option_is_refused():
    for module in (PuzzleDemoDataModule, SudokuDataModule, MazeDataModule, ArcDataModule):
        with pytest.raises(TypeError, match="batchsize"):
            module(batchsize=3)


def test_options_of_the_task_reach_it():
    demos = PuzzleDemoDataModule("pattern", 5, 3, 11, 12, 2, 0.25)
    assert demos.task == RulePuzzles("pattern", 5, 3, 11, 12, 2, 0.25)
    assert repr(SudokuDataModule(6, 12, 20, 7, 8, False).task) == (
        "Sudoku(size=6, clues_min=12, clues_max=20, puzzles=7, held_out=8, augment=False)"
    )
    assert repr(MazeDataModule(11, 4).task) == "Maze(size=11, min_path=4)"
    options: dict[str, Any] = {
        "max_size": 7,
        "groups": 4,
        "held_out_groups": 3,
        "protocol": "transductive",
        "queries": "test",
        "max_demos": 9,
        "demo_dropout": 0.25,
        "shuffle_demos": False,
        "dihedral": False,
        "colors": False,
        "translate": False,
        "augmentations": 3,
        "votes": 2,
    }
    task = ArcDataModule("arc1", **options).task
    assert {name: getattr(task, name) for name in options} == options


def test_it_can_be_printed_and_knows_its_sizes():
    module = data(seed=4, batch_size=9)
    assert str(module) == f"PuzzleDemoDataModule({module.task!r}, seed=4, batch_size=9)"
    assert module.shape == module.task.shape
    assert str(MazeDataModule()).startswith("MazeDataModule(Maze(size=9")


class Counting(PuzzleTask):
    """Puzzle i has the number i in its one cell; set "odd" has five."""

    @property
    def shape(self):
        return RulePuzzles(size=2).shape

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        return ("odd",)

    def sample(self, split: str, seed: int, index: Tensor) -> Puzzles:
        grid = index[:, None].expand(-1, 4)
        return Puzzles(grid, grid, grid[:, None], grid[:, None], torch.ones(len(index), 1, dtype=torch.bool), index)

    def count(self, split: str) -> int | None:
        return 5


def test_any_task_will_do():
    module = PuzzleDataModule(Counting(), validation_batch_size=2)
    made = batches(module, module.val_dataloader()[0])
    assert [batch.puzzles.identity.tolist() for batch in made] == [[0, 1], [2, 3], [4]]
    assert module.validation_names == ["odd"]
