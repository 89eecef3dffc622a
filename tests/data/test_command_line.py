"""The DataModules under jsonargparse, as LightningCLI uses it: options from YAML, help from docstrings."""

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from rtrl_moe_pl.data import AnBnDataModule, DelayedCopyDataModule, DelayedRecallDataModule, HaystackDataModule

ANBN = """
data:
  class_path: AnBnDataModule
  init_args:
    n_min: 3
    n_max: 9
    task_layout: predecessor
    negatives: predecessor
    length: 40
    seed: 5
    batch_size: 16
    layout: stream
    steps_per_batch: 32
    batches_per_epoch: 50
    validation_size: 100
    validation_batch_size: 25
    validation_scales: [1, 2]
    encoding: ids
"""
RECALL = """
data:
  class_path: DelayedRecallDataModule
  init_args: {values: 3, noise_tokens: 1, min_gap: 17, max_gap: 24, layout: sequences}
"""
COPY = """
data:
  class_path: DelayedCopyDataModule
  init_args: {symbols: 3, delay: 5, length: 60, layout: sequences, validation_window: 16}
"""
HAYSTACK = """
data:
  class_path: HaystackDataModule
  init_args:
    length: 60
    values: 3
    needles: 2
    distractors: 1
    min_gap: 9
    insert_from: 0.25
    insert_to: 0.5
    curriculum: [20, 40]
    promote_at: 0.9
    seed: 5
    validation_window: 16
"""
CUSTOM = """
data:
  class_path: SequenceDataModule
  init_args:
    task:
      class_path: rtrl_moe_pl.tasks.AnBn
      init_args: {n_max: 4}
    batch_size: 7
"""


@pytest.fixture
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    parser.add_argument("--config", action="config")
    return parser


def build(parser: ArgumentParser, text: str):
    return parser.instantiate(parser.parse_string(text)).data


def test_every_option_reaches_the_module(parser: ArgumentParser):
    module = build(parser, ANBN)
    assert isinstance(module, AnBnDataModule)
    task = module.task
    assert repr(task) == "AnBn(n_min=3, n_max=9, layout='predecessor', negatives='predecessor', length=40)"
    given = yaml.safe_load(ANBN)["data"]["init_args"]
    for name in ("seed", "batch_size", "layout", "steps_per_batch", "batches_per_epoch", "encoding"):
        assert getattr(module, name) == given[name]
    assert (module.validation_size, module.validation_batch_size) == (100, 25)
    assert module.validation_names == ["", "2x"]
    recall = build(parser, RECALL)
    assert isinstance(recall, DelayedRecallDataModule)
    assert repr(recall.task) == "DelayedRecall(values=3, noise_tokens=1, min_gap=17, max_gap=24)"
    assert recall.layout == "sequences"
    copy = build(parser, COPY)
    assert isinstance(copy, DelayedCopyDataModule)
    assert repr(copy.task) == "DelayedCopy(symbols=3, delay=5, length=60)"
    assert (copy.layout, copy.validation_window) == ("sequences", 16)
    haystack = build(parser, HAYSTACK)
    assert isinstance(haystack, HaystackDataModule)
    expected = "values=3, needles=2, distractors=1, min_gap=9, insert_from=0.25, insert_to=0.5)"
    assert [repr(task) for task in haystack.tasks] == [f"Haystack(length={n}, {expected}" for n in (20, 40, 60)]
    assert haystack.task == haystack.tasks[-1]
    assert (haystack.promote_at, haystack.seed, haystack.validation_window) == (0.9, 5, 16)


def test_a_task_of_ones_own(parser: ArgumentParser):
    module = build(parser, CUSTOM)
    assert repr(module.task).startswith("AnBn(n_min=2, n_max=4,")
    assert module.batch_size == 7


@pytest.mark.parametrize("text", [ANBN, RECALL, COPY, HAYSTACK, CUSTOM])
def test_a_dumped_config_builds_the_same(parser: ArgumentParser, text: str):
    first = parser.parse_string(text)
    assert parser.parse_string(parser.dump(first)) == first


def test_help_explains_the_options(capsys: pytest.CaptureFixture[str], parser: ArgumentParser):
    with pytest.raises(SystemExit):
        parser.parse_args(["--data.help=AnBnDataModule"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "smallest n, at least 2" in shown
    assert "windows of persistent lanes" in shown
    assert "--data.steps_per_batch" in shown
    assert "--data.task " not in shown  # what a module sets itself is no option of it
    assert "--data.options" not in shown
    with pytest.raises(SystemExit):
        parser.parse_args(["--data.help=HaystackDataModule"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "lengths to train at before" in shown
    assert "windows of persistent lanes" in shown
    assert "--data.task" not in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("n_maximum: 4", "n_maximum"),
        ("n_max: many", "n_max"),
        ("layout: packed", "layout"),
        ("task: {class_path: rtrl_moe_pl.tasks.AnBn}", "task"),
    ],
)
def test_wrong_keys_and_types_are_refused(parser: ArgumentParser, change: str, message: str):
    with pytest.raises(Exception, match=message):
        build(parser, f"data: {{class_path: AnBnDataModule, init_args: {{{change}}}}}")
