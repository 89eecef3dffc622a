"""Pass@k and the submission, in runs of a module that knows the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rtrl_moe_pl.modules import ArcEvaluation
from rtrl_moe_pl.reasoning.evaluator import ArcEvaluator
from tests.modules.arc_helpers import Oracle, arc_data
from tests.modules.helpers import trainer
from tests.modules.reasoning_helpers import data, module
from tests.tasks.puzzles.arc_case import content

HELD_OUT = {"a": content(1, 2, 2), "b": content(2), "c": content(3), "d": content(4, answered=False)}


def evaluate(command: str, folder: Path, fails: int | None = None, **options: Any) -> dict[str, float]:
    """What a run of ``validate`` or ``test`` logs."""
    puzzles = arc_data(folder / "arc", options.pop("held_out", HELD_OUT), **options.pop("data", {}))
    made = trainer(folder, limit_val_batches=1.0, callbacks=[ArcEvaluation()], **options)
    getattr(made, command)(Oracle(puzzles, fails), datamodule=puzzles, verbose=False)
    return {name: float(value) for name, value in made.callback_metrics.items()}


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_pass_at_k_is_logged_with_its_denominator(tmp_path: Path, command: str, stage: str) -> None:
    """Of answers under q-halt: those of the last step are wrong."""
    found = evaluate(command, tmp_path, fails=2)
    for k in (1, 2, 5, 10, 100):
        assert found[f"{stage}/held_out/pass@{k}"] == pytest.approx(2 / 3)  # a and c; of d no answer is known
        assert found[f"{stage}/train_rules/pass@{k}"] == 1
    assert found[f"{stage}/held_out/tasks"] == 3
    assert found[f"{stage}/held_out/test_inputs"] == 4
    assert found[f"{stage}/train_rules/tasks"] == 1
    assert found[f"{stage}/held_out/exact_accuracy_max_steps"] == 0


def test_every_evaluation_is_counted_anew(tmp_path: Path) -> None:
    puzzles = arc_data(tmp_path, HELD_OUT)
    made = trainer(tmp_path, limit_val_batches=1.0, callbacks=[ArcEvaluation()])
    for fails, solved in ((None, 1), (2, 2 / 3), (None, 1)):
        [figures, *_] = made.validate(Oracle(puzzles, fails), datamodule=puzzles, verbose=False)
        assert figures["val/held_out/pass@1"] == pytest.approx(solved)
        assert figures["val/held_out/test_inputs"] == 4


def test_only_what_was_evaluated_counts(tmp_path: Path) -> None:
    found = evaluate("validate", tmp_path, fails=None, data={"validation_size": 1})
    assert found["val/held_out/tasks"] == found["val/held_out/pass@1"] == 1


def test_where_nothing_can_be_scored_there_are_no_figures(tmp_path: Path) -> None:
    found = evaluate("validate", tmp_path, held_out={"d": content(4, answered=False)})
    assert not [name for name in found if name.startswith("val/held_out/pass")]
    assert found["val/held_out/tasks"] == 0
    assert found["val/train_rules/pass@1"] == 1


def test_under_augmentation_answers_are_turned_back_and_vote(tmp_path: Path) -> None:
    options = {"votes": 3, "dihedral": True, "colors": True}
    found = evaluate("validate", tmp_path, data=options)
    assert found["val/held_out/pass@1"] == 1
    assert found["val/held_out/test_inputs"] == 4


def test_the_submission_is_written_after_test_and_never_over_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate("validate", tmp_path)
    path = tmp_path / "submission.json"
    assert not path.exists()
    evaluate("test", tmp_path)
    assert f"submission: {path}" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert set(found) == {"a", "b", "c", "d"}  # the answer to d is asked for, too
    assert [list(test) for test in found["a"]] == [["attempt_1", "attempt_2"]] * 2
    for name in ("a", "b", "c"):
        answers = [pair["output"] for pair in HELD_OUT[name]["test"]]
        assert [test["attempt_1"] for test in found[name]] == answers
    before = path.read_bytes()
    monkeypatch.setattr(ArcEvaluator, "update", None)  # it is refused before anything is evaluated
    with pytest.raises(FileExistsError, match=r"submission\.json exists and is not overwritten"):
        evaluate("test", tmp_path, fails=2)
    assert path.read_bytes() == before


def test_a_trial_writes_nothing(tmp_path: Path) -> None:
    evaluate("test", tmp_path, fast_dev_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["arc"]


def test_it_is_logged_while_training(tmp_path: Path) -> None:
    puzzles = arc_data(tmp_path, HELD_OUT)
    made = trainer(tmp_path, max_steps=2, limit_val_batches=1.0, num_sanity_val_steps=1, callbacks=[ArcEvaluation()])
    made.fit(Oracle(puzzles, fails=1), datamodule=puzzles)
    assert float(made.callback_metrics["val/held_out/pass@1"]) == pytest.approx(2 / 3)


def test_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^ArcEvaluation needs an ArcDataModule, got PuzzleDemoDataModule$"):
        trainer(tmp_path, callbacks=[ArcEvaluation()]).fit(module(), datamodule=data())
