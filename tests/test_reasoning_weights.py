"""Which weights puzzles are answered with on the command line: of a checkpoint, pretrained, or none that fit."""

import re
from pathlib import Path

import pytest

from rtrl_moe_pl.cli import main
from tests import test_reasoning_cli
from tests.bad_input.case import refused
from tests.test_reasoning_cli import CONFIG, ENCODER, SMALL, last, run

fitted, here = test_reasoning_cli.fitted, test_reasoning_cli.here  # its fixtures
COMMON = ["--config", CONFIG, *SMALL, *ENCODER]


def test_pretrained_weights_are_evaluated_where_there_is_no_checkpoint(
    fitted: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = []
    for weights in (["--ckpt_path", last(fitted)], ["--model.pretrained", last(fitted)], []):
        capsys.readouterr()
        assert run("validate", "--trainer.callbacks=[]", *weights) == 0
        printed = capsys.readouterr().out
        assert ("an untrained model" in printed) == (not weights)
        figures.append(re.findall(r"^val/.*", printed, re.MULTILINE))
    assert figures[0] == figures[1] != figures[2]
    assert run("predict", "--model.pretrained", last(fitted)) == 0


def test_a_pretrained_decoder_alone_predicts_nothing(fitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ["--model.encoder=StandardEncoder", "--model.encoder.layers=1", "--model.pretrained", last(fitted)]
    refused(capsys, ["predict", *COMMON, *other], ["predict needs trained weights, and those of the encoder are not"])
    assert run("validate", *other) == 0
    assert "no --ckpt_path: these are the weights of an untrained encoder" in capsys.readouterr().out


def test_a_pretrained_model_of_another_architecture_is_refused_by_the_name_of_the_option(
    fitted: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["fit", *COMMON, "--model.pretrained", last(fitted), "--model.decoder.l_cycles=3"]
    refused(capsys, other, ["model.pretrained is of another architecture ", ": decoder.l_cycles is 2 there and 3 here"])


def test_resuming_with_another_optimizer_is_refused(
    fitted: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["fit", *COMMON, "--ckpt_path", last(fitted), "--model.optimizer=SGD"]
    refused(capsys, other, ["model.optimizer: the checkpoint was made with AdamW, but the configuration says SGD"])


def test_a_question_to_an_embedding_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embedding = ["--config", CONFIG, *SMALL, "--model.encoder=PuzzleEmbedding", "--trainer.callbacks=[]"]
    assert main(["fit", *embedding]) == 0
    question = ["predict", *embedding, "--ckpt_path=last", "--data.puzzle=question.json"]
    refused(capsys, question, ["data.puzzle: a PuzzleEmbedding knows the puzzles it was trained on and no other"])
