"""The examples of the README and of docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rtrl_moe_pl.cli import main
from rtrl_moe_pl.data import PuzzleDemoDataModule, SudokuDataModule
from rtrl_moe_pl.gradients import TBPTT

ROOT = Path(__file__).parent.parent
README, ROUTED, REASONING = (
    (ROOT / page).read_text() for page in ("README.md", "docs/routed_cells.md", "docs/reasoning.md")
)


def blocks(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


BLOCKS = blocks(README)


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_there_is_one_example() -> None:
    assert len(BLOCKS) == 1


def assert_exact(names: dict[str, Any]) -> None:
    for name, truth in names["truth"].grads.items():
        assert truth.norm() > 0
        assert (names["exact"].grads[name] - truth).norm() <= 1e-9 * truth.norm()


def test_own_cell() -> None:
    names = run(BLOCKS[0])
    assert_exact(names)
    assert any(
        (names["biased"].grads[name] - truth).norm() > 1e-3 * truth.norm()
        for name, truth in names["truth"].grads.items()
    )


def test_own_routed_cell() -> None:
    [block] = blocks(ROUTED)
    names = run(block)
    assert_exact(names)
    truncated = names["sequence_gradient"](
        TBPTT(window=4), *(names[name] for name in ("cell", "readout", "x", "y", "loss_fn"))
    )
    with pytest.raises(AssertionError):
        assert_exact({**names, "exact": truncated})


def test_options_of_the_mixture_of_experts(tmp_path: Path) -> None:
    [block] = blocks(ROUTED, "yaml")
    (tmp_path / "mine.yaml").write_text(block)
    config = str(ROOT / "configs/haystack_moe_lazy.yaml")
    options = ["--trainer.max_steps", "3", "--trainer.default_root_dir", str(tmp_path), "--data.validation_size", "16"]
    assert main(["fit", "--config", config, "--config", str(tmp_path / "mine.yaml"), *options]) == 0
    [saved] = tmp_path.rglob("lightning_logs/version_0/config.yaml")
    for key in ("drift_penalty: 0.01", "SlotAttention", "RoutingPicture", "TemperatureAnnealing"):
        assert key in saved.read_text()


def test_options_of_reasoning(tmp_path: Path) -> None:
    block = "".join(
        line
        for line in blocks(REASONING, "yaml")[0].splitlines(keepends=True)
        if "pretrained" not in line  # it needs a run
    )
    (tmp_path / "mine.yaml").write_text(block)
    options = ["--model.encoder", "PuzzleEmbedding", "--data.validation_size", "4", "--data.batch_size", "4"]
    options += ["--trainer.max_steps", "2", "--trainer.default_root_dir", str(tmp_path)]
    config = str(ROOT / "configs/etrm_color_rules.yaml")
    assert main(["fit", "--config", config, "--config", str(tmp_path / "mine.yaml"), *options]) == 0
    [saved] = tmp_path.rglob("lightning_logs/version_0/config.yaml")
    for key in ("AdamATan2", "SignSGD", "Freeze", "EMA"):
        assert key in saved.read_text()


def test_the_examples_are_puzzles() -> None:
    examples = ROOT / "docs/examples"
    colors = PuzzleDemoDataModule(puzzle=str(examples / "color_puzzle.json")).questions
    assert colors is not None
    assert colors.demo_mask.sum().item() == 3
    sudoku = SudokuDataModule(puzzle=str(examples / "sudoku.json")).questions
    assert sudoku is not None
    assert sudoku.inputs.shape == (1, 16)


def test_every_file_named_exists() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)
    for name in re.findall(r"configs/(\w+)\.yaml", README + ROUTED + REASONING):
        assert (ROOT / "configs" / f"{name}.yaml").exists(), name
