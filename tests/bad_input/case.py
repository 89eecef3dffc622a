"""One table format and one runner of bad input: a command line, and what its one line must say."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from rtrl_moe_pl.cli import main
from rtrl_moe_pl.cli.messages import LONGEST
from tests.test_cli import CONFIG

ROOT = Path(__file__).parents[2]
DENSE = "{class_path: GRU, init_args: {hidden_size: 5}}"
MOE = CONFIG.replace(
    DENSE, "{class_path: RecurrentMoE, init_args: {slot_size: 4, num_slots: 4, num_experts: 3}}"
).replace("class_path: RTRL", "class_path: LazyExpertRTRL")
TINY = ["--trainer.max_steps=4", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
MODEL = ["--model.decoder.width=8", "--model.decoder.heads=2", "--model.decoder.layers=1", "--model.decoder.prefix=2"]
RULES = ["--data.size=2", "--data.colors=3", "--data.train_rules=4", "--data.held_out_rules=2", "--data.demos=2"]
SIZES = ["--data.batch_size=5", "--data.batches_per_epoch=4", "--data.validation_size=7"]
BARE = ["--config", str(ROOT / "configs/etrm_color_rules.yaml"), *MODEL, *TINY, "--trainer.callbacks=[]"]
CONFIGS = {
    "none": [],
    "sequence": ["--config", "config.yaml"],
    "moe": ["--config", "moe.yaml"],
    "bare": BARE,  # for data or an encoder of another class
    "table": [*BARE, *RULES, *SIZES, "--model.encoder=PuzzleEmbedding"],
    "reasoning": [*BARE, *RULES, *SIZES, "--model.encoder.heads=2"],
}


class Case(NamedTuple):
    """A command that must be refused.

    Args:
        name: of the test.
        arguments: after the command and the options of ``config``.
        parts: what the line must say.
        command: of the command line; "" for none.
        config: one of `CONFIGS`.
        begins: whether training begins, so that its logs are kept.
    """

    name: str
    arguments: list[str]
    parts: list[str]
    command: str = "fit"
    config: str = "sequence"
    begins: bool = False


def table(cases: list[Case]) -> pytest.MarkDecorator:
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def contents(folder: Path) -> dict[str, bytes | None]:
    """What is in the files below a folder; None: a folder, or a link that leads nowhere."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> str:
    """Run a command line that must be refused; its line."""
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, captured.err
    require_one_line(errors[0], captured.err + captured.out, parts)
    return errors[0]


def require_one_line(line: str, printed: str, parts: list[str]) -> None:
    """An error line that says these parts, and nothing for developers."""
    assert line.startswith("error: ")
    assert len(line) <= len("error: ") + LONGEST
    assert "Traceback" not in printed
    for inside in ("rtrl_moe_pl/", "site-packages", "Namespace(", "0x7"):
        assert inside not in line
    for part in parts:
        assert part in line


def run(case: Case, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line is right, what was there is as it was, and nothing new is there."""
    kept = here / "lightning_logs/version_0/checkpoints/kept.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("an earlier run")
    before = contents(here)
    refused(capsys, [*([case.command] if case.command else []), *CONFIGS[case.config], *case.arguments], case.parts)
    after = contents(here)
    assert {name: after.get(name) for name in before} == before
    new = sorted(after.keys() - before.keys())
    if case.begins:
        assert not [name for name in new if name.endswith(".ckpt")]
    else:
        assert new == []
