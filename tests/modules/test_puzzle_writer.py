"""What ``predict`` writes, prints and draws of puzzles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure

from rtrl_moe_pl.data import PuzzleDataModule
from rtrl_moe_pl.data.puzzles import PuzzleBatch
from rtrl_moe_pl.modules import ReasoningModule
from rtrl_moe_pl.modules.puzzle_drawing import puzzle_figure
from rtrl_moe_pl.modules.puzzle_writer import PuzzleWriter
from rtrl_moe_pl.reasoning import PuzzleEmbedding
from rtrl_moe_pl.tasks.puzzles import IGNORED, Puzzles
from tests.modules.arc_helpers import Oracle, arc_data
from tests.modules.helpers import trainer
from tests.modules.reasoning_helpers import data, module
from tests.tasks.puzzles.arc_case import content

BEFORE, AFTER = [[0, 1], [2, 0]], [[1, 1], [2, 2]]


def thoughtful() -> ReasoningModule:
    """An untrained module that halts after different numbers of steps."""
    model = module(seed=3)
    torch.nn.init.normal_(model.decoder.halt_head.weight)
    halt = model(data().task.draw("held_out", 0, torch.arange(40))).halt
    with torch.no_grad():
        model.decoder.halt_head.bias[0] -= halt.quantile(0.7)
    return model.eval()


def predict(folder: Path, model: ReasoningModule, puzzles: PuzzleDataModule, **options: Any) -> list[dict[str, Any]]:
    made = trainer(folder, callbacks=[PuzzleWriter()], **options)
    made.predict(model, datamodule=puzzles, return_predictions=False)
    [path] = folder.glob("predictions*.json")
    return json.loads(path.read_text())


def saved(folder: Path, *test: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "question.json"
    path.write_text(json.dumps({"train": [{"input": BEFORE, "output": AFTER}], "test": test}))
    return str(path)


def plain(printed: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", printed)


def expected(model: ReasoningModule, puzzles: Puzzles) -> list[dict[str, Any]]:
    """What the file should say, by the module's own forward and the definition of q-halt."""
    thoughts, answers = model(puzzles), []
    for row in range(len(puzzles.inputs)):
        halt = thoughts.halt[:3, row].tolist()
        step = next((i for i, q in enumerate(halt) if q > 0), 2)
        said = thoughts.predictions[step, row]
        probability = float(torch.tensor(halt[step]).sigmoid())
        answer = {"puzzle": row, "answer": (said - 2).clamp(min=-1).view(2, 2).tolist(), "step": step + 1}
        answer["q_halt_probability"] = pytest.approx(probability, abs=1e-4)
        if puzzles.labels[row, 0] != IGNORED:
            answer["correct"] = torch.equal(said, puzzles.labels[row])
        answers.append(answer)
    return answers


def test_answers_are_those_of_the_module_under_q_halt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtrl_moe_pl.modules.puzzle_writer.SHOWN", 0)
    model, puzzles = thoughtful(), data(validation_size=40, validation_batch_size=9)
    asked = puzzles.task.draw("held_out", puzzles.evaluation_seed, torch.arange(40))
    found = predict(tmp_path, model, puzzles)
    assert found == expected(model, asked)
    assert len({answer["step"] for answer in found}) > 1
    assert len({str(answer["answer"]) for answer in found}) > 1


def test_right_and_wrong_answers_are_told_apart(tmp_path: Path) -> None:
    """A question that asks for what the model says, one that asks for something else, one of unknown answer."""
    model = thoughtful()
    asked = saved(tmp_path / "a", {"input": BEFORE})
    (tmp_path / "first").mkdir()
    [first] = predict(tmp_path / "first", model, data(puzzle=asked))
    right = [[max(0, number) for number in row] for row in first["answer"]]
    assert right == first["answer"]  # all of it numbers, so that it can be asked for
    wrong = [[(number + 1) % 3 for number in row] for row in right]
    tests = ({"input": BEFORE, "output": wrong}, {"input": BEFORE}, {"input": BEFORE, "output": right})
    (tmp_path / "second").mkdir()
    found = predict(tmp_path / "second", model, data(puzzle=saved(tmp_path / "b", *tests)))
    assert [answer.get("correct") for answer in found] == [False, None, True]
    assert "correct" not in first
    assert [answer["answer"] for answer in found] == [right] * 3


