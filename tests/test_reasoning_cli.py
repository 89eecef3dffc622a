"""Puzzles on the command line: a shipped configuration made small, its answers to a question, and bad input."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rtrl_moe_pl.cli import main
from rtrl_moe_pl.reasoning import encoders
from tests.bad_input.case import contents, refused
from tests.test_cli import CONFIG as SEQUENCES

CONFIG = str(Path(__file__).parents[1] / "configs/etrm_color_rules.yaml")
DATA = ["--data.size=2", "--data.colors=3", "--data.train_rules=4", "--data.held_out_rules=2", "--data.demos=2"]
SIZES = ["--data.batch_size=5", "--data.batches_per_epoch=4", "--data.validation_size=7"]
MODEL = ["--model.decoder.width=8", "--model.decoder.heads=2", "--model.decoder.layers=1", "--model.decoder.prefix=2"]
ENCODER = ["--model.encoder.heads=2"]
TRAINER = ["--trainer.max_steps=4", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = [*DATA, *SIZES, *MODEL, *TRAINER]
BEFORE, AFTER = [[0, 1], [2, 0]], [[1, 1], [2, 2]]
QUESTION = {
    "train": [{"input": BEFORE, "output": AFTER}],
    "test": [{"input": AFTER}, {"input": AFTER, "output": AFTER}],
}
NO_PUZZLE = "name a JSON file, {"


def run(command: str, *arguments: str) -> int:
    return main([command, "--config", CONFIG, *SMALL, *ENCODER, *arguments])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the configuration was trained for an epoch of four steps."""
    folder = tmp_path_factory.mktemp("fitted")
    assert run("fit", "--trainer.default_root_dir", str(folder)) == 0
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a question."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RTRL_MOE_PL_DEBUG", raising=False)
    (tmp_path / "question.json").write_text(json.dumps(QUESTION))
    return tmp_path


def last(folder: Path) -> str:
    return str(folder / "lightning_logs/version_0/checkpoints/last.ckpt")


def test_fit_writes_logs_checkpoints_and_pictures(fitted: Path) -> None:
    version = fitted / "lightning_logs/version_0"
    assert (version / "config.yaml").is_file()
    assert {path.name for path in version.glob("*.png")} == {
        f"val_{name}.png" for name in ("held_out_puzzles", "train_rules_puzzles", "shuffled_demos_puzzles", "by_step")
    }
    [best] = version.glob("checkpoints/best-step*.ckpt")
    assert best.is_file()
    assert torch.load(last(fitted), weights_only=True)["global_step"] == 4


