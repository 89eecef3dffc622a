"""docs/extending.md: its files are written as they stand, its commands are run, and its examples are what they say."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import GRU, LeakyIntegrator
from rtrl_moe_pl.cli import main
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT, GradientAlgorithm, sequence_gradient
from tests.sensitivities.sensitivity_case import BATCH, SHAPES, SIZE, Dense, SensitivityCase

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/extending.md").read_text()
FILES = {name: text for text, name in re.findall(r"```(?:python|yaml)\n(# (\S+)\n.*?)```", PAGE, re.DOTALL)}
SCRIPTS = re.findall(r"```python\n((?!# ).*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^python -m rtrl_moe_pl (.*)$", PAGE, re.MULTILINE)
SHORT = {
    "audit": ["--steps", "60", "--data.batch_size", "4", "--data.steps_per_batch", "16"],
    "fit": ["--trainer.max_steps", "2", "--data.batches_per_epoch", "2", "--data.validation_size", "8"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the page's files are."""
    made = tmp_path_factory.mktemp("extending")
    (made / "configs").symlink_to(ROOT / "configs")
    for name, text in FILES.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(made))
        patch.chdir(made)
        yield made


def of_page(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"my_package.{module}"), name)


def test_the_page_has_all_its_parts() -> None:
    modules = {f"my_package/{name}.py" for name in ("cells", "tasks", "gradients", "encoders")}
    assert FILES.keys() == modules | {"my_cell.yaml", "my_task.yaml", "my_gradient.yaml"}
    assert len(SCRIPTS) == 1
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)
    assert main([*words, *SHORT[words[0]], "--trainer.default_root_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    if "my_cell.yaml" in words and words[0] == "audit":
        paths = {line.split()[0]: line.split()[-1] for line in printed.splitlines() if line.startswith("cell.")}
        fast = {"cell.decay", "cell.mix.weight", "cell.mix.bias"}
        assert paths == dict.fromkeys(fast, "taps") | {"cell.down": "functional"}
        assert "verdict: exact" in printed
    if "my_gradient.yaml" in words and words[0] == "audit":
        assert "verdict: approximate, as it claims" in printed
    if words[0] == "fit":
        assert list(tmp_path.rglob("best-step*.ckpt"))


def test_an_algorithm_that_wrongly_claims_to_be_exact_fails_its_audit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_page("gradients", "DiagonalRTRL"), "exact", True)
    [command] = [c for c in COMMANDS if "my_gradient.yaml" in c and c.startswith("audit")]
    assert main([*shlex.split(command), *SHORT["audit"], "--trainer.default_root_dir", str(tmp_path)]) == 1


def test_the_encoder_without_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "extending"}
    exec(compile(SCRIPTS[0], "extending.md", "exec"), names)
    assert names["model"].global_step == 4
    shown = "".join(capsys.readouterr())
    assert "Epoch 0" in shown
    assert "/-" not in shown  # rich shows the last epoch, which there is none of without max_epochs
    assert names["thoughts"].predictions.shape == (4, 3, 16)


def test_the_task_asks_for_the_first_token(folder: Path) -> None:
    task = of_page("tasks", "FirstToken")()
    drawn = task.sample(0, torch.arange(200))
    last = drawn.lengths[:, None] - 1
    assert torch.equal(drawn.weights.sum(1), torch.ones(200))
    assert torch.equal(drawn.labels.gather(1, last)[:, 0], drawn.tokens[:, 0])
    assert not torch.equal(drawn.labels.gather(1, last)[:, 0], drawn.tokens[:, 1])  # control: the next token is not it
    assert set(drawn.lengths.tolist()) == set(range(6, 13))
    assert task.scale(2).min_length > task.max_length


class TestDiagonalSensitivity(SensitivityCase):
    @pytest.fixture(autouse=True)
    def _page(self, folder: Path) -> None: ...

    def make(self, batch_size: int = BATCH) -> Any:
        made = of_page("gradients", "DiagonalSensitivity")
        return made(SHAPES, batch_size, SIZE, torch.float64, torch.device("cpu"))

    def truth(self, dense: Dense, linearization: Any) -> Dense:
        kept = torch.stack([torch.diag(torch.diag(j)) for j in linearization.transition])
        immediate = linearization.immediate()
        return {n: torch.einsum("bij,bj...->bi...", kept, p) + immediate.get(n, 0) for n, p in dense.items()}


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum()


@pytest.mark.parametrize("window", [1, 4])
def test_the_algorithm_is_exact_where_units_do_not_see_each_other_and_nowhere_else(folder: Path, window: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 20, 2, dtype=torch.float64)
    readout = nn.Linear(5, 2).double()

    def error(algorithm: GradientAlgorithm, cell: nn.Module) -> float:
        found, truth = (
            torch.cat([g.flatten() for g in sequence_gradient(a, cell, readout, x, x, loss).grads.values()])
            for a in (algorithm, BPTT())
        )
        return float((found - truth).norm() / truth.norm())

    diagonal = of_page("gradients", "DiagonalRTRL")(window=window)
    alone = LeakyIntegrator(2, 5, decay=0.9, learned_decay=True).double()
    assert error(diagonal, alone) < 1e-12
    assert error(TBPTT(window=window), alone) > 1e-3
    together = GRU(2, 5).double()
    assert error(diagonal, together) > 1e-3
    assert error(RTRL(window=window), together) < 1e-12