def test_the_file_is_a_list_with_a_line_for_every_puzzle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtrl_moe_pl.modules.puzzle_writer.SHOWN", 0)
    found = predict(tmp_path, thoughtful(), data())
    lines = (tmp_path / "predictions.json").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("[", "]")
    assert [json.loads(line.removesuffix(",")) for line in lines[1:-1]] == found
    assert len(found) == 7
    assert not list(tmp_path.glob("*.png"))


def test_the_first_few_are_printed_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rtrl_moe_pl.modules.puzzle_writer.SHOWN", 4)  # more than a batch of three
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    found = predict(tmp_path, thoughtful(), data())
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"prediction_{i}.png" for i in range(4)]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.glob("*.png"))
    printed = capsys.readouterr().out
    assert "\x1b[48;2;" in printed
    heads = [line for line in plain(printed).splitlines() if line.startswith("puzzle ")]
    assert heads == [
        f"puzzle {answer['puzzle']}: answer of step {answer['step']}, "
        f"q_halt probability {answer['q_halt_probability']:.0%}, {'right' if answer['correct'] else 'wrong'}"
        for answer in found[:4]
    ]
    assert plain(printed).splitlines()[-2:] == [
        "only the first 4 puzzles are shown and drawn",
        f"predictions: {tmp_path / 'predictions.json'}",
    ]


def test_a_question_is_printed_with_its_answer_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    puzzles = data(puzzle=saved(tmp_path / "a", {"input": [[2, 1], [0, 1]]}))
    (tmp_path / "runs").mkdir()
    [answer] = predict(tmp_path / "runs", thoughtful(), puzzles)
    printed = capsys.readouterr().out
    lines = [line.strip() for line in printed.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("puzzle 0: answer of step"))
    assert lines[first].endswith("%")  # neither right nor wrong
    rows = ["  ".join(map(str, row)) for row in answer["answer"]]
    assert lines[first + 1 : first + 7] == ["query:", "2  1", "0  1", "", "answer:", *rows[:1]]
    assert "only the first" not in printed


@pytest.mark.parametrize(("terminal", "no_color"), [(False, ""), (True, "1")], ids=["a pipe", "NO_COLOR"])
def test_without_colours_there_are_symbols_alone(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    no_color: str,
) -> None:
    """Regression: a file or pipe got colour codes."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    predict(tmp_path, thoughtful(), data(validation_size=1))
    printed = capsys.readouterr().out
    assert "query:" in printed
    assert "\x1b" not in printed


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is drawn, without drawing it."""
    drawn: list[tuple[Any, ...]] = []

    def draw(*arguments: Any) -> Figure:
        drawn.append(arguments)
        return Figure()

    monkeypatch.setattr("rtrl_moe_pl.modules.puzzle_writer.puzzle_figure", draw)
    return drawn


def test_a_picture_says_which_puzzle_it_is_how_it_was_answered_and_by_which_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, model, puzzles = watched(monkeypatch), thoughtful(), data()
    made = trainer(tmp_path, callbacks=[PuzzleWriter()], max_steps=1)
    made.fit(model, datamodule=puzzles)
    made.save_checkpoint(tmp_path / "best-step=1.ckpt")
    made = trainer(tmp_path, callbacks=[PuzzleWriter()])
    made.predict(
        model, datamodule=puzzles, ckpt_path=tmp_path / "best-step=1.ckpt", return_predictions=False, weights_only=True
    )
    found = json.loads((tmp_path / "predictions.json").read_text())
    asked = puzzles.task.draw("held_out", puzzles.evaluation_seed, torch.arange(7))
    for answer, (task, shown, thoughts, step, names, title) in zip(found, drawn, strict=True):
        assert (task, names, step.tolist()) == (puzzles.task, [""], [answer["step"] - 1])
        assert torch.equal(shown.inputs[0], asked.inputs[answer["puzzle"]])
        assert task.to_grid(thoughts.at(step)[0]) == answer["answer"]
        assert title == (
            f"puzzle {answer['puzzle']}: answer of step {answer['step']}, q_halt probability "
            f"{answer['q_halt_probability']:.0%}, {'right' if answer['correct'] else 'wrong'}, "
            "with the weights of best-step=1.ckpt"
        )