def test_a_question_is_answered(fitted: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(fitted / "lightning_logs", here / "lightning_logs")
    assert run("predict", "--data.puzzle", "question.json", "--ckpt_path", "last") == 0
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    [path] = here.rglob("predictions.json")
    assert re.search(r"--ckpt_path last: .*last\.ckpt", printed)
    assert f"predictions: {path}" in printed
    assert len(re.findall(r"^puzzle \d: answer of step \d, q_halt probability \d+%", printed, re.MULTILINE)) == 2
    answers = json.loads(path.read_text())
    assert [answer["puzzle"] for answer in answers] == [0, 1]
    assert ["correct" in answer for answer in answers] == [False, True]
    assert all(len(answer["answer"]) == len(answer["answer"][0]) == 2 for answer in answers)
    assert {picture.name for picture in path.parent.glob("*.png")} == {"prediction_0.png", "prediction_1.png"}


def test_without_a_question_the_held_out_set_is_answered(fitted: Path, here: Path) -> None:
    assert run("predict", "--ckpt_path", last(fitted)) == 0
    [path] = here.rglob("predictions.json")
    answers = json.loads(path.read_text())
    assert [answer["puzzle"] for answer in answers] == list(range(7))
    assert all("correct" in answer for answer in answers)


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_a_checkpoint_is_evaluated(
    fitted: Path, here: Path, capsys: pytest.CaptureFixture[str], command: str, stage: str
) -> None:
    plain = ["--trainer.callbacks=[]", "--model.evaluation_steps=[6]"]
    assert run(command, "--ckpt_path", last(fitted), *plain) == 0
    printed = capsys.readouterr().out
    for split in ("held_out", "train_rules", "shuffled_demos"):
        assert f"{stage}/{split}/exact_accuracy" in printed
    assert f"{stage}/held_out/exact_accuracy_6_steps" in printed
    figures = re.findall(rf"^({stage}/\S+) +\d", printed, re.MULTILINE)
    assert len(figures) == len(set(figures)) == 3 * 8  # each once, with its whole name
    assert "Metric" not in printed
    assert run(command, "--ckpt_path", last(fitted), *plain, "--verbose=false") == 0
    assert f"{stage}/" not in capsys.readouterr().out


def test_training_begins_with_a_decoder_that_was_trained(fitted: Path, here: Path) -> None:
    options = ["--trainer.callbacks=[]", "--trainer.limit_val_batches=0", "--trainer.max_steps=1"]
    for lr, equal in ((0.0, True), (0.1, False)):
        assert run("fit", "--model.pretrained", last(fitted), f"--model.optimizer.lr={lr}", *options) == 0
        made = max(here.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
        states = [torch.load(path, weights_only=True)["state_dict"] for path in (made, last(fitted))]
        same = [torch.equal(value, states[1][name]) for name, value in states[0].items() if "blocks" in name]
        assert all(same) == equal


# ---- bad input: name, command, arguments, what the one line must say

LISTED = [name for name in encoders.__all__ if name not in ("Encoder", "Encoding")]
ENCODERS = ["model.encoder: there is no class", *LISTED, "full path"]
CASES: list[tuple[str, str, list[str], list[str]]] = [
    ("unknown encoder", "fit", ["--model.encoder=PairTokn"], [*ENCODERS, "PairTokn"]),
    ("a class that is no encoder", "fit", ["--model.encoder=TRM"], [*ENCODERS, "TRM"]),
    ("unknown decoder", "fit", ["--model.decoder=TRMM"], ["model.decoder: there is no class TRMM", "give ", "TRM,"]),
    (
        "unknown optimizer",
        "fit",
        ["--model.optimizer=AdamV"],
        ["model.optimizer: there is no class AdamV", "AdamATan2"],
    ),
    (
        "an encoder that cannot be imported",
        "fit",
        ["--model.encoder=rtrl_moe_pl.reasoning.Nope"],
        ["model.encoder: cannot import rtrl_moe_pl.reasoning.Nope: ", "no attribute 'Nope'"],
    ),
    (
        "unknown option of an encoder",
        "fit",
        ["--model.encoder.layrs=2"],
        ["unknown key model.encoder.layrs", "PairTokenEncoder takes", "layers"],
    ),
    ("wrong type in an encoder", "fit", ["--model.encoder.layers=x"], ["model.encoder.layers: needs int, got x"]),
    ("wrong type in the decoder", "fit", ["--model.decoder.width=x"], ["model.decoder.width: needs int, got x"]),
    ("wrong type in the optimizer", "fit", ["--model.optimizer.lr=x"], ["model.optimizer.lr: needs float, got x"]),
    (
        "unknown mode",
        "fit",
        ["--model.mode=online"],
        ["model.mode: needs one of 're_encode', 'fixed_time', 'cached', got online"],
    ),
    ("no steps", "fit", ["--model.halting.max_steps=0"], ["error: model.halting.max_steps must be at least 1, got 0"]),
    ("negative weight", "fit", ["--model.kl_weight=-1"], ["model.kl_weight must be a finite number of at least 0"]),
    (
        "no weight",
        "fit",
        ["--model.kl_weight=.nan"],
        ["model.kl_weight must be a finite number of at least 0, got nan"],
    ),
    ("negative rate", "fit", ["--model.encoder_lr=-1"], ["model.encoder_lr must be a finite number of at least 0"]),
    (
        "no demonstrations to encode",
        "fit",
        ["--data=SudokuDataModule"],
        ["model.encoder: the data have no demonstrations to encode", "SudokuDataModule", "use PuzzleEmbedding"],
    ),
    (
        "untrained weights",
        "predict",
        [],
        ["predict needs trained weights, and those of the model are not: give --ckpt_path PATH, or last"],
    ),
    (
        "unknown loss",
        "fit",
        ["--model.loss.cross_entropy=hinge"],
        ["model.loss.cross_entropy must be one of 'stablemax', 'softmax', got 'hinge'"],
    ),
    (
        "too many rules",
        "fit",
        ["--data.train_rules=5"],
        ["data.train_rules + held_out_rules must be at most 6", "got 5 + 2"],
    ),
    (
        "unknown family",
        "fit",
        ["--data.family=shapes"],
        ["data.family: needs one of 'colors', 'flips', 'colors_and_flips', 'pattern', got shapes"],
    ),
    ("no pretrained model", "fit", ["--model.pretrained=gone.ckpt"], ["model.pretrained: there is no file gone.ckpt"]),
    (
        "a pretrained model that is none",
        "fit",
        ["--model.pretrained=question.json"],
        ["model.pretrained", "is no checkpoint"],
    ),
    (
        "unknown source",
        "fit",
        ["--data=ArcDataModule", "--data.source=arc3"],
        ["data.source must be 'arc1', 'arc2' or a folder of ARC JSON files, got 'arc3'"],
    ),
    (
        "a file for a folder",
        "fit",
        ["--data=ArcDataModule", "--data.source=bad.json"],
        ["data.source must be 'arc1', 'arc2' or a folder of ARC JSON files, got 'bad.json'"],
    ),
    (
        "a folder without tasks",
        "fit",
        ["--data=ArcDataModule", "--data.source=lightning_logs"],
        ["data.source 'lightning_logs': there is no .json file in it"],
    ),
    ("no file", "predict", ["--data.puzzle=gone.json"], ["data.puzzle: there is no file gone.json", NO_PUZZLE]),
    ("a folder", "predict", ["--data.puzzle=."], ["data.puzzle: . is a folder:", NO_PUZZLE]),
    ("not JSON", "predict", ["--data.puzzle=bad.json"], ["error: data.puzzle: bad.json: not JSON: "]),
    ("no demonstrations", "predict", ["--data.puzzle=none.json"], ["none.json: no demonstrations: train is empty"]),
    (
        "a grid of another size",
        "predict",
        ["--data.puzzle=question.json", "--data.size=3"],
        ["question.json: train pair 1, input: the grid has 2 x 2 cells, but puzzles are 3 x 3"],
    ),
    ("audit of no step", "audit", ["--steps=0"], ["--steps must be at least 1, got 0"]),
    ("forecast in no memory", "forecast", ["--memory=0"], ["--memory must be a finite number above 0, got 0"]),
]


@pytest.mark.parametrize(
    ("command", "arguments", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_refused(
    here: Path, capsys: pytest.CaptureFixture[str], command: str, arguments: list[str], parts: list[str]
) -> None:
    (here / "bad.json").write_text("train: []")
    (here / "none.json").write_text(json.dumps({**QUESTION, "train": []}))
    kept = here / "lightning_logs/version_0/kept.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("an earlier run")
    before = contents(here)
    other = any(argument.startswith(("--model.encoder=", "--data=")) for argument in arguments)
    small = [
        *(MODEL if any(argument.startswith("--data=") for argument in arguments) else SMALL),
        *(() if other else ENCODER),
    ]
    refused(capsys, [command, "--config", CONFIG, *small, *arguments], parts)
    found = contents(here)
    assert {name: found[name] for name in before} == before
    written = [name for name in found if name not in before]
    assert not [name for name in written if not re.search(r"config\.yaml$|hparams\.yaml$|tfevents", name)]


ANOTHER = "--ckpt_path: the checkpoint is of another architecture than the model configured here: "


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--model.decoder.l_cycles=3", *ENCODER], "decoder.l_cycles is 2 there and 3 here"),
        (["--model.decoder.heads=1", *ENCODER], "decoder.heads is 2 there and 1 here"),
        (
            ["--model.encoder=StandardEncoder", "--model.encoder.layers=1"],
            "encoder is PairTokenEncoder there and StandardEncoder here",
        ),
        (["--data.colors=4", *ENCODER], "decoder.answer_head.weight is [5, 8] there and [6, 8] here"),
        (["--data.size=3", *ENCODER], "decoder.grid_height is 2 there and 3 here"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(
    fitted: Path, here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    for command in ("validate", "predict"):
        other = [command, "--config", CONFIG, *SMALL, "--ckpt_path", last(fitted), *arguments]
        refused(capsys, other, [ANOTHER, part, "; configure the model it was made with, which is in "])
    assert not list(here.rglob("predictions*"))


def test_a_checkpoint_of_a_sequence_model_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "config.yaml").write_text(SEQUENCES)
    assert main(["fit", "--config", "config.yaml", "--trainer.max_steps=1"]) == 0
    [checkpoint] = here.rglob("last.ckpt")
    other: Any = ["validate", "--config", CONFIG, *SMALL, *ENCODER, "--ckpt_path", str(checkpoint)]
    refused(capsys, other, [ANOTHER])
