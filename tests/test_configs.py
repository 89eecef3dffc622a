"""Every shipped configuration runs, and says what it is said to say."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rtrl_moe_pl.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
PROMISED = {
    "anbn_rtrl",
    "anbn_bptt",
    "anbn_tbptt",
    "anbn_simple_rnn",
    "anbn_lstm",
    "anbn_long",
    "recall_rtrl",
    "recall_tbptt",
    "haystack_rtrl",
    "haystack_tbptt",
    "haystack_bptt",
    "haystack_1m",
    "haystack_moe_rtrl",
    "haystack_moe_lazy",
    "anbn_moe_rtrl",
    "etrm_color_rules",
    "etrm_arc",
    "trm_sudoku",
    "trm_maze",
    "trm_sudoku9",
    "etrm_flips",
}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_are_there() -> None:
    assert set(NAMES) >= PROMISED


@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, tmp_path: Path) -> None:
    """One batch of training and validation, through the command line."""
    assert main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--trainer.fast_dev_run", "true"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_is_short_and_complete(name: str) -> None:
    text, config = (CONFIGS / f"{name}.yaml").read_text(), load(name)
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 50
    assert config["seed_everything"] == 0
    steps, schedule = config["trainer"].get("max_steps"), config["model"]["init_args"].get("lr_scheduler")
    if steps is None:  # where many batches have no weight, and so no step: epochs; or evaluation alone
        assert "max_epochs" in config["trainer"] or name == "haystack_1m"
    else:
        assert steps % config["data"]["init_args"]["batches_per_epoch"] == 0  # the last step is validated
    if steps and schedule:
        assert schedule["init_args"]["total_steps"] == steps + (schedule["class_path"] == "OneCycleLR")


SEQUENCES = [name for name in NAMES if load(name)["model"]["class_path"] == "SequenceModule"]


@pytest.mark.parametrize("name", [name for name in SEQUENCES if not name.endswith("_bptt")])
def test_audit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--data.length", "64"] if name == "haystack_1m" else []
    audit = ["audit", "--config", str(CONFIGS / f"{name}.yaml"), "--steps", "70", "--data.batch_size", "2", *short]
    assert main(audit) == 0
    exact = load(name)["model"]["init_args"]["gradient"]["class_path"] != "TBPTT"
    assert ("verdict: exact" if exact else "verdict: approximate") in capsys.readouterr().out


@pytest.mark.parametrize("name", ["etrm_color_rules", "trm_maze"])
def test_audit_of_puzzles(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--steps", "1", "--data.batch_size", "2"]
    assert main(["audit", "--config", str(CONFIGS / f"{name}.yaml"), *small]) == 0
    assert "verdict: approximate, as it claims: through the last 1 of " in capsys.readouterr().out


def test_an_audit_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    audit = ["audit", "--config", str(CONFIGS / "haystack_rtrl.yaml"), "--data.batch_size", "2", "--steps"]
    for steps, message in (("0", "--steps must be at least 1, got 0"), ("40", "--steps 40: nothing to compare")):
        assert main([*audit, steps]) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert "verdict" not in captured.out


@pytest.mark.parametrize("task", ["recall", "haystack"])
def test_the_control_differs_in_the_gradient_alone(task: str) -> None:
    """And every gap is more than twice as long as the window."""
    exact, truncated = load(f"{task}_rtrl"), load(f"{task}_tbptt")
    window = exact["model"]["init_args"]["gradient"]["init_args"]["window"]
    assert exact["data"]["init_args"]["min_gap"] > 2 * window
    assert exact["model"]["init_args"].pop("gradient")["class_path"] == "RTRL"
    assert truncated["model"]["init_args"].pop("gradient") == {"class_path": "TBPTT", "init_args": {"window": window}}
    assert exact == truncated


def test_the_mixtures_of_experts_differ_in_the_gradient_alone() -> None:
    block, lazy = load("haystack_moe_rtrl"), load("haystack_moe_lazy")
    window = block["model"]["init_args"].pop("gradient")
    assert window == {"class_path": "BlockRTRL", "init_args": {"window": 4}}
    assert lazy["model"]["init_args"].pop("gradient") == {**window, "class_path": "LazyExpertRTRL"}
    assert block["data"]["init_args"]["min_gap"] > 2 * 4
    assert block == lazy


def test_haystack_1m_evaluates_a_checkpoint_of_haystack_rtrl(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a shorter run, on fewer and shorter sequences: the other options are as they are."""
    exact, million = load("haystack_rtrl"), load("haystack_1m")
    for key in ("cell", "gradient"):
        assert million["model"]["init_args"][key] == exact["model"]["init_args"][key]
    assert {key: million["data"]["init_args"][key] for key in ("values", "min_gap")} == {"values": 4, "min_gap": 33}
    assert million["data"]["init_args"]["length"] == 1 << 20
    small = ["--data.batches_per_epoch", "8", "--data.validation_size", "8", "--trainer.max_epochs", "1"]
    fit = ["fit", "--config", str(CONFIGS / "haystack_rtrl.yaml"), *small, "--trainer.enable_progress_bar", "false"]
    assert main(fit) == 0
    [checkpoint] = tmp_path.rglob("last.ckpt")
    short = ["--data.length", "3000", "--data.validation_size", "5", "--data.validation_batch_size", "3"]
    test = ["test", "--config", str(CONFIGS / "haystack_1m.yaml"), "--ckpt_path", str(checkpoint), *short]
    assert main(test) == 0
    assert "test/accuracy" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("test_accuracy_by_distance.png"))) == 1


