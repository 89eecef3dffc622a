"""How many ARC tasks are solved: answers under several augmentations vote, and the first k candidates count."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.tasks.base import one_of
from rtrl_moe_pl.tasks.puzzles.arc import SPLITS, ArcPuzzles
from rtrl_moe_pl.tasks.puzzles.arc_grids import crop, off_canvas, on_canvas, transform
from rtrl_moe_pl.tasks.puzzles.grids import inverse

PASS_AT = (1, 2, 5, 10, 100)
NO_ANSWER = [[0]]  # in a submission, which must have a grid

Ranking = dict[tuple[int, int], list[bytes]]  # of (group, test input): candidates, the best first


class ArcEvaluator(Metric):
    """Pass@k of ARC, over the tasks that were evaluated.

    An answer is what `crop` finds, its augmentation undone. All answers to one test input vote; candidates are ranked
    by their votes, and then by the mean sigmoid(q_halt) of those who gave them. A test input is solved at k if it is
    one of the first k. The score of a task is the part of its evaluated test inputs that is solved, and pass@k the
    mean over tasks of which one was evaluated: never over all there are. Test inputs without a known answer are
    ranked, not scored. An answer to a puzzle that has been answered already counts nothing, so that processes may
    overlap.

    Args:
        task: the puzzles.
        split: which of its evaluation sets.

    Raises:
        ValueError: for another split.
    Cost: n^2 + 28 bytes per answer, on every process once it is computed.
    """

    full_state_update = False
    rows: list[Tensor] | Tensor  # [N, 3] int64: number of the puzzle, its group and query
    grids: list[Tensor] | Tensor  # [N, n, n] uint8 tokens: answers, their augmentation undone
    confidence: list[Tensor] | Tensor  # [N] float32

    def __init__(self, task: ArcPuzzles, split: str = "held_out") -> None:
        super().__init__()
        self.task, self.split = task, one_of(SPLITS, "split", split)
        for name in ("rows", "grids", "confidence"):
            self.add_state(name, [], "cat")

    def update(self, index: Tensor, predictions: Tensor, confidence: Tensor) -> None:
        """Add answers.

        Args:
            index: [B] int64, numbers of the puzzles in the set; negative: padding, which counts nowhere.
            predictions: [B, S] tokens.
            confidence: [B] q_halt, logits.
        """
        there, n = index >= 0, self.task.shape.height
        index, predictions, confidence = index[there], predictions[there], confidence[there]
        origin = self.task.origin(self.split, 0, index)
        cells, size = crop(predictions.unflatten(1, (n, n)), origin.offset)
        undone = transform(cells[:, None], size[:, None], inverse(origin.element), origin.permutation.argsort(-1))
        self._add(torch.stack([index, origin.group, origin.query], 1), undone[0][:, 0], confidence.float().sigmoid())

    def _add(self, rows: Tensor, grids: Tensor, confidence: Tensor) -> None:
        for name, value in (("rows", rows), ("grids", grids.to(torch.uint8)), ("confidence", confidence)):
            getattr(self, name).append(value)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in `Metric`; a process that was given no answer has empty states of the right shapes to gather."""
        if isinstance(self.rows, list) and not self.rows:
            n, zeros = self.task.shape.height, torch.zeros(0, device=self.device)
            self._add(zeros.view(0, 1).expand(0, 3).long(), zeros.view(0, 1, 1).expand(0, n, n), zeros)
        super().sync(*args, **kwargs)

    def _ranking(self) -> Ranking:
        """Candidates for every test input of which there was an answer, as the bytes of canvases: this process's."""
        if not len(self.rows):
            return {}
        rows, grids, confidence = (dim_zero_cat(s).cpu() for s in (self.rows, self.grids, self.confidence))
        order = rows[:, 0].argsort(stable=True)  # equal ranks: the first puzzle's candidate first
        found: dict[tuple[int, int], dict[bytes, list[float]]] = {}
        last = -1
        for (number, group, query), grid, sure in zip(
            rows[order].tolist(), grids[order].numpy(), confidence[order].tolist(), strict=True
        ):
            votes = found.setdefault((group, query), {})
            if number != last and grid.any():
                votes.setdefault(grid.tobytes(), []).append(sure)
            last = number

        def best_first(votes: dict[bytes, list[float]]) -> list[bytes]:
            return sorted(votes, key=lambda grid: (-len(votes[grid]), -fmean(votes[grid])))

        return {question: best_first(votes) for question, votes in found.items()}

    def compute(self) -> dict[str, Tensor]:
        """pass@k for k in `PASS_AT`, nan if nothing was scored; how many ``tasks`` and ``test_inputs`` were scored."""
        places: dict[int, list[int]] = {}  # of the answers of each task's test inputs among the candidates, from 0 on
        for (group, query), candidates in self._ranking().items():
            output = self.task.tasks[group].test[query].output
            if output is not None:
                answer = on_canvas(output, self.task.shape.height).tobytes()
                place = candidates.index(answer) if answer in candidates else max(PASS_AT)
                places.setdefault(group, []).append(place)
        figures = {
            f"pass@{k}": fmean(fmean(place < k for place in of_task) for of_task in places.values())
            if places
            else float("nan")
            for k in PASS_AT
        }
        figures |= {"tasks": len(places), "test_inputs": sum(map(len, places.values()))}
        return {name: torch.tensor(float(figure), device=self.device) for name, figure in figures.items()}

    def submission(self, k: int = 2) -> dict[str, list[dict[str, list[list[int]]]]]:
        """The first k candidates of every test input of the tasks that were evaluated, in the form of the ARC Prize.

        {"task": [{"attempt_1": grid, "attempt_2": grid}, ..one per test input], ..}. Where there are fewer candidates
        the last is repeated, where there is none the grid is [[0]]. With several processes all must call this.
        """
        at_least(1, "k", k)
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._should_unsync):
            ranking = self._ranking()
        n, result = self.task.shape.height, {}
        for group in sorted({group for group, _ in ranking}):
            task = self.task.tasks[group]
            for query in range(len(task.test)):
                canvases = [np.frombuffer(grid, np.uint8) for grid in ranking.get((group, query), [])[:k]]
                grids = [off_canvas(canvas.reshape(n, n)).tolist() for canvas in canvases] or [NO_ANSWER]
                grids += grids[-1:] * (k - len(grids))
                attempts = {f"attempt_{number}": grid for number, grid in enumerate(grids, 1)}
                result.setdefault(task.name, []).append(attempts)
        return result


def write_submission(submission: dict[str, Any], path: str | Path) -> None:
    """Write a submission as JSON.

    Raises:
        FileExistsError: if there is such a file already.
    """
    try:
        with Path(path).open("x") as file:
            json.dump(submission, file)
    except FileExistsError as error:
        raise FileExistsError(f"{path} exists and is not overwritten: name another file, or move it away") from error
