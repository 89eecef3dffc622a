"""Early warnings: each fires when it is provoked, once, and none in a healthy run."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rtrl_moe_pl.cells import GRU, LSTM, RecurrentMoE, VanillaRNN
from rtrl_moe_pl.cells.base import Cell
from rtrl_moe_pl.gradients import RTRL, TBPTT, LazyExpertRTRL
from rtrl_moe_pl.modules import (
    GrowthWatch,
    IdleWatch,
    SequenceModule,
    StalenessWatch,
    TrainingWarning,
    UpdateSizeWatch,
)
from rtrl_moe_pl.modules.watch import Watch
from rtrl_moe_pl.training import Freeze, SignSGD
from tests.modules.helpers import Figures, data, module, trainer
from tests.training.small_run import Tables


def sgd(lr: float) -> Any:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def built(cell: Any, gradient: Any = None, **options: Any) -> SequenceModule:
    torch.manual_seed(1)
    return SequenceModule(cell, 2, gradient or RTRL(window=4), **options)


def warned(folder: Path, model: SequenceModule, *watches: Callback, source: Any = None, **options: Any) -> list[str]:
    """The warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, callbacks=list(watches), **{"max_steps": 30, **options}).fit(model, source or data())
    return [str(one.message) for one in caught if one.category is TrainingWarning]


def defaults() -> list[Watch]:
    return [GrowthWatch(), IdleWatch(), UpdateSizeWatch(), StalenessWatch()]


@pytest.mark.parametrize("cell", [lambda: GRU(3, 8), lambda: LSTM(3, 8), lambda: VanillaRNN(3, 8)])
@pytest.mark.parametrize("gradient", [RTRL(window=6), TBPTT(window=3)])
def test_a_healthy_run_is_not_warned_of(tmp_path: Path, cell: Any, gradient: Any) -> None:
    assert warned(tmp_path, built(cell(), gradient), *defaults()) == []


def test_no_look_changes_training(tmp_path: Path) -> None:
    watched, plain = module(), module()
    trainer(tmp_path, callbacks=defaults()).fit(watched, data())
    trainer(tmp_path).fit(plain, data())
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), plain.parameters(), strict=True))