def accuracies(folder: Path) -> dict[str, float]:
    """The last value of every validation accuracy in the newest checkpoint's run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [version] = (folder / "lightning_logs").iterdir()
    events = EventAccumulator(str(version))
    events.Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if "accuracy" in tag}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gradient", "learns"),
    [
        ('{"class_path": "RTRL", "init_args": {"window": 8}}', True),
        ('{"class_path": "TBPTT", "init_args": {"window": 8}}', False),
        ('{"class_path": "benchmarks.controls.RTRLWithoutInfluence", "init_args": {"window": 8}}', False),
    ],
)
def test_only_carried_influence_learns_recall(tmp_path: Path, gradient: str, learns: bool) -> None:
    """The recall configurations with gaps of 20 to 24 steps and half the lanes, to be quick."""
    small = ["--data.max_gap", "24", "--data.batch_size", "32", "--data.validation_scales", "[1]"]
    quick = [*small, "--trainer.max_steps", "400", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(CONFIGS / "recall_rtrl.yaml"), "--model.gradient", gradient, *quick]) == 0
    accuracy = accuracies(tmp_path)["val/accuracy"]
    assert accuracy >= 0.95 if learns else 0.2 <= accuracy <= 0.32  # chance is 1/4; 0.07 is 5 standard errors of 1024


@pytest.mark.slow
@pytest.mark.parametrize(("config", "learns"), [("haystack_rtrl", True), ("haystack_tbptt", False)])
def test_only_carried_influence_finds_the_needle(tmp_path: Path, config: str, learns: bool) -> None:
    """Four epochs of twenty: enough to be past the first of the lengths, which truncation never is."""
    quick = ["--trainer.max_epochs", "4", "--data.validation_scales", "[1]", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(CONFIGS / f"{config}.yaml"), *quick]) == 0
    [best] = tmp_path.rglob("best-*.ckpt")
    reached = torch.load(best, weights_only=True)["HaystackDataModule"]["curriculum"]
    accuracy = accuracies(tmp_path)["val/accuracy"]
    assert reached["length"] >= 128 if learns else reached == {"length": 64, "passed": False, "validation_due": False}
    assert learns or 0.15 <= accuracy <= 0.35  # chance is 1/4; 0.1 is 5 standard errors of 512


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gradient", "learns"),
    [
        ('{"class_path": "LazyExpertRTRL", "init_args": {"window": 4, "chunk": 4}}', True),
        ('{"class_path": "benchmarks.controls.LazyExpertRTRLWithoutInfluence", "init_args": {"window": 4}}', False),
        ('{"class_path": "TBPTT", "init_args": {"window": 4}}', False),
    ],
)
def test_only_carried_influence_trains_experts(tmp_path: Path, gradient: str, learns: bool) -> None:
    """One epoch of sixteen, at the first of three lengths, with the influence advanced and read every four steps.

    Later on the controls are at chance: see the benchmark.
    """
    quick = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(CONFIGS / "haystack_moe_lazy.yaml"), "--model.gradient", gradient, *quick]) == 0
    accuracy = accuracies(tmp_path)["val/accuracy"]
    assert accuracy >= 0.9 if learns else 0.15 <= accuracy <= 0.45


@pytest.mark.slow
def test_anbn_long_is_right_at_two_and_four_times_the_length(tmp_path: Path) -> None:
    config = str(CONFIGS / "anbn_long.yaml")
    assert main(["fit", "--config", config, "--trainer.enable_progress_bar", "false"]) == 0
    reached = accuracies(tmp_path)
    assert reached["val/accuracy"] >= 0.995
    assert min(reached["val/accuracy_2x"], reached["val/accuracy_4x"]) >= 0.95


@pytest.mark.slow
def test_anbn_rtrl_learns(tmp_path: Path) -> None:
    """The first configuration of the README, to the end: 800 steps, well under three minutes."""
    assert main(["fit", "--config", str(CONFIGS / "anbn_rtrl.yaml"), "--trainer.enable_progress_bar", "false"]) == 0
    assert accuracies(tmp_path)["val/accuracy"] >= 0.995


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("options", "learns"),
    [([], True), (["--model.encoder", "PuzzleEmbedding"], False)],
    ids=["encoder", "puzzle embedding"],
)
def test_only_an_encoder_solves_puzzles_of_rules_never_trained(
    tmp_path: Path, options: list[str], learns: bool
) -> None:
    """Half of the steps of the configuration, validated once; with the demonstrations of another rule both fail."""
    quick = ["--trainer.max_steps", "350", "--model.lr_scheduler.total_steps", "700", "--data.batches_per_epoch", "350"]
    quick += ["--data.validation_size", "128", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(CONFIGS / "etrm_color_rules.yaml"), *quick, *options]) == 0
    reached = accuracies(tmp_path)
    held_out = reached["val/held_out/exact_accuracy"]
    assert held_out >= 0.25 if learns else held_out <= 0.05  # chance is nothing: 16 cells of five colours
    assert reached["val/shuffled_demos/exact_accuracy"] <= 0.08


@pytest.mark.slow
def test_trm_sudoku_begins_to_solve(tmp_path: Path) -> None:
    """A fifth of the steps; a random answer is right in none of them."""
    quick = ["--trainer.max_steps", "300", "--data.batches_per_epoch", "300"]
    quick += ["--data.puzzles", "500", "--data.held_out", "100", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(CONFIGS / "trm_sudoku.yaml"), *quick]) == 0
    assert accuracies(tmp_path)["val/held_out/exact_accuracy"] >= 0.05
