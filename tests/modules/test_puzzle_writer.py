"""What ``predict`` writes, prints and draws of puzzles."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rtrl_moe_pl.data import PuzzleDataModule
from rtrl_moe_pl.modules import ReasoningModule
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
        answer["probability"] = pytest.approx(probability, abs=1e-4)
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
    found = predict(tmp_path, thoughtful(), data())
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"prediction_{i}.png" for i in range(4)]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.glob("*.png"))
    printed = capsys.readouterr().out
    assert "\x1b[48;2;" in printed
    heads = [line for line in plain(printed).splitlines() if line.startswith("puzzle ")]
    assert heads == [
        f"puzzle {answer['puzzle']}: query, and the answer of step {answer['step']}, {answer['probability']:.0%} sure, "
        f"{'right' if answer['correct'] else 'wrong'}"
        for answer in found[:4]
    ]
    assert plain(printed).rstrip().endswith(f"predictions: {tmp_path / 'predictions.json'}")


def test_a_question_is_printed_with_its_answer_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    puzzles = data(puzzle=saved(tmp_path / "a", {"input": [[2, 1], [0, 1]]}))
    (tmp_path / "runs").mkdir()
    [answer] = predict(tmp_path / "runs", thoughtful(), puzzles)
    lines = [line.strip() for line in plain(capsys.readouterr().out).splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("puzzle 0: query"))
    assert lines[first].endswith("% sure")  # neither right nor wrong
    rows = ["  ".join(map(str, row)) for row in answer["answer"]]
    assert lines[first + 1 : first + 6] == ["2  1", "0  1", "", *rows]


def test_of_an_arc_answer_only_what_is_the_answer_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is trained on nothing outside of a grid's border: there it says anything."""
    drawn: list[torch.Tensor] = []

    def watched(puzzles: Puzzles, thoughts: Any, *arguments: Any) -> Any:
        drawn.append(thoughts.predictions)
        return type("Figure", (), {"savefig": lambda *_, **__: None})()

    monkeypatch.setattr("rtrl_moe_pl.modules.puzzle_writer.puzzle_figure", watched)
    puzzles = arc_data(tmp_path / "arc", {"a": content(5)})
    (tmp_path / "runs").mkdir()
    [found] = predict(tmp_path / "runs", Oracle(puzzles), puzzles)
    assert (found["answer"], found["correct"], found["step"]) == ([[5, 0, 2]], True, 2)
    lines = [line.strip() for line in plain(capsys.readouterr().out).splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("puzzle 0: query"))
    assert lines[first + 3 : first + 6] == ["5  0  2", "", f"predictions: {tmp_path / 'runs' / 'predictions.json'}"]
    assert (drawn[0][1, 0].view(4, 4) != 0).sum() > 7  # what is known to be asked for the figure itself masks

    question = tmp_path / "question.json"
    question.write_text(json.dumps(content(5, answered=False)))
    puzzles = arc_data(tmp_path / "arc", {"a": content(5)}, puzzle=str(question))
    (tmp_path / "again").mkdir()
    [found] = predict(tmp_path / "again", Oracle(puzzles), puzzles)
    shown = torch.tensor(found["answer"])
    canvas = drawn[1][1, 0].view(4, 4)
    assert torch.equal(canvas[: shown.shape[0], : shown.shape[1]], 2 + shown)
    assert int((canvas != 0).sum()) == shown.numel()


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
