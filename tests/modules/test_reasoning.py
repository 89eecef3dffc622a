"""ReasoningModule in short runs: what is resumed, counted and logged."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rtrl_moe_pl.modules import ReasoningModule
from rtrl_moe_pl.reasoning import Carry, Encoder, Halting, PairTokenEncoder, PuzzleEmbedding, ReasoningLoss
from rtrl_moe_pl.reasoning.encoders import IterativeEncoder, VariationalEncoder
from rtrl_moe_pl.training import Freeze
from rtrl_moe_pl.training.checkpoints import PER_RANK
from tests.modules.helpers import Figures, trainer
from tests.modules.reasoning_helpers import data, module, run


def final(made: Trainer, model: ReasoningModule) -> dict[str, Any]:
    """Everything that a later batch depends on."""
    assert model._carry is not None
    state = model._carry.state_dict()
    result = {f"parameter {name}": p.detach().clone() for name, p in model.named_parameters()}
    result |= {f"moments {i}": value for i, value in enumerate(made.optimizers[0].state_dict()["state"][0].values())}
    for name, value in state.items():
        result |= {f"{name} {i}": part for i, part in enumerate(value if isinstance(value, list) else [value])}
    return result


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    assert one.keys() == two.keys()
    return all(a is b if a is None else torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))


@pytest.mark.parametrize(
    ("mode", "encoder"),
    [
        *itertools.product(
            ["re_encode", "fixed_time", "cached"], [PairTokenEncoder, PuzzleEmbedding, VariationalEncoder]
        ),
        ("re_encode", IterativeEncoder),
        ("fixed_time", IterativeEncoder),
    ],
)
def test_resumed_in_the_middle_of_a_carry_equals_unbroken(tmp_path: Path, mode: str, encoder: type[Encoder]) -> None:
    options: dict[str, Any] = {"mode": mode, "update_every": 2, "loss": ReasoningLoss("stablemax")}
    unbroken = module(encoder, **options)
    first, _ = run(tmp_path, unbroken, 5)
    interrupted, _ = run(tmp_path, module(encoder, **options), 3)
    interrupted.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = module(encoder, seed=99, **options)
    second, _ = run(tmp_path, resumed, 5, ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert second.global_step == 5
    assert same(final(first, unbroken), final(second, resumed))


def test_a_run_resumed_in_cached_mode_encodes_every_lane_first(tmp_path: Path) -> None:
    interrupted, _ = run(tmp_path, module(), 4)
    interrupted.save_checkpoint(tmp_path / "a.ckpt")
    _, logged = run(tmp_path, module(mode="cached"), 6, ckpt_path=str(tmp_path / "a.ckpt"))
    assert logged[0]["train/gradient_coverage"] == 1
    assert logged[1]["train/gradient_coverage"] < 1


def test_a_recurrent_encoder_cannot_be_cached() -> None:
    with pytest.raises(ValueError, match=r"^mode 'cached' encodes a puzzle once, but IterativeEncoder goes on"):
        module(IterativeEncoder, mode="cached")


def test_parts_may_be_frozen_between_two_batches_of_one_update(tmp_path: Path) -> None:
    frozen = trainer(tmp_path, max_steps=2, callbacks=[Freeze("encoder")], limit_train_batches=3, max_epochs=1)
    frozen.fit(module(update_every=2), datamodule=data())
    frozen.save_checkpoint(tmp_path / "a.ckpt")
    made, _ = run(tmp_path, module(update_every=2), 3, ckpt_path=str(tmp_path / "a.ckpt"))
    assert made.global_step == 3


@pytest.mark.parametrize("lost", ["latents", "steps", "index", "puzzles", "halted"])
def test_without_the_carry_it_would_differ(tmp_path: Path, lost: str) -> None:
    """Negative control: every part of the carry matters in this run."""
    interrupted, _ = run(tmp_path, module(), 4)
    interrupted.save_checkpoint(tmp_path / "stopped.ckpt")
    ends = []
    for forget in (False, True):
        checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
        kept = checkpoint[PER_RANK]["carry"]["lanes"]
        if forget:
            value = kept[lost]
            kept[lost] = (
                [v.flip(0) for v in value] if isinstance(value, list) else (value + 1 if lost != "halted" else ~value)
            )
        torch.save(checkpoint, tmp_path / "used.ckpt")
        model = module()
        made, _ = run(tmp_path, model, 9, ckpt_path=str(tmp_path / "used.ckpt"))
        ends.append(final(made, model))
    assert not same(*ends)


def test_another_batch_size_on_resuming_is_said(tmp_path: Path) -> None:
    interrupted, _ = run(tmp_path, module())
    interrupted.save_checkpoint(tmp_path / "a.ckpt")
    model = module()
    with pytest.warns(
        UserWarning, match=r"training data have changed .*lanes=5.* to .*lanes=4.*every lane begins anew"
    ):
        run(tmp_path, model, 9, datamodule=data(batch_size=4), ckpt_path=str(tmp_path / "a.ckpt"))
    assert model._carry is not None
    assert len(model._carry.index) == 4


def test_another_batch_size_under_a_live_carry_is_refused(tmp_path: Path) -> None:
    model, changing = module(), data()

    class Change(Figures):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            changing.batch_size = 4

    made = trainer(tmp_path, callbacks=[Change()])
    with pytest.raises(ValueError, match=r"training data changed under a live carry, from .*lanes=5.* to .*lanes=4"):
        made.fit(model, datamodule=changing)


def test_plain_batches_are_refused(tmp_path: Path) -> None:
    batches = [data().task.draw("train", 0, torch.arange(5))]
    with pytest.raises(TypeError, match=r"^training batches must be a PuzzleStream.*use a PuzzleDataModule$"):
        trainer(tmp_path).fit(module(), train_dataloaders=batches)


@pytest.mark.parametrize(
    ("mode", "coverage"), [("re_encode", 1.0), ("fixed_time", 1.0), ("cached", pytest.approx(1 / 3, abs=0.01))]
)
def test_gradient_coverage_is_logged(tmp_path: Path, mode: str, coverage: float) -> None:
    """In steps 4 to 9 of lanes that halt after three: all lanes, or the third part that has begun."""
    halting = Halting(max_steps=3, exploration=0)
    _, logged = run(tmp_path, module(mode=mode, halting=halting), 9)  # type: ignore[arg-type]
    mean = sum(figures["train/gradient_coverage"] for figures in logged[3:9]) / 6
    assert mean == coverage


def test_a_frozen_encoder_has_no_coverage(tmp_path: Path) -> None:
    model = module()
    model.encoder.requires_grad_(False)
    _, logged = run(tmp_path, model)
    assert logged[-1]["train/gradient_coverage"] == 0


def test_lanes_of_fixed_time_halt_after_exactly_that(tmp_path: Path) -> None:
    model = module(mode="fixed_time")
    torch.nn.init.constant_(model.decoder.halt_head.bias, 5.0)  # believes to be right at once
    run(tmp_path, model, 7)
    assert isinstance(model._carry, Carry)
    assert model._carry.steps.tolist() == [1] * 5
    assert model._carry.index.tolist() == [10, 11, 12, 13, 14]
    adaptive = module(halting=Halting(max_steps=3, exploration=0))
    torch.nn.init.constant_(adaptive.decoder.halt_head.bias, 5.0)
    run(tmp_path, adaptive, 3)
    assert isinstance(adaptive._carry, Carry)
    assert adaptive._carry.index.tolist() == [10, 11, 12, 13, 14]


def test_figures_of_training_and_evaluation(tmp_path: Path) -> None:
    model = module(evaluation_steps=[1, 5])
    made, logged = run(tmp_path, model, 8, trainer={"limit_val_batches": 1.0})
    names = {name for figures in logged for name in figures}
    for figure in (
        "loss",
        "accuracy",
        "exact_accuracy",
        "q_halt_accuracy",
        "q_halt_loss",
        "answer_loss",
        "steps",
        "gradient_coverage",
        "grad_norm",
        "encoder_grad_norm",
        "decoder_grad_norm",
        "context_cross_sample_variance",
        "context_within_group_variance",
        "puzzles_per_second",
    ):
        assert f"train/{figure}" in names
    for split in ("held_out", "train_rules", "shuffled_demos"):
        for figure in ("exact_accuracy", "exact_accuracy_max_steps", "exact_accuracy_best_q", "exact_accuracy_5_steps"):
            assert 0 <= made.logged_metrics[f"val/{split}/{figure}"] <= 1
        assert int(model.evaluations[split].count) == 7  # type: ignore[call-overload,arg-type]  # no more, no less


EVERY_SECOND = {"log_every_n_steps": 2}


@pytest.mark.parametrize("options", [{"gradient_clip": None}, {"gradient_clip": 1e-3}, {"update_every": 2}])
def test_gradient_norms_add_up(tmp_path: Path, options: dict[str, Any]) -> None:
    _, logged = run(tmp_path, module(**options))
    for figures in filter(lambda figures: "train/grad_norm" in figures, logged):
        parts = [figures[f"train/{part}_grad_norm"] for part in ("encoder", "decoder")]
        assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(figures["train/grad_norm"], rel=1e-4)


def test_q_continue_gets_a_gradient_if_wanted(tmp_path: Path) -> None:
    for wanted in (True, False):
        model = module(halting=Halting(max_steps=3, q_continue=wanted), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        run(tmp_path, model)
        bias = model.decoder.halt_head.bias.detach()
        assert (bias[1] != -5) == wanted
        assert bias[0] != -5


def test_a_kl_is_weighed_and_logged(tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 1.0):
        _, logged = run(tmp_path, module(VariationalEncoder, kl_weight=weight), 1)
        losses.append(logged[0]["train/loss"])
        assert logged[0]["train/kl"] > 0
    assert losses[1] - losses[0] == pytest.approx(logged[0]["train/kl"], rel=1e-4)


def test_figures_after_a_resume_count_what_was_seen_before_it(tmp_path: Path) -> None:
    options = {"log_every_n_steps": 4}
    _, unbroken = run(tmp_path, module(), 4, trainer=options)
    interrupted, _ = run(tmp_path, module(), 3, trainer=options)
    interrupted.save_checkpoint(tmp_path / "stopped.ckpt")
    _, resumed = run(tmp_path, module(), 4, trainer=options, ckpt_path=str(tmp_path / "stopped.ckpt"))
    for figures in (unbroken[-1], resumed[-1]):
        figures.pop("train/puzzles_per_second")
    assert resumed[-1] == unbroken[-1]


def test_a_kl_stays_in_the_figures_when_the_last_step_encoded_nothing(tmp_path: Path) -> None:
    """Of a cached mode, in which most steps encode no lane; read after every second batch."""
    halting = Halting(max_steps=2, exploration=0.0)
    _, logged = run(tmp_path, module(VariationalEncoder, mode="cached", halting=halting), 6, trainer=EVERY_SECOND)
    assert all("train/kl" in figures for figures in logged)


def test_losses_of_q_halt_and_q_continue_are_logged_apart(tmp_path: Path) -> None:
    (with_, *_), (without, *_) = (
        run(tmp_path, module(halting=Halting(max_steps=3, q_continue=wanted)), 1)[1] for wanted in (True, False)
    )
    assert with_["train/q_halt_loss"] == without["train/q_halt_loss"] > 0
    assert with_["train/q_continue_loss"] > 0
    assert "train/q_continue_loss" not in without
    gap = with_["train/loss"] - without["train/loss"]
    assert gap == pytest.approx(0.5 * with_["train/q_continue_loss"], rel=1e-3)


def test_rates_of_encoder_and_decoder(tmp_path: Path) -> None:
    model = module(encoder_lr=0.5)
    made, _ = run(tmp_path, model)
    decoder, encoder = made.optimizers[0].param_groups
    assert (decoder["lr"], encoder["lr"]) == (0.01, 0.5)
    assert len(encoder["params"]) == len(list(model.encoder.parameters()))


def test_a_checkpoint_of_another_architecture_names_what_differs(tmp_path: Path) -> None:
    made, _ = run(tmp_path, module())
    made.save_checkpoint(tmp_path / "a.ckpt")
    other = module()
    other.decoder.l_cycles = 4
    other.decoder.h_cycles = 2
    both = r"another architecture .*: decoder\.h_cycles is 1 there and 2 here, decoder\.l_cycles is 1 there and 4 here"
    with pytest.raises(ValueError, match=both):
        trainer(tmp_path).validate(other, datamodule=data(), ckpt_path=str(tmp_path / "a.ckpt"))
    with pytest.raises(ValueError, match="encoder is PairTokenEncoder there and PuzzleEmbedding here"):
        trainer(tmp_path).validate(module(PuzzleEmbedding), datamodule=data(), ckpt_path=str(tmp_path / "a.ckpt"))


@pytest.mark.parametrize(("option", "value"), [("kl_weight", -1.0), ("kl_weight", math.nan), ("encoder_lr", -1.0)])
def test_weights_and_rates_out_of_range_are_refused(option: str, value: float) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=f"^{option} must be a finite number of at least 0, got {value}"):
        module(**options)


def test_an_unknown_mode_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"^mode must be one of 're_encode', 'fixed_time', 'cached', got 'online'$"):
        module(mode="online")  # type: ignore[arg-type]