def test_only_modules_of_this_package_are_watched(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"IdleWatch needs a module of rtrl_moe_pl\.modules, got Tables"):
        trainer(tmp_path, callbacks=[IdleWatch()]).fit(Tables(), data())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GrowthWatch(state=0), "state must be"),
        (lambda: GrowthWatch(looks=1), "looks must be at least 2, got 1"),
        (lambda: UpdateSizeWatch(large=-1), "large must be"),
        (lambda: IdleWatch(looks=0), "looks must be at least 1, got 0"),
        (lambda: StalenessWatch(decay=0.0), "decay must be above 0 and at most 1, got 0"),
        (lambda: StalenessWatch(decay=1.5), "decay must be above 0 and at most 1, got 1.5"),
        (lambda: StalenessWatch(reset_every=0), "reset_every must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- growth


def recurrent(gain: float, **options: Any) -> VanillaRNN:
    cell = VanillaRNN(3, 8, **options)
    with torch.no_grad():
        cell.recurrent.weight.copy_(gain * torch.linalg.qr(torch.randn(8, 8))[0])
    return cell


FEW: dict[str, Any] = {"max_epochs": 1, "limit_train_batches": 4}


def test_an_exploding_influence_is_warned_of_once(tmp_path: Path) -> None:
    """Weights of gain 3; where tanh would hide it at first, inputs are small."""
    model = built(recurrent(3.0))
    with torch.no_grad():
        for p in model.cell.input.parameters():  # type: ignore[union-attr]
            p.mul_(1e-12)
    found = warned(tmp_path, model, GrowthWatch(), source=long(), **FEW)
    assert len(found) == 1
    assert "step 0: train/influence_norm is" in found[0]
    assert "try a smaller learning rate, a gated cell" in found[0]
    assert warned(tmp_path, built(recurrent(0.9)), GrowthWatch(), source=long(), **FEW) == []


def long() -> Any:
    """Sequences of 200 steps."""
    return type(data())(n_min=60, n_max=64, batch_size=3, steps_per_batch=24, batches_per_epoch=5)


def test_a_large_state_is_warned_of(tmp_path: Path) -> None:
    cell = VanillaRNN(3, 8, nonlinearity="relu", recurrent_init="identity")
    with torch.no_grad():
        cell.recurrent.weight.mul_(1.15)
    found = warned(tmp_path, built(cell), GrowthWatch(), source=long(), **FEW)
    assert any("train/state_norm is" in text and "above 100" in text for text in found)


def growth_of(sizes: list[float], ranks: int = 1, **options: Any) -> list[str]:
    """What a GrowthWatch says of influence norms of a matrix of one entry."""
    watch, model = GrowthWatch(**options), module()
    run: Any = SimpleNamespace(global_step=7, is_global_zero=True, world_size=ranks)
    watch.setup(run, model, "fit")
    watch.on_train_start(run, model)
    shapes = {"p": torch.Size([])}
    held = SimpleNamespace(state=torch.zeros(1, 1), base=SimpleNamespace(shapes=shapes))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in sizes:
            figures = {"train/state_norm": 0.5, "train/influence_norm": size}
            watch.look(run, SimpleNamespace(memory=held, figures=figures))
    return [str(one.message) for one in caught]


def test_steady_growth_is_warned_of_and_a_peak_is_not() -> None:
    [text] = growth_of([0.5, 1, 2, 250, 300, 350, 400], looks=6)
    assert text.startswith("step 7: train/influence_norm is 350, 350 an entry, and it was at most 2 3 looks ago")
    assert growth_of([0.5, 1, 2, 600, 1, 600], looks=6) == []  # up and down
    assert growth_of([0, 0, 0, 0.5, 0.5, 0.5], looks=6) == []  # from nothing to something
    assert growth_of([1e-6, 1e-6, 1e-6, 0.5, 0.5, 0.5], looks=6) == []
    assert growth_of([1, 1, 1, 300, 300, 300], looks=6, factor=1000) == []


def test_the_norm_of_the_lanes_of_four_processes_is_of_four_times_the_entries() -> None:
    assert len(growth_of([1500])) == 1
    assert growth_of([1500], ranks=4) == []


# ---- updates


@pytest.mark.parametrize(
    ("lr", "large", "says"), [(0.3, 1e-5, "above 1e-05: try a smaller"), (1e-12, 0.1, "below 1e-07: nothing is")]
)
def test_updates_that_are_too_large_or_too_small_are_warned_of(
    tmp_path: Path, lr: float, large: float, says: str
) -> None:
    [text] = warned(tmp_path, module(optimizer=sgd(lr)), UpdateSizeWatch(large=large))
    assert text.startswith("step 5: train/update_size was")
    assert says in text


@pytest.mark.parametrize("optimizer", [sgd(1e4), lambda parameters: torch.optim.Adam(parameters, lr=3.0)])
def test_an_update_that_makes_most_of_the_weights_is_warned_of_at_once(tmp_path: Path, optimizer: Any) -> None:
    """The first one: the size of later ones is over what the weights have become."""
    text, *_ = warned(tmp_path, module(optimizer=optimizer), UpdateSizeWatch())
    assert re.match(r"step 1: train/update_size was (0\.9|1)", text)
    assert text.endswith(
        "one update made most of what the weights are now: try a smaller learning rate, or a warmup of it"
    )


def test_weights_that_were_zero_are_judged_once_they_have_a_size(tmp_path: Path) -> None:
    """As an embedding of puzzles is, all else frozen: whatever the learning rate, the first update makes them."""

    def zeros() -> SequenceModule:
        model = module(optimizer=lambda parameters: SignSGD(parameters, lr=0.01))
        for name, p in model.named_parameters():
            nn.init.zeros_(p)
            p.requires_grad_(name.endswith("bias"))
        return model

    assert warned(tmp_path, zeros(), UpdateSizeWatch()) == []
    [text] = warned(tmp_path, zeros(), UpdateSizeWatch(large=0.99))  # all but the first; the signs change at step 4
    assert text.startswith("step 4: train/update_size was")


class Thrown(torch.optim.Optimizer):
    """Throws weights from one side to the other, whatever the gradient."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.side = 0.1

    def step(self, closure: Any) -> None:
        closure()  # with Lightning's hooks in it
        self.side = -self.side
        for group in self.param_groups:
            for p in group["params"]:
                p.data.fill_(self.side)


def of_zeros(optimizer: Any, **options: Any) -> SequenceModule:
    model = module(optimizer=optimizer, **options)
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def test_a_runaway_from_zero_is_warned_of_later(tmp_path: Path) -> None:
    """When a random walk would have come below; the watch's state has when that was."""
    watch = UpdateSizeWatch(large=0.3)
    [text] = warned(tmp_path, of_zeros(Thrown), watch)
    assert text.startswith("step 13: train/update_size was 2: ")  # 12 > 1 / 0.3^2 updates after the first
    assert watch.state_dict()["_zero_at"] == 1


def test_a_warm_up_from_zero_is_no_runaway(tmp_path: Path) -> None:
    """Its first update leaves the weights at zero, at a rate of 0."""
    model = of_zeros(lambda p: SignSGD(p, lr=0.1), lr_scheduler=lambda o: LambdaLR(o, lambda step: step / 100))
    assert warned(tmp_path, model, UpdateSizeWatch(), log_every_n_steps=2) == []


def test_frozen_weights_are_no_fault_of_a_watch(tmp_path: Path) -> None:
    assert warned(tmp_path, module(), *defaults(), Freeze("cell")) == []


class Weights(Figures):
    """Also keeps the weights after every batch, and which lanes started in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[dict[str, torch.Tensor]] = []
        self.started: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        self.started.append(batch.starts.any(1))


def flat(weights: dict[str, torch.Tensor], part: str = "") -> torch.Tensor:
    return torch.cat([p.flatten() for name, p in weights.items() if name.startswith(part)])


@pytest.mark.parametrize("update_every", [1, 3])
def test_update_size_is_the_relative_change_of_the_weights(tmp_path: Path, update_every: int) -> None:
    """Of an update between two looks, if the batch that is looked at made none."""
    seen, model = Weights(), module(update_every=update_every)
    run = trainer(tmp_path, callbacks=[UpdateSizeWatch(), seen], log_every_n_steps=4, max_steps=8)
    run.fit(model, data(batches_per_epoch=30))
    before, after = (flat(seen.weights[batch]) for batch in ((6, 7) if update_every == 1 else (16, 17)))
    found = seen.logged[7 if update_every == 1 else 19]["train/update_size"]
    assert found == pytest.approx(float((after - before).norm() / after.norm()), rel=1e-4)


# ---- what is idle


class Unused(GRU):
    """With a parameter that nothing depends on."""

    def __init__(self) -> None:
        super().__init__(3, 5)
        self.spare = nn.Parameter(torch.ones(2))


def test_a_parameter_without_gradient_is_named(tmp_path: Path) -> None:
    [text] = warned(tmp_path, built(Unused()), IdleWatch())
    assert "1 of 7 parameters had no gradient at 10 looks in a row (cell.spare)" in text
    frozen = built(Unused())
    frozen.cell.spare.requires_grad_(False)  # type: ignore[union-attr]
    assert warned(tmp_path, frozen, IdleWatch()) == []


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_dead_and_saturated_units_are_numbered(tmp_path: Path, nonlinearity: str) -> None:
    cell = VanillaRNN(3, 8, nonlinearity=nonlinearity)  # type: ignore[arg-type]
    with torch.no_grad():
        cell.input.bias.fill_(0.5 if nonlinearity == "relu" else 0.0)
        cell.input.bias[2:4] = -100.0
    [text] = warned(tmp_path, built(cell), IdleWatch(looks=8))
    assert "2 of 8 units of the state did not change, in any lane, at 8 looks in a row (2, 3)" in text


def experts(**options: Any) -> SequenceModule:
    return built(RecurrentMoE(3, 4, 4, 6, **options), LazyExpertRTRL(window=3))


def test_experts_and_slots_that_nothing_uses_are_numbered(tmp_path: Path) -> None:
    dead = experts(balance_rate=0.0)
    with torch.no_grad():
        dead.cell.expert_bias[[1, 4]] = -torch.inf  # type: ignore[index]
        dead.cell.write_bias[2] = -torch.inf  # type: ignore[index]
    assert warned(tmp_path, dead, IdleWatch()) == []  # not for long enough
    found = warned(tmp_path, dead, IdleWatch(updates=10))
    [text] = [text for text in found if "experts were not used at 10 looks in a row" in text]
    assert {"1", "4"} <= set(text.partition("(")[2].partition(")")[0].split(", "))
    assert "try a larger balance_rate" in text
    assert any("1 of 4 slots were not written at 10 looks in a row (2)" in text for text in found)
    assert warned(tmp_path, experts(balance_rate=0.1, slot_balance_rate=0.1), *defaults()) == []


# ---- staleness


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_staleness_sums_up_the_updates_since_every_lanes_start(tmp_path: Path, decay: float) -> None:
    seen = Weights()
    run = trainer(tmp_path, callbacks=[StalenessWatch(decay=decay), seen], max_steps=12)
    run.fit(built(GRU(3, 5)), data(batches_per_epoch=12))
    stale, sizes = torch.zeros(3, dtype=torch.float64), []
    for batch in range(1, len(seen.weights)):
        old, new = (flat(seen.weights[b], "cell") for b in (batch - 1, batch))
        moved = float((new - old).norm() / new.norm())
        stale = torch.where(seen.started[batch], 0.0, (decay if moved else 1.0) * stale + moved)
        sizes.append(float(stale.mean()))
    assert max(sizes) > 0
    found = [logged["train/staleness"] for logged in seen.logged[1:]]
    assert found == pytest.approx(sizes, rel=1e-4)


def test_influence_of_other_weights_is_warned_of(tmp_path: Path) -> None:
    [text] = warned(tmp_path, module(lr=0.1), StalenessWatch(threshold=0.01), source=long(), max_steps=12)
    assert "above 0.01: the influence is of other weights; try a smaller learning rate" in text
    none = module(TBPTT(window=4), lr=0.1)  # carries no influence
    assert warned(tmp_path, none, StalenessWatch(threshold=0.01), source=long(), max_steps=12) == []


def weights_of(folder: Path, gradient: Any, *watches: Watch, cell: type[Cell] = GRU, **options: Any) -> torch.Tensor:
    torch.manual_seed(1)
    model = built(cell(3, 5), gradient, optimizer=sgd(0.5))
    trainer(folder, callbacks=list(watches), **{"max_steps": 10, **options}).fit(model, data(batch_size=16))
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("chunk", [None, 6])
def test_reset_after_every_update_exact_gradients_are_truncated_ones(tmp_path: Path, chunk: int | None) -> None:
    """And with a decay they are in between."""
    exact, truncated = RTRL(window=6, chunk=chunk), weights_of(tmp_path, TBPTT(window=6))
    plain = weights_of(tmp_path, exact)
    assert not torch.allclose(plain, truncated, rtol=1e-3)  # influence matters here
    torch.testing.assert_close(
        weights_of(tmp_path, exact, StalenessWatch(reset_every=1)), truncated, rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(weights_of(tmp_path, exact, StalenessWatch(reset_every=2)), truncated, rtol=1e-3)
    torch.testing.assert_close(
        weights_of(tmp_path, exact, StalenessWatch(decay=1e-12)), truncated, rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(weights_of(tmp_path, exact, StalenessWatch(decay=0.9)), plain, rtol=1e-4)
    assert torch.equal(weights_of(tmp_path, exact, StalenessWatch(decay=1.0)), plain)


@pytest.mark.parametrize("options", [{"decay": 0.7}, {"reset_every": 3}])
def test_decay_and_reset_resume_to_the_last_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, part, resumed = module(), module(), module()
    trainer(tmp_path, callbacks=[StalenessWatch(**options)], max_steps=11).fit(whole, data())
    run = trainer(tmp_path, callbacks=[StalenessWatch(**options)], max_steps=4)
    run.fit(part, data())
    run.save_checkpoint(tmp_path / "four.ckpt")
    run = trainer(tmp_path, callbacks=[StalenessWatch(**options)], max_steps=11)
    run.fit(resumed, data(), ckpt_path=str(tmp_path / "four.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
