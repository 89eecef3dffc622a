"""How puzzles look."""

from __future__ import annotations

import pytest
import torch

from rtrl_moe_pl.tasks.puzzles import Maze, PuzzleTask, RulePuzzles, Sudoku
from rtrl_moe_pl.tasks.puzzles.colors import Look, in_terminal


def test_without_colours_symbols_are_enough_to_read_a_grid():
    maze = in_terminal(torch.tensor([[3, 5, 1], [1, 2, 4]]), Maze(3).look, colored=False)
    assert maze == " S  .  #\n #     G"
    sudoku = in_terminal(torch.tensor([[1, 2], [5, 1]]), Sudoku(4).look, colored=False)
    assert sudoku == " .  1\n 4  ."


def test_in_colour_cells_have_their_digits_and_letters_alone():
    look = Look(("#ffffff", "#000000", "#ff0000"), ("", "#", "7"))
    text = in_terminal(torch.tensor([[1, 2, 0]]), look, colored=True)
    cells = ["\x1b[48;2;0;0;0;97m   ", "\x1b[48;2;255;0;0;97m 7 ", "\x1b[48;2;255;255;255;30m   "]
    assert text == "".join(cells) + "\x1b[0m"


def test_lines_that_set_boxes_apart_are_sudokus():
    assert [Sudoku(size, clues_min=30, clues_max=32).look.box for size in (6, 9)] == [(2, 3), (3, 3)]
    assert Sudoku(4).look.box == (2, 2)
    assert Look.of_grids(12).box is Maze().look.box is None


@pytest.mark.parametrize("task", [Sudoku(4), Maze(5), RulePuzzles()])
def test_a_cell_without_a_number_is_seen_in_the_terminal(task: PuzzleTask) -> None:
    tokens = torch.tensor([[0, task.first_token + 1, 0]])
    cells = in_terminal(tokens, task.look, colored=False).split()
    assert cells[0] == cells[-1] == "?"
    assert in_terminal(tokens, task.look, colored=True).count("?") == 2
    assert "?" not in in_terminal(tokens[:, 1:2], task.look, colored=False)
