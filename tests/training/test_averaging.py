"""The average by hand, in validation, in checkpoints, and when a run resumes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, WeightAveraging
from torch import Tensor

from rtrl_moe_pl.training.averaging import EMA
from rtrl_moe_pl.training.checkpoints import PER_RANK
from rtrl_moe_pl.training.last_checkpoint import LastCheckpoint
from tests.modules import helpers
from tests.training.small_run import Tables, copied, equal, trainer

DECAY = 0.5


class Raw(Callback):
    """Keeps the weights after every step, those of the average, and the average that the run starts with."""

    def __init__(self) -> None:
        self.raw: list[dict[str, Tensor]] = []
        self.averages: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.initial = average(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.raw.append(copied(pl_module))
        self.averages.append(average(trainer))


def average(trainer: Any) -> dict[str, Tensor]:
    models = [callback._average_model for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    return copied(models[0].module) if models and models[0] else {}


def run(folder: Path, steps: int = 9, ema: bool = True, module: Tables | None = None, **fit: Any) -> tuple:
    module, kept = module or Tables(), Raw()
    callbacks = [*([EMA(DECAY)] if ema else []), kept, LastCheckpoint()]
    runner = trainer(folder, steps, callbacks=callbacks)
    runner.fit(module, **fit)
    return module, kept, runner


def load(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def differ(one: dict[str, Tensor], other: dict[str, Tensor], names: set[str]) -> bool:
    return all(not torch.equal(one[name], other[name]) for name in names)


FLOATS = {"table.weight", "readout.weight", "readout.bias", "running"}


# ---- what is averaged


def test_everything_is_averaged_with_a_warmed_up_decay(tmp_path: Path) -> None:
    module, kept, _ = run(tmp_path)
    assert {name for name, _ in module.named_parameters()} | {"running"} == FLOATS  # the embedding table as well
    expected = kept.raw[0]
    for n, (raw, averaged) in enumerate(zip(kept.raw, kept.averages, strict=True)):
        decay = min(DECAY, (1 + n) / (10 + n)) if n else 0.0
        expected = {name: decay * expected[name] + (1 - decay) * raw[name] for name in FLOATS}
        for name in FLOATS:
            torch.testing.assert_close(averaged[name], expected[name])
        assert averaged["steps"].dtype == torch.int64
        assert averaged["steps"] == raw["steps"] == n + 1  # a count is copied
    assert differ(kept.raw[-1], kept.averages[-1], FLOATS)


def test_a_short_run_is_not_an_average_over_its_initial_weights(tmp_path: Path) -> None:
    initial = copied(Tables())["readout.weight"]

    def share_of_the_way(callback: Callback) -> float:
        module = Tables()
        runner = trainer(tmp_path, 6, callbacks=[callback, kept := Raw()], enable_checkpointing=False)
        runner.fit(module)
        raw = kept.raw[-1]["readout.weight"]
        return float((module.readout.weight.detach() - initial).norm() / (raw - initial).norm())

    assert share_of_the_way(EMA(0.999)) > 0.7
    assert share_of_the_way(EMAWeightAveraging(decay=0.999)) < 0.4  # negative control: a constant decay


def test_a_callback_used_again_averages_from_the_first_step(tmp_path: Path) -> None:
    ema = EMA(DECAY)
    for steps in (6, 2):
        module, kept = Tables(), Raw()
        trainer(tmp_path, steps, callbacks=[ema, kept], enable_checkpointing=False).fit(module)
        assert ema._average_model is not None
        assert ema._average_model.n_averaged == steps
        assert equal(module.validated[-1], kept.averages[-1])
        assert equal(copied(module), kept.averages[-1])


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_without_an_average_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"^decay must be at least 0 and below 1, got {decay}$"):
        EMA(decay)


def test_the_average_has_the_precision_of_the_module(tmp_path: Path) -> None:
    module, kept = Tables(), Raw()
    trainer(tmp_path, 3, callbacks=[EMA(DECAY), kept], precision="64-true", enable_checkpointing=False).fit(module)
    assert kept.averages[-1]["table.weight"].dtype == torch.float64
    assert module.table.weight.dtype == torch.float64
    assert torch.equal(module.table.weight, kept.averages[-1]["table.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_average_is_on_the_device_of_the_module(tmp_path: Path) -> None:
    devices = set()

    class Devices(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            assert ema._average_model is not None
            devices.update(tensor.device.type for tensor in ema._average_model.state_dict().values())

    ema, module = EMA(DECAY), Tables()
    trainer(tmp_path, 6, callbacks=[ema, Devices(), LastCheckpoint()], accelerator="gpu", devices=1).fit(module)
    assert devices == {"cuda"}
    assert equal(load(tmp_path)["state_dict"], {k: v.to("cuda") for k, v in copied(module).items()})


# ---- validation


def test_validation_sees_the_average_and_training_the_raw_weights(tmp_path: Path) -> None:
    module, kept, _ = run(tmp_path)
    plain, without, _ = run(tmp_path / "without", ema=False)
    assert equal(kept.raw, without.raw)  # averaging changes nothing in training
    assert len(module.validated) == len(plain.validated) == 4
    for index, step in enumerate((1, 3, 5, 7)):
        assert equal(module.validated[index], kept.averages[step])
        assert equal(plain.validated[index], kept.raw[step])  # negative control
        assert differ(module.validated[index], plain.validated[index], FLOATS)


def test_a_sanity_check_before_the_first_step_sees_the_weights_as_they_are(tmp_path: Path) -> None:
    module = Tables()
    trainer(tmp_path, 2, callbacks=[EMA(DECAY)], num_sanity_val_steps=1, enable_checkpointing=False).fit(module)
    assert equal(module.validated[0], copied(Tables()))


def test_the_raw_weights_come_back_when_validation_raises(tmp_path: Path) -> None:
    module, kept = Tables(fails_at=2), Raw()
    with pytest.raises(RuntimeError, match="validation failed"):
        trainer(tmp_path, callbacks=[EMA(DECAY), kept], steps=9, enable_checkpointing=False).fit(module)
    assert equal(module.validated[1], kept.averages[3])
    assert equal(copied(module), kept.raw[3])
    assert differ(kept.raw[3], kept.averages[3], FLOATS)


# ---- checkpoints


@pytest.mark.parametrize("end", [7, 8])  # saved at the end alone, and after validation
def test_a_checkpoint_holds_average_and_raw_weights_also_the_last(tmp_path: Path, end: int) -> None:
    module, kept, _ = run(tmp_path, end)
    saved = load(tmp_path)
    assert saved["global_step"] == end
    assert equal(saved["current_model_state"], kept.raw[-1])
    assert equal(saved["state_dict"], kept.averages[-1])
    assert equal(copied(module), kept.averages[-1])  # after fit the module is the average


def test_negative_control_lightnings_own_callback_loses_the_raw_weights_at_the_end(tmp_path: Path) -> None:
    kept = Raw()
    trainer(tmp_path, 7, callbacks=[EMAWeightAveraging(decay=DECAY), kept, LastCheckpoint()]).fit(Tables())
    assert not equal(load(tmp_path)["current_model_state"], kept.raw[-1])


def test_a_checkpoint_written_after_fit_holds_both_as_well(tmp_path: Path) -> None:
    _, kept, runner = run(tmp_path)
    runner.save_checkpoint(tmp_path / "checkpoints" / "after.ckpt")
    saved = load(tmp_path, "after")
    assert equal(saved["current_model_state"], kept.raw[-1])
    assert equal(saved["state_dict"], kept.averages[-1])


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_evaluation_uses_the_average_without_a_warning(tmp_path: Path, loop: str) -> None:
    _, kept, _ = run(tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    for callback in (EMA(DECAY), LastCheckpoint(), EMAWeightAveraging(decay=DECAY)):
        module = Tables(seed=2)
        runner = trainer(tmp_path / "evaluation", callbacks=[callback])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(runner, loop)(module, ckpt_path=path, weights_only=True)
            runner.save_checkpoint(tmp_path / "again.ckpt")
        assert equal(module.validated[0], kept.averages[-1])
        assert equal(torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"], kept.averages[-1])
        warned = any("WeightAveraging" in str(warning.message) for warning in caught)
        assert warned == isinstance(callback, EMAWeightAveraging)  # Lightning's own is the negative control


def test_evaluation_after_fit_uses_the_average(tmp_path: Path) -> None:
    module, kept, runner = run(tmp_path)
    for _ in range(2):
        runner.validate(module)
        assert equal(module.validated[-1], kept.averages[-1])
        assert equal(copied(module), kept.averages[-1])


# ---- resuming


def same_end(one: tuple, other: tuple) -> bool:
    (a, kept_a, runner_a), (b, kept_b, runner_b) = one, other
    return (
        equal(kept_a.raw[-1], kept_b.raw[-1])
        and equal(copied(a), copied(b))
        and equal(runner_a.optimizers[0].state_dict(), runner_b.optimizers[0].state_dict())
    )


@pytest.mark.parametrize("end", [6, 7, 8])  # in an epoch after validation, at the end alone, after an epoch
def test_a_resumed_run_is_bit_identical(tmp_path: Path, end: int) -> None:
    whole = run(tmp_path / "whole", 11)
    run(tmp_path / "first", end)
    path = tmp_path / "first" / "checkpoints" / "last.ckpt"
    resumed = run(tmp_path / "second", 11, module=Tables(seed=2), ckpt_path=path, weights_only=True)
    assert same_end(resumed, whole)
    ends = [load(tmp_path / name) for name in ("whole", "second")]
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert equal(ends[0][key], ends[1][key])


def test_resuming_at_the_end_keeps_both(tmp_path: Path) -> None:
    whole, _, _ = run(tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    module, kept, runner = run(tmp_path / "second", module=Tables(seed=2), ckpt_path=path)
    runner.save_checkpoint(tmp_path / "checkpoints" / "again.ckpt")
    assert not kept.raw  # no step was left
    assert equal(copied(module), copied(whole))
    saved, again = load(tmp_path), load(tmp_path, "again")
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert equal(saved[key], again[key])


def test_a_run_without_an_average_resumed_with_one_starts_it(tmp_path: Path) -> None:
    _, whole, _ = run(tmp_path / "whole", ema=False)
    run(tmp_path / "first", 6, ema=False)
    path = tmp_path / "first" / "checkpoints" / "last.ckpt"
    module = Tables(seed=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, kept, _ = run(tmp_path / "second", module=module, ckpt_path=path)
    assert not [warning for warning in caught if "WeightAveraging" in str(warning.message)]
    assert equal(kept.raw[-1], whole.raw[-1])
    assert equal(kept.initial, whole.raw[5])
    assert equal(kept.averages[0], kept.raw[0])  # the weights after its first step, nothing of before
    assert differ(kept.averages[-1], kept.raw[-1], FLOATS)


@pytest.mark.parametrize("resumes_raw", [True, False])
def test_a_run_with_an_average_resumed_without_goes_on_with_the_raw_weights(tmp_path: Path, resumes_raw: bool) -> None:
    _, whole, _ = run(tmp_path / "whole", ema=False)
    run(tmp_path / "first", 6)
    path = tmp_path / "first" / "checkpoints" / "last.ckpt"
    module = Tables(seed=2, resumes_raw=resumes_raw)
    _, kept, _ = run(tmp_path / "second", ema=False, module=module, ckpt_path=path)
    assert equal(kept.raw[-1], whole.raw[-1]) == resumes_raw  # False is the negative control: the average is trained on


def test_a_sequence_module_with_an_average_resumes_bit_identically(tmp_path: Path) -> None:
    def go(folder: Path, steps: int, **fit: Any) -> dict[str, Any]:
        callbacks = [EMA(0.9), LastCheckpoint()]
        options = {"enable_checkpointing": True, "callbacks": callbacks, "limit_val_batches": 1, "max_steps": steps}
        helpers.trainer(folder, **options).fit(helpers.module(), helpers.data(), **fit)
        return load(folder)

    whole = go(tmp_path / "whole", 8)
    go(tmp_path / "first", 3)
    resumed = go(tmp_path / "second", 8, ckpt_path=tmp_path / "first" / "checkpoints" / "last.ckpt")
    for checkpoint in (whole, resumed):
        del checkpoint[PER_RANK]["figures"]["seconds"]  # the time it took
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", PER_RANK):
        assert equal(whole[key], resumed[key])
    assert not equal(whole["state_dict"], whole["current_model_state"])