def test_of_an_arc_answer_only_what_is_the_answer_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is trained on nothing outside of a grid's border: there it says anything."""
    drawn = watched(monkeypatch)
    puzzles = arc_data(tmp_path / "arc", {"a": content(5)})
    (tmp_path / "runs").mkdir()
    [found] = predict(tmp_path / "runs", Oracle(puzzles), puzzles)
    assert (found["answer"], found["correct"], found["step"]) == ([[5, 0, 2]], True, 2)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    first = lines.index("answer:")
    assert lines[first : first + 3] == ["answer:", "5  0  2", ""]

    question = tmp_path / "question.json"
    question.write_text(json.dumps(content(5, answered=False)))
    puzzles = arc_data(tmp_path / "arc", {"a": content(5)}, puzzle=str(question))
    (tmp_path / "again").mkdir()
    [found] = predict(tmp_path / "again", Oracle(puzzles), puzzles)
    [_, (task, shown, thoughts, step, *titles)] = drawn
    assert (thoughts.at(step) != 0).all()  # noise
    [axes] = puzzle_figure(task, shown, thoughts, step, *titles).axes
    [cells] = [artist for artist in axes.collections if artist.get_gid() == "cells"]
    pairs = 3 * 2 * 3 + 3
    by_step = [sum(map(len, task.to_grid(tokens))) for tokens in thoughts.predictions[:, 0]]
    assert len(cells.get_paths()) == pairs + sum(by_step)  # demonstrations and query, and answers alone


def test_all_answers_are_written_before_a_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a fault of a picture lost all predictions."""

    def broken(*arguments: Any) -> Figure:
        assert len(json.loads((tmp_path / "predictions.json").read_text())) == 7
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rtrl_moe_pl.modules.puzzle_writer.puzzle_figure", broken)
    monkeypatch.setattr("rtrl_moe_pl.modules.puzzle_writer.SHOWN", 1)
    with pytest.warns(UserWarning, match=r"no picture .*prediction_0\.png, but the run goes on: OSError: \[Errno 28\]"):
        assert len(predict(tmp_path, thoughtful(), data())) == 7


def test_answers_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    class Full(PuzzleWriter):
        def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
            super().on_predict_start(trainer, pl_module)
            self.path = tmp_path / "gone/predictions.json"

    with pytest.raises(OSError, match="gone"):
        trainer(tmp_path, callbacks=[Full()]).predict(thoughtful(), datamodule=data(), return_predictions=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_names_all_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(Trainer, "world_size", 2)
    monkeypatch.setattr(Trainer, "global_rank", rank)
    monkeypatch.setattr(Trainer, "is_global_zero", rank == 0)
    writer, made = PuzzleWriter(), trainer(tmp_path)
    puzzles, model = data(), thoughtful()
    made.datamodule = puzzles  # type: ignore[attr-defined]
    writer.on_predict_start(made, model)
    asked = puzzles.task.draw("held_out", 0, torch.arange(2))
    writer.on_predict_batch_end(made, model, model(asked), PuzzleBatch(torch.arange(2), asked), 0)
    writer.on_predict_end(made, model)
    assert [path.name for path in tmp_path.glob("*.json")] == [f"predictions_rank{rank}.json"]
    last = capsys.readouterr().out.splitlines()[-2:]
    everything = f"predictions: {tmp_path / 'predictions_rank*.json'}"
    assert last == ([] if rank else ["only the first 2 puzzles of rank 0 are shown and drawn", everything])


def test_nothing_is_written_over_and_nothing_predicted_in_vain(tmp_path: Path) -> None:
    predict(tmp_path, thoughtful(), data(validation_size=1))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"predictions\.json exists and is not overwritten"):
        predict(tmp_path, thoughtful(), data(validation_size=2))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_puzzle_embedding_is_asked_nothing_new_and_nothing_is_left_behind(tmp_path: Path) -> None:
    puzzles = data(puzzle=saved(tmp_path / "a", {"input": BEFORE}))
    with pytest.raises(ValueError, match=r"^data\.puzzle: a PuzzleEmbedding knows the puzzles it was trained on"):
        predict(tmp_path / "runs", module(PuzzleEmbedding), puzzles)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "other").mkdir()
    assert len(predict(tmp_path / "other", module(PuzzleEmbedding), data(validation_size=1))) == 1
