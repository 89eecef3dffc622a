"""The command audit: every algorithm on every cell, and the modules."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl_moe_pl import cells
from rtrl_moe_pl.cells import GRU, LSTM, Cell, LeakyIntegrator, RecurrentMoE, SimpleRNN, Stack, TorchCell, VanillaRNN
from rtrl_moe_pl.cli import diagnosis, main
from rtrl_moe_pl.data.puzzles import PuzzleStream
from rtrl_moe_pl.gradients import (
    BPTT,
    RTRL,
    TBPTT,
    BlockRTRL,
    GradientAlgorithm,
    LazyExpertRTRL,
    WindowResult,
    audit_gradient,
    compare_gradients,
)
from rtrl_moe_pl.modules import ReasoningModule
from rtrl_moe_pl.modules.reasoning_audit import audit_reasoning, step_loss
from rtrl_moe_pl.reasoning import TRM, Halting
from rtrl_moe_pl.reasoning import encoders as all_encoders
from rtrl_moe_pl.reasoning.encoders import Encoder, PairTokenEncoder, PuzzleEmbedding
from rtrl_moe_pl.reasoning.trm import Answer, Latents
from rtrl_moe_pl.training.checkpoints import newest_readable
from tests.modules.reasoning_helpers import data, module
from tests.test_cli import CONFIG, here, run  # noqa: F401
from tests.test_reasoning_cli import run as run_puzzles

CELLS: dict[str, Callable[[], Cell]] = {
    "VanillaRNN": lambda: VanillaRNN(3, 5),
    "SimpleRNN": lambda: SimpleRNN(3, 5),
    "GRU": lambda: GRU(3, 5),
    "LSTM": lambda: LSTM(3, 4),
    "LeakyIntegrator": lambda: LeakyIntegrator(3, 5),
    "RecurrentMoE": lambda: RecurrentMoE(3, 3, 3, 4),
    "Stack": lambda: Stack([GRU(3, 4), LSTM(4, 3)]),
    "TorchCell RNN": lambda: TorchCell(nn.RNNCell(3, 5)),
    "TorchCell GRU": lambda: TorchCell(nn.GRUCell(3, 5)),
    "TorchCell LSTM": lambda: TorchCell(nn.LSTMCell(3, 4)),
    "learned start": lambda: GRU(3, 5, learned_initial_state=True),
}
ALGORITHMS: list[GradientAlgorithm] = [
    BPTT(),
    TBPTT(window=4),
    RTRL(window=1),
    RTRL(window=4, chunk=8),
    BlockRTRL(window=4),
    LazyExpertRTRL(window=4, ring=2, chunk=4),
]
TRAINED = [
    (name, algorithm)
    for name in CELLS
    for algorithm in ALGORITHMS
    if name == "RecurrentMoE" or not isinstance(algorithm, BlockRTRL)
]


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum()


def problem(name: str) -> tuple[Any, ...]:
    torch.manual_seed(4)
    cell, starts = CELLS[name](), torch.zeros(2, 24, dtype=torch.bool)
    starts[1, 10] = True
    return cell, nn.Linear(cell.state_size, 2), torch.randn(2, 24, 3), torch.randn(2, 24, 2), squares, starts


def test_every_cell_is_there() -> None:
    offered = {name for name in cells.__all__ if name[0].isupper()} - {"Cell", "RoutedCell", "Routing"}
    assert {name.split()[0] for name in CELLS} >= offered


@pytest.mark.parametrize(
    ("name", "algorithm"), TRAINED, ids=lambda value: value if isinstance(value, str) else repr(value)
)
def test_every_algorithm_is_what_it_claims_on_every_cell(name: str, algorithm: GradientAlgorithm) -> None:
    report = audit_gradient(algorithm, *problem(name))
    assert report.passed
    assert report.exact == (not isinstance(algorithm, TBPTT))
    assert (report.relative_error <= 1e-9) == report.exact
    assert report.zero_gradients == []


def off_by_little(algorithm: GradientAlgorithm) -> GradientAlgorithm:
    """The same algorithm; one gradient of a recurrent parameter is off by a millionth."""

    class Wrong(type(algorithm)):  # type: ignore[misc]
        def step(self, *arguments: Any, **options: Any) -> WindowResult:
            result = super().step(*arguments, **options)
            name = next(iter(result.grads))
            result.grads[name] = result.grads[name] * (1 + 1e-6)
            return result

    made = copy.copy(algorithm)
    made.__class__ = Wrong
    return made


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a.exact], ids=repr)
def test_one_that_is_off_is_noticed(algorithm: GradientAlgorithm) -> None:
    given = problem("RecurrentMoE")
    assert audit_gradient(algorithm, *given).passed
    assert not audit_gradient(off_by_little(algorithm), *given).passed


@pytest.mark.parametrize(
    ("cell", "gradient", "verdict"),
    [
        ("VanillaRNN", "RTRL", "exact"),
        ("SimpleRNN", "RTRL", "exact"),
        ("LSTM", "TBPTT", "approximate, as it claims"),
        ("LeakyIntegrator", "RTRL", "exact"),
    ],
)
def test_verdict_on_the_command_line(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    cell: str,
    gradient: str,
    verdict: str,
) -> None:
    chosen = ("--model.cell", cell, "--model.cell.hidden_size", "4", "--model.gradient", gradient)
    assert run("audit", *chosen, "--model.gradient.window", "3", "--steps", "30") == 0
    assert capsys.readouterr().out.endswith(f"verdict: {verdict}\n")


def test_more_steps_than_fit_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    steps = 10**12
    assert run("audit", "--steps", str(steps)) == 1
    captured = capsys.readouterr()
    message = rf"error: --steps {steps}: BPTT in float64 would take about .* are free: take at most about (\d+)\n"
    found = re.search(message, captured.err)
    assert found
    assert 0 < int(found[1]) < steps
    assert "verdict" not in captured.out


@pytest.mark.parametrize(
    ("cell", "gradient"),
    [
        (
            '{"class_path": "RecurrentMoE", "init_args": {"slot_size": 3, "num_slots": 3, "num_experts": 4}}',
            "BlockRTRL",
        ),
        (
            '{"class_path": "RecurrentMoE", "init_args": {"slot_size": 3, "num_slots": 3, "num_experts": 4}}',
            "LazyExpertRTRL",
        ),
        ('{"class_path": "tests.cli.test_audit.TwoLayers"}', "RTRL"),
        ('{"class_path": "tests.cli.test_audit.Adapted"}', "RTRL"),
    ],
)
def test_routed_stacked_and_adapted_cells_on_the_command_line(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    cell: str,
    gradient: str,
) -> None:
    chosen = json.dumps({"class_path": gradient, "init_args": {"window": 3}})
    assert run("audit", "--model.cell", cell, "--model.gradient", chosen, "--steps", "30") == 0
    assert capsys.readouterr().out.endswith("verdict: exact\n")


class TwoLayers(Stack):
    def __init__(self, input_size: int = 3) -> None:
        super().__init__([GRU(input_size, 4), LSTM(4, 3)])


class Adapted(TorchCell):
    def __init__(self, input_size: int = 3) -> None:
        super().__init__(nn.LSTMCell(input_size, 3))


@pytest.mark.parametrize("gradient", ["BlockRTRL", "LazyExpertRTRL"])
def test_an_algorithm_that_cannot_train_the_cell_says_so_in_a_line(
    here: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    gradient: str,
) -> None:
    chosen = json.dumps({"class_path": gradient, "init_args": {"window": 3}})
    assert run("audit", "--model.gradient", chosen) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line == (
        f"error: {gradient} needs a cell that chooses slots (a RoutedCell, such as RecurrentMoE), and GRU is none: "
        "use RTRL(window=3)"
    )


# ---- puzzles

ENCODERS = [getattr(all_encoders, name) for name in all_encoders.__all__ if name not in ("Encoder", "Encoding")]
MODES = [(encoder, "re_encode") for encoder in ENCODERS]
MODES += [(PairTokenEncoder, "fixed_time"), (PairTokenEncoder, "cached"), (all_encoders.VariationalEncoder, "cached")]


def puzzle_model(encoder: type[Encoder] = PairTokenEncoder, **options: Any) -> ReasoningModule:
    """Three rounds, of which the last is differentiated; halting that depends on the state."""
    made = module(encoder, halting=Halting(3, 0.3, q_continue=True), **options)
    made.decoder.h_cycles = 3
    nn.init.normal_(made.decoder.halt_head.weight)
    nn.init.zeros_(made.decoder.halt_head.bias)
    return made


def stream() -> PuzzleStream:
    made = data().on_after_batch_transfer("train", 0)
    assert isinstance(made, PuzzleStream)
    return made


@pytest.mark.parametrize(("encoder", "mode"), MODES)
def test_reasoning_is_the_truncation_it_claims_to_be(encoder: type[Encoder], mode: str) -> None:
    report = audit_reasoning(puzzle_model(encoder, mode=mode), stream(), 4)
    assert report.used.passed
    assert not report.whole.exact
    assert report.whole.relative_error > 0.01
    assert 0 < report.whole.cosine < 1


@pytest.mark.parametrize(("mode", "exact"), [("re_encode", True), ("cached", False)])
def test_nothing_is_cut_if_all_rounds_are_differentiated(mode: str, exact: bool) -> None:
    """But in mode cached, the context of lanes that have begun before."""
    model = puzzle_model(mode=mode)
    model.decoder.grad_cycles = 3
    report = audit_reasoning(model, stream(), 2)
    assert report.used.passed
    assert report.whole.exact == exact
    assert (report.whole.relative_error <= 1e-9) == exact


@pytest.mark.parametrize("cut", [True, False])
def test_the_reference_is_the_slope_of_the_loss(cut: bool) -> None:
    """Central differences; of what is cut, with what comes before the cut held fixed."""
    model = puzzle_model(loss=None).double()
    model.halting.q_continue = False  # its target is a number, and would move
    puzzles, decoder = stream(), model.decoder
    carry = model._renewed(puzzles)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(
        step_loss(model, carry, puzzles.seed, cut), list(parameters.values()), allow_unused=True
    )
    direction = [torch.randn_like(p) for p in parameters.values()]
    expected = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True) if g is not None)
    if cut:  # the last round alone, from where the first two have come to
        with torch.no_grad():
            decoder.h_cycles = 2
            context = model.encoder(carry.puzzles, None, None).context
            latents, _ = decoder(carry.latents, carry.puzzles.inputs, context)
        carry, decoder.h_cycles = carry.__class__(**{**vars(carry), "latents": latents}), 1

    def moved(step: float) -> float:
        with torch.no_grad():
            for parameter, d in zip(parameters.values(), direction, strict=True):
                parameter += step * d
            value = float(step_loss(model, carry, puzzles.seed, False))
            for parameter, d in zip(parameters.values(), direction, strict=True):
                parameter -= step * d
        return value

    assert (moved(1e-6) - moved(-1e-6)) / 2e-6 == pytest.approx(expected, rel=1e-5)


class OffByLittle(ReasoningModule):
    """One gradient is off by a millionth."""

    def update_parameters(self, grads: Mapping[str, Tensor], *rest: Any) -> Any:
        raise AssertionError("an audit updates nothing")

    def _gradients(self, *arguments: Any) -> tuple[dict[str, Tensor], Tensor]:
        grads, reached = super()._gradients(*arguments)
        return {name: g * (1 + 1e-6 * name.endswith("position")) for name, g in grads.items()}, reached


class ForgetsARound(TRM):
    """The input of the last round has no gradient: the embedding learns nothing, and the encoder."""

    def forward(self, latents: Latents, inputs: Tensor, context: Tensor) -> tuple[Latents, Answer]:
        return super().forward(latents, inputs, context.detach())


def test_the_audit_of_puzzles_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_puzzles("audit", "--steps", "3") == 0
    shown = capsys.readouterr().out
    for part in (
        "mode re_encode, 5 lanes x 3 supervision steps, float64: gradients through the last 1 of 2 rounds",
        "\ndecoder.blocks.0.mixer.qkv.weight ",
        "\nparameters without gradient: ",
        "\nmemory: about ",
        "\ntime: ",
        "\nverdict: approximate, as it claims: through the last 1 of 2 rounds; cosine 0.",
    ):
        assert part in shown
    assert list(tmp_path.iterdir()) == []
    assert run_puzzles("audit", "--model.decoder.grad_cycles", "2") == 0
    assert "\nverdict: exact within a supervision step\n" in capsys.readouterr().out


def test_puzzle_gradients_that_are_off_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs/etrm_color_rules.yaml"
    text = config.read_text().replace("ReasoningModule", "tests.cli.test_audit.OffByLittle", 1)
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["audit", "--config", "wrong.yaml", "--data.batch_size", "4"]) == 1
    assert "verdict: OFF, though it claims to be the gradient through the last 1 of 2 rounds" in capsys.readouterr().out


def test_what_the_module_throws_away_is_listed() -> None:
    """A decoder that cuts its context agrees with itself, so it is the list of parameters that tells."""
    model = puzzle_model(PuzzleEmbedding)
    model.decoder.__class__ = ForgetsARound
    assert audit_reasoning(model, stream(), 1).used.zero_gradients == ["encoder.table"]


def test_weights_and_module_stay_as_they_are() -> None:
    model = puzzle_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audit_reasoning(model, stream(), 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model._carry is None
    assert model.dtype == torch.float32


def test_gradients_are_compared_by_name() -> None:
    one, two = (
        {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(1)},
        {"b": torch.zeros(1), "a": torch.tensor([3.0, 4.5])},
    )
    report = compare_gradients(one, two, True)
    assert report.parameters["a"].norm == 5
    assert report.relative_error == pytest.approx(0.5 / 29.25**0.5)
    assert report.zero_gradients == ["b"]
    assert not report.passed


@pytest.mark.parametrize(("steps", "message"), [("0", "--steps must be at least 1, got 0"), ("x", "steps: ")])
def test_bad_options_of_puzzles_are_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_puzzles("audit", "--steps", steps) == 1
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["audit", "forecast"])
def test_the_weights_of_a_checkpoint_are_taken(
    here: Path,  # noqa: F811
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the configuration that the run saved, in which ckpt_path is null; those of another model are refused."""
    taken: list[dict[str, Tensor]] = []
    monkeypatch.setattr(diagnosis, command, lambda model, *_: taken.append(model.state_dict()) or True)
    assert run("fit", "--trainer.max_steps=3") == 0
    [saved] = Path("lightning_logs").rglob("config.yaml")
    for options in ([], ["--ckpt_path=last"]):
        assert main([command, f"--config={saved}", *options]) == 0
    new, trained = taken
    expected = torch.load(newest_readable(Path("lightning_logs")), weights_only=True)["state_dict"]
    assert all(torch.equal(trained[name], value) for name, value in expected.items())
    assert not torch.equal(trained["readout.weight"], new["readout.weight"])
    assert run(command, "--ckpt_path=last", "--model.cell.hidden_size=6") == 1
    assert "cell.input.weight is" in capsys.readouterr().err
