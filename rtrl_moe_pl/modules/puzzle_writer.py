"""What ``predict`` says of puzzles: a file of answers, grids in the terminal, and pictures."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from rtrl_moe_pl.data.puzzles import PuzzleBatch
from rtrl_moe_pl.modules.puzzle_drawing import extent, grid_tokens, puzzle_figure
from rtrl_moe_pl.reasoning.etrm import Thoughts
from rtrl_moe_pl.reasoning.losses import correct_rows
from rtrl_moe_pl.tasks.puzzles import Puzzles, PuzzleTask
from rtrl_moe_pl.tasks.puzzles.colors import in_terminal
from rtrl_moe_pl.tasks.puzzles.grids import PAD
from rtrl_moe_pl.training.pictures import picture_folder, save, when

SHOWN = 8  # puzzles that are printed and drawn


class _Shown(NamedTuple):
    """One puzzle to print and to draw."""

    head: str
    puzzle: Puzzles
    thoughts: Thoughts
    step: Tensor  # [1]
    number: int


class PuzzleWriter(Callback):
    """Writes ``predictions.json``, one file per process, into a new folder of the logs; prints and draws the first few.

    Of every puzzle: its number, the answer (a grid of numbers) under q-halt, the supervision step it was given at, and
    its q_halt probability, sigmoid(q_halt): how likely the model takes this answer to be right; ``correct`` where the
    answer is known. ``prediction_N.png`` shows demonstrations, query, and the answer of every step; pictures are drawn
    when all answers are written. Grids are printed in colour where standard output is a terminal and NO_COLOR is not
    set.

    Raises:
        FileExistsError: before anything is predicted, if there is such a file already.
        OSError: if the answers cannot be written.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = picture_folder(trainer)
        self._answers: list[dict[str, Any]] = []
        self._shown: list[_Shown] = []  # at the end: not into the progress bar
        suffix = "" if trainer.world_size == 1 else f"_rank{trainer.global_rank}"
        self.path = self._folder / f"predictions{suffix}.json"
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists and is not overwritten: move it away")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: PuzzleBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        task = trainer.datamodule.task  # type: ignore[attr-defined]
        puzzles, thoughts = batch.puzzles.to("cpu"), outputs.cpu()
        step = thoughts.halted_at(pl_module.halting.max_steps)
        answers, probability = thoughts.at(step), thoughts.confidence(step).sigmoid()
        correct = correct_rows(answers, puzzles.labels)
        for row, number in enumerate(batch.index.tolist()):
            if number < 0:
                continue
            answer = {
                "puzzle": number,
                "answer": task.to_grid(answers[row]),
                "step": int(step[row]) + 1,
                "q_halt_probability": round(float(probability[row]), 4),
            }
            if puzzles.valid[row]:
                answer["correct"] = bool(correct[row])
            self._answers.append(answer)
            if len(self._answers) <= SHOWN and trainer.is_global_zero:
                one = torch.tensor([row])
                self._shown.append(_Shown(_head(answer), puzzles.rows(one), thoughts.rows(one), step[one], number))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("x") as file:  # never over another file
            file.write("[\n" + ",\n".join(map(json.dumps, self._answers)) + "\n]\n")
        if not trainer.is_global_zero:
            return
        task = trainer.datamodule.task  # type: ignore[attr-defined]
        colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print()
        for shown in self._shown:
            print(shown.head, *_grids(task, shown, colored), sep="\n")
        several = trainer.world_size > 1
        if several or len(self._answers) > SHOWN:
            print(f"only the first {len(self._shown)} puzzles{' of rank 0' * several} are shown and drawn")
        print(f"predictions: {self._folder / 'predictions_rank*.json' if several else self.path}")
        for shown in self._shown:  # last: a picture must not cost an answer
            title = f"{shown.head}, {when(trainer)}"
            draw = partial(puzzle_figure, task, shown.puzzle, shown.thoughts, shown.step, [""], title)
            save(draw, self._folder / f"prediction_{shown.number}.png", dpi=150)


def _head(answer: dict[str, Any]) -> str:
    known = {True: ", right", False: ", wrong"}[answer["correct"]] if "correct" in answer else ""
    probability = f"q_halt probability {answer['q_halt_probability']:.0%}"
    return f"puzzle {answer['puzzle']}: answer of step {answer['step']}, {probability}{known}"


def _grids(task: PuzzleTask, shown: _Shown, colored: bool) -> list[str]:
    """The query and the answer."""
    lines = []
    for name, tokens in (("query", shown.puzzle.inputs[0]), ("answer", shown.thoughts.at(shown.step)[0])):
        grid = grid_tokens(task, tokens)
        rows, columns = extent(grid != PAD)
        lines += [f"{name}:", in_terminal(grid[:rows, :columns], task.look, colored) + "\n"]
    return lines
