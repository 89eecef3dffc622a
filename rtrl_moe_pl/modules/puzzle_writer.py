"""What ``predict`` says of puzzles: coloured grids in the terminal, pictures, and a file of answers."""

from __future__ import annotations

import json
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from rtrl_moe_pl.data.puzzles import PuzzleBatch
from rtrl_moe_pl.modules.puzzle_picture import cropped, puzzle_figure
from rtrl_moe_pl.tasks.puzzles import IGNORED, PuzzleTask
from rtrl_moe_pl.tasks.puzzles.colors import in_terminal
from rtrl_moe_pl.tasks.puzzles.grids import PAD
from rtrl_moe_pl.training.pictures import picture_folder

SHOWN = 8  # puzzles that are printed and drawn


class PuzzleWriter(Callback):
    """Writes ``predictions.json``, one file per process, into a new folder of the logs; prints and draws the first few.

    Of every puzzle: its number, the answer (a grid of numbers) under q-halt, the supervision step it was given at, and
    the probability that it is right; ``correct`` where the answer is known. ``prediction_N.png`` shows demonstrations,
    query, and the answer of every step.

    Raises:
        FileExistsError: before anything is predicted, if there is such a file already.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = picture_folder(trainer)
        self._answers: list[dict[str, Any]] = []
        self._shown: list[str] = []  # printed at the end: not into the progress bar
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
        answers, sure = thoughts.at(step), thoughts.confidence(step).sigmoid()
        for row, number in enumerate(batch.index.tolist()):
            if number < 0:
                continue
            answer = {
                "puzzle": number,
                "answer": task.to_grid(answers[row]),
                "step": int(step[row]) + 1,
                "probability": round(float(sure[row]), 4),
            }
            asked = puzzles.labels[row] != IGNORED
            if bool(asked.any()):
                answer["correct"] = bool((answers[row] == puzzles.labels[row])[asked].all())
            self._answers.append(answer)
            if len(self._answers) <= SHOWN and trainer.is_global_zero:
                one = torch.tensor([row])
                self._shown += _lines(task, puzzles.inputs[row], answers[row], answer)
                said = thoughts.predictions[:, row]
                if "correct" not in answer:  # else the figure knows what was asked for
                    said = torch.stack([_on_canvas(task, tokens).flatten() for tokens in said])
                shown = thoughts.rows(one)._replace(predictions=said[:, None])
                figure = puzzle_figure(puzzles.rows(one), shown, task.shape, task.look, [f"puzzle {number}"], "")
                self._folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(self._folder / f"prediction_{number}.png", dpi=150)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("x") as file:  # never over another file
            file.write("[\n" + ",\n".join(map(json.dumps, self._answers)) + "\n]\n")
        print("", *self._shown, f"predictions: {self.path}", sep="\n")


def _lines(task: PuzzleTask, query: Tensor, answer: Tensor, facts: dict[str, Any]) -> list[str]:
    known = {True: ", right", False: ", wrong"}[facts["correct"]] if "correct" in facts else ""
    sure = f"{facts['probability']:.0%} sure"
    grids = [cropped(_on_canvas(task, tokens)) for tokens in (query, answer)]
    head = f"puzzle {facts['puzzle']}: query, and the answer of step {facts['step']}, {sure}{known}"
    return [head, *(in_terminal(grid, task.look) + "\n" for grid in grids)]


def _on_canvas(task: PuzzleTask, tokens: Tensor) -> Tensor:
    """[H, W]: what `to_grid` finds in tokens [S], in the upper left corner; PAD elsewhere, where nothing is learned."""
    canvas = torch.full((task.shape.height, task.shape.width), PAD)
    for row, numbers in zip(canvas, task.to_grid(tokens), strict=False):
        row[: len(numbers)] = task.first_token + torch.tensor(numbers)
    return canvas
