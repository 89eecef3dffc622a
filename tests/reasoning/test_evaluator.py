import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rtrl_moe_pl.reasoning.evaluator import ArcEvaluator, write_submission
from rtrl_moe_pl.tasks.puzzles.arc import ArcPuzzles
from rtrl_moe_pl.tasks.puzzles.base import IGNORED
from rtrl_moe_pl.tasks.puzzles.grids import COLOR, EOS
from tests.tasks.puzzles.arc_case import content, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory: pytest.TempPathFactory) -> ArcPuzzles:
    """40 held-out tasks of one test input, one vote each."""
    return tasks(tmp_path_factory.mktemp("arc"), {f"t{i:02}": content(1 + i // 9, 2, 1) for i in range(40)})


def tasks(folder: Path, held_out: dict, **options) -> ArcPuzzles:
    write(folder, "training", {"train": content(0)})
    return ArcPuzzles(source=str(write(folder, "evaluation", held_out)), max_size=6, **options)


def answers(puzzles: ArcPuzzles, index: Tensor, split: str = "held_out") -> Tensor:
    """What a perfect model puts out: the labels, and noise where nothing is asked."""
    labels = puzzles.sample(split, 0, index).labels
    return torch.where(labels == IGNORED, torch.randint(12, labels.shape), labels)


def wrong(predictions: Tensor, color: int) -> Tensor:
    """The last cell of an answer of one row and three columns in another colour."""
    changed = predictions.clone()
    changed[:, 2] = COLOR + color
    return changed


def figures(evaluator: ArcEvaluator) -> dict[str, float]:
    return {name: float(value) for name, value in evaluator.compute().items()}


# ---- augmentations


def test_answers_under_every_augmentation_vote_for_one_candidate():
    puzzles = ArcPuzzles(max_size=10, groups=3, held_out_groups=12, votes=9)
    size = puzzles.count("held_out")
    assert size is not None
    index = torch.arange(size)
    evaluator = ArcEvaluator(puzzles)
    evaluator.update(index, answers(puzzles, index), torch.zeros(size))
    ranking = evaluator._ranking()
    assert {len(candidates) for candidates in ranking.values()} == {1}
    found = figures(evaluator)
    assert found["pass@1"] == found["pass@100"] == 1
    assert (found["tasks"], found["test_inputs"]) == (12, len(ranking))
    # a model that does not augment its answer along with the question is believed once, without augmentation
    plain = ArcEvaluator(puzzles)
    start = index - torch.arange(size) % 9
    assert torch.equal(puzzles.origin("held_out", 0, start).group, puzzles.origin("held_out", 0, index).group)
    plain.update(index, answers(puzzles, start), torch.zeros(size))
    assert max(len(candidates) for candidates in plain._ranking().values()) > 5


# ---- ranking


def voted(tmp_path: Path, votes: list[tuple[int, float]]) -> ArcEvaluator:
    """One question, asked as often as there are votes: which colour the last cell gets, 2 is right; and q_halt."""
    puzzles = tasks(tmp_path, {"a": content(1)}, votes=len(votes), dihedral=False)
    index = torch.arange(len(votes))
    origin = puzzles.origin("held_out", 0, index)
    color = origin.permutation.gather(1, torch.tensor([[color] for color, _ in votes]))[:, 0]
    predictions = answers(puzzles, index)
    predictions[:, 2] = COLOR + color
    evaluator = ArcEvaluator(puzzles)
    evaluator.update(index, predictions, torch.tensor([sure for _, sure in votes]))
    return evaluator


def test_votes_come_before_confidence(tmp_path: Path):
    found = figures(voted(tmp_path, [(5, 9.0), (2, -3.0), (2, -3.0)]))
    assert found == {f"pass@{k}": 1 for k in (1, 2, 5, 10, 100)} | {"tasks": 1, "test_inputs": 1}


def test_equal_votes_are_ranked_by_mean_confidence(tmp_path: Path):
    # mean of sigmoids: .88 against .63, though the mean logits are 2 and 4
    assert figures(voted(tmp_path, [(5, 9.0), (2, 2.0), (5, -1.0), (2, 2.0), (7, 12.0)]))["pass@1"] == 1
    found = figures(voted(tmp_path / "again", [(5, 9.0), (2, 0.0), (5, -1.0), (2, 0.0), (7, 12.0)]))
    assert (found["pass@1"], found["pass@2"]) == (0, 1)


def test_full_ties_go_to_the_first_puzzle(tmp_path: Path):
    assert figures(voted(tmp_path, [(2, 1.0), (5, 1.0)]))["pass@1"] == 1
    assert figures(voted(tmp_path / "again", [(5, 1.0), (2, 1.0)]))["pass@1"] == 0


def test_pass_at_k_counts_the_first_k_candidates(tmp_path: Path):
    # six candidates, the right one the fifth
    votes = [(9, 4.0), (8, 3.0), (7, 2.0), (6, 1.0), (2, 0.0), (1, -1.0)]
    found = figures(voted(tmp_path, votes))
    assert [found[f"pass@{k}"] for k in (1, 2, 5, 10, 100)] == [0, 0, 1, 1, 1]


def test_an_answer_of_another_shape_is_another_answer_and_none_is_no_candidate(puzzles: ArcPuzzles):
    index = torch.arange(3)
    predictions = answers(puzzles, index)
    predictions[0, 3] = COLOR  # one column more: no border there
    predictions[1, 0] = EOS  # nothing at the corner
    evaluator = ArcEvaluator(puzzles)
    evaluator.update(index, predictions, torch.zeros(3))
    assert [len(candidates) for candidates in evaluator._ranking().values()] == [1, 0, 1]
    assert figures(evaluator)["pass@100"] == pytest.approx(1 / 3)


# ---- what is counted


def test_the_denominator_is_the_tasks_that_were_evaluated(puzzles: ArcPuzzles):
    """2 of 32 are 6.25 %, not 2 of the 40 there are."""
    index = torch.arange(32)
    predictions = wrong(answers(puzzles, index), 9)
    predictions[:2] = answers(puzzles, index[:2])
    evaluator = ArcEvaluator(puzzles)
    evaluator.update(index, predictions, torch.zeros(32))
    found = figures(evaluator)
    assert found["pass@1"] == found["pass@2"] == 0.0625
    assert (found["tasks"], found["test_inputs"]) == (32, 32)


def test_padding_counts_nowhere(puzzles: ArcPuzzles):
    index = torch.tensor([0, 1, -1, -1])
    predictions = answers(puzzles, index.clamp(min=0))
    predictions[1] = wrong(predictions[1:2], 9)[0]
    evaluator = ArcEvaluator(puzzles)
    evaluator.update(index, predictions, torch.zeros(4))
    evaluator.update(torch.full((4,), -1), predictions, torch.zeros(4))
    found = figures(evaluator)
    assert (found["pass@1"], found["tasks"], found["test_inputs"]) == (0.5, 2, 2)


def test_an_evaluator_of_padding_alone_has_no_figures(puzzles: ArcPuzzles):
    evaluator = ArcEvaluator(puzzles)
    evaluator.update(torch.tensor([-1]), torch.zeros(1, 36, dtype=torch.int64), torch.zeros(1))
    found = figures(evaluator)
    assert math.isnan(found["pass@1"])
    assert (found["tasks"], found["test_inputs"], evaluator.submission()) == (0, 0, {})


def test_a_task_scores_the_part_of_its_test_inputs_that_is_solved(tmp_path: Path):
    puzzles = tasks(tmp_path, {"a": content(1, 2, 2), "b": content(2), "c": content(3, answered=False)})
    index = torch.arange(4)
    origin = puzzles.origin("held_out", 0, index)
    names = [puzzles.tasks[group].name for group in origin.group.tolist()]
    predictions = answers(puzzles, index)
    for row, (name, query) in enumerate(zip(names, origin.query.tolist(), strict=True)):
        if (name, query) == ("a", 1):
            predictions[row] = wrong(predictions[row : row + 1], 9)[0]
    evaluator = ArcEvaluator(puzzles)
    evaluator.update(index, predictions, torch.zeros(4))
    found = figures(evaluator)
    assert found["pass@1"] == 0.75  # a half, b whole, c unknown; not 2 of 3 test inputs
    assert (found["tasks"], found["test_inputs"]) == (2, 3)


def test_control_and_training_sets_are_evaluated_on_their_own(puzzles: ArcPuzzles):
    for split, tasks_there in (("train_rules", 1), ("shuffled_demos", 40)):
        evaluator = ArcEvaluator(puzzles, split)
        index = torch.arange(tasks_there)
        evaluator.update(index, answers(puzzles, index, split), torch.zeros(tasks_there))
        found = figures(evaluator)
        assert (found["pass@1"], found["tasks"]) == (1, tasks_there)
    with pytest.raises(ValueError, match=r"split must be one of 'held_out', .*, got 'train'"):
        ArcEvaluator(puzzles, "train")


# ---- several processes


def halves(puzzles: ArcPuzzles, *parts: Tensor) -> list[ArcEvaluator]:
    """An evaluator per part of the index; every third answer is wrong."""
    evaluators = []
    for index in parts:
        evaluator, right = ArcEvaluator(puzzles), answers(puzzles, index)
        predictions = torch.where((index % 3 == 0)[:, None], wrong(right, 9), right)
        evaluator.update(index, predictions, index.float().sin())
        evaluators.append(evaluator)
    return evaluators


def test_two_halves_merged_are_one_and_what_overlaps_counts_once(puzzles: ArcPuzzles):
    [alone] = halves(puzzles, torch.arange(40))
    first, second = halves(puzzles, torch.arange(0, 40, 2), torch.arange(1, 40, 2))
    assert figures(second) != figures(alone)
    first.merge_state(second)
    assert figures(first) == figures(alone)
    assert first.submission() == alone.submission()
    overlapping, rest = halves(puzzles, torch.arange(30), torch.arange(20, 40))
    overlapping.merge_state(rest)
    assert figures(overlapping) == figures(alone)
    assert figures(alone)["tasks"] == 40


def test_a_puzzle_answered_twice_votes_once(tmp_path: Path):
    evaluator = voted(tmp_path, [(2, 1.0), (5, 2.0), (5, 2.0)])
    assert figures(evaluator)["pass@1"] == 0
    again = voted(tmp_path / "again", [(2, 1.0), (5, 2.0)])
    for _ in range(3):
        again.update(torch.tensor([1]), wrong(answers(again.task, torch.tensor([1])), 3), torch.zeros(1))
    assert [len(candidates) for candidates in again._ranking().values()] == [2]


PROCESS = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from rtrl_moe_pl.tasks.puzzles.arc import ArcPuzzles
from tests.reasoning.test_evaluator import figures, halves
from rtrl_moe_pl.reasoning.evaluator import ArcEvaluator
folder, store, rank, empty = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "empty"
dist.init_process_group("gloo", "file://" + store, timedelta(seconds=60), rank=rank, world_size=2)
puzzles = ArcPuzzles(source=folder, max_size=6)
parts = (torch.arange(40), None) if empty else (torch.arange(25), torch.arange(20, 40))
mine = parts[rank]
evaluator = ArcEvaluator(puzzles) if mine is None else halves(puzzles, mine)[0]
print(figures(evaluator), sorted(evaluator.submission().items()))
dist.barrier()
dist.destroy_process_group()  # else a process may be ended by its own threads
"""


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("case", ["overlap", "empty"])
def test_two_processes_find_what_one_finds(puzzles: ArcPuzzles, tmp_path: Path, case: str):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS, puzzles.source, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank), case], env=environment, stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    done = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], done[0][1][-2000:] + done[1][1][-2000:]
    [alone] = halves(puzzles, torch.arange(40))
    expected = f"{figures(alone)} {sorted(alone.submission().items())}\n"
    assert [out for out, _ in done] == [expected, expected]


# ---- submission


def test_a_submission_has_k_attempts_for_every_test_input(tmp_path: Path):
    puzzles = tasks(tmp_path, {"a": content(1, 2, 3), "b": content(2), "c": content(3, answered=False)})
    origin = puzzles.origin("held_out", 0, torch.arange(5))
    names = [puzzles.tasks[group].name for group in origin.group.tolist()]
    asked = torch.tensor(
        [
            row
            for row, (name, q) in enumerate(zip(names, origin.query.tolist(), strict=True))
            if (name, q) in {("a", 0), ("a", 1), ("c", 0)}
        ]
    )
    predictions = answers(puzzles, asked)
    unanswered = torch.tensor([names[row] == "c" for row in asked])
    predictions[unanswered] = EOS
    predictions[unanswered, :2] = COLOR + 7
    predictions[unanswered, 6:8] = COLOR + 8
    evaluator = ArcEvaluator(puzzles)
    evaluator.update(asked, predictions, torch.zeros(3))
    found = evaluator.submission()
    assert found == {
        "a": [
            {"attempt_1": [[1, 0, 2]], "attempt_2": [[1, 0, 2]]},
            {"attempt_1": [[1, 1, 2]], "attempt_2": [[1, 1, 2]]},
            {"attempt_1": [[0]], "attempt_2": [[0]]},  # not evaluated
        ],
        "c": [{"attempt_1": [[7, 7], [8, 8]], "attempt_2": [[7, 7], [8, 8]]}],
    }
    path = tmp_path / "submission.json"
    write_submission(found, path)
    assert json.loads(path.read_text()) == found
    with pytest.raises(FileExistsError, match=r"submission\.json exists and is not overwritten"):
        write_submission({}, path)
    assert json.loads(path.read_text()) == found


def test_attempts_are_the_first_candidates(tmp_path: Path):
    evaluator = voted(tmp_path, [(9, 4.0), (8, 3.0), (7, 5.0)])
    assert evaluator.submission() == {"a": [{"attempt_1": [[1, 0, 7]], "attempt_2": [[1, 0, 9]]}]}
    assert list(evaluator.submission(k=4)["a"][0].values()) == [[[1, 0, c]] for c in (7, 9, 8, 8)]
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        evaluator.submission(k=0)
