"""NaN and infinity stop the run, name the first bad tensor, and keep the last good checkpoint."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from rtrl_moe_pl.data import AnBnDataModule, Batch
from rtrl_moe_pl.gradients import RTRL
from rtrl_moe_pl.modules import SequenceModule, WeightedCrossEntropy
from rtrl_moe_pl.training import NumericalFailure
from tests.modules.helpers import data, module, trainer
from tests.modules.reasoning_helpers import data as reasoning_data
from tests.modules.reasoning_helpers import module as reasoning_module


class BadInputs(AnBnDataModule):
    """NaN in the inputs of the fourth batch."""

    batches = 0

    def on_after_batch_transfer(self, batch, dataloader_idx: int) -> Batch:
        made = super().on_after_batch_transfer(batch, dataloader_idx)
        self.batches += self.trainer.training  # type: ignore[union-attr]
        if self.batches == 4:
            made.inputs[0, 0, 0] = float("nan")
        return made


class BadLoss(WeightedCrossEntropy):
    """Infinite once it is switched, with finite gradients."""

    bad = False

    def forward(self, outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(outputs, targets) + (float("inf") if self.bad else 0.0)


class BadReadout(nn.Linear):
    """Infinite outputs once it is switched."""

    bad = False

    def forward(self, state: Tensor) -> Tensor:
        return super().forward(state) + (float("inf") if self.bad else 0.0)


class Break(Callback):
    """Breaks loss, readout or the carried influence after the third batch."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx != 2:
            return
        assert isinstance(pl_module, SequenceModule)
        if self.what != "influence":
            getattr(pl_module, self.what).bad = True
            return
        assert pl_module._memory is not None
        saved = pl_module._memory.state_dict()
        for value in saved["sensitivity"].values():
            if isinstance(value, Tensor):
                value.fill_(float("nan"))
        pl_module._memory.load_state_dict(saved)


def fit(folder: Path, source: AnBnDataModule | None = None, callbacks: list[Callback] | None = None, **options) -> None:
    model = module(RTRL(window=12), **options)
    run = trainer(folder, max_steps=8, callbacks=callbacks)
    run.fit(model, datamodule=source or data(steps_per_batch=12))


@pytest.mark.parametrize("update_every", [1, 3])
def test_inputs(tmp_path: Path, update_every: int) -> None:
    """Also between two updates: the failure is reported at its batch."""
    step = 3 // update_every
    with pytest.raises(
        NumericalFailure, match=rf"^training stopped at step {step}: inputs holds 1 NaN .*; check the data"
    ):
        fit(tmp_path, BadInputs(n_max=4, batch_size=3, steps_per_batch=12), update_every=update_every)


def test_outputs(tmp_path: Path) -> None:
    with pytest.raises(NumericalFailure, match=r"^training stopped at step 3: outputs holds 0 NaN and 72 infinite"):
        fit(tmp_path, readout=BadReadout(5, 2), callbacks=[Break("readout")])


def test_loss(tmp_path: Path) -> None:
    with pytest.raises(NumericalFailure, match=r"^training stopped at step 3: loss holds 0 NaN and 1 infinite"):
        fit(tmp_path, loss=BadLoss(), callbacks=[Break("loss")])


def test_influence(tmp_path: Path) -> None:
    with pytest.raises(NumericalFailure, match=r"^training stopped at step 3: influence norm holds 1 NaN"):
        fit(tmp_path, callbacks=[Break("influence")])


def test_parameter(tmp_path: Path) -> None:
    with pytest.raises(
        NumericalFailure, match=r"^training stopped at step 1: parameter cell\.\S+ .*; try a smaller learning rate"
    ):
        fit(tmp_path, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e38), gradient_clip=1e5)


def test_last_good_checkpoint_is_kept_and_named(tmp_path: Path) -> None:
    """Even by a callback that saves on exceptions."""
    saver = ModelCheckpoint(tmp_path, "good", every_n_train_steps=2, save_on_exception=True, save_last=True)
    model, source = module(RTRL(window=12)), BadInputs(n_max=4, batch_size=3, steps_per_batch=12)
    run = trainer(tmp_path, max_steps=8, enable_checkpointing=True, callbacks=[saver])
    with pytest.raises(NumericalFailure, match=f"inputs holds 1 NaN.* last good checkpoint: {tmp_path}"):
        run.fit(model, datamodule=source)
    saved = list(tmp_path.glob("*.ckpt"))
    assert saved
    for path in saved:
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["global_step"] == 2
        assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def test_a_bad_carry_is_never_saved(tmp_path: Path) -> None:
    model = module(RTRL(window=12))
    run = trainer(tmp_path, max_steps=2)
    run.fit(model, datamodule=data(steps_per_batch=12))
    assert model._memory is not None
    model._memory.state[0, 0] = float("inf")
    with pytest.raises(NumericalFailure, match="state holds 0 NaN and 1 infinite"):
        run.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


class NaNIn(Callback):
    """NaN in the weights or the gradient of a parameter after the second batch."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        parameter = pl_module.get_parameter(self.name)
        if batch_idx == 1 and self.what == "weights":
            with torch.no_grad():
                parameter.fill_(float("nan"))
        elif batch_idx == 1:
            parameter.register_hook(lambda grad: grad * float("nan"))


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("cell.recurrent.weight", "weights", "state holds"),
        ("readout.weight", "weights", "outputs holds"),
        ("readout.weight", "gradient", r"gradient of readout\.weight holds 10 NaN"),
    ],
)
def test_nan_in_a_sequence_module(tmp_path: Path, name: str, what: str, message: str) -> None:
    with pytest.raises(NumericalFailure, match=f"^training stopped at step 2: {message}"):
        fit(tmp_path, callbacks=[NaNIn(name, what)])


@pytest.mark.parametrize(
    ("part", "what", "message"),
    [
        ("encoder", "weights", "context holds"),
        ("decoder", "weights", "state holds"),
        ("encoder", "gradient", "gradient of encoder"),
        ("decoder", "gradient", "gradient of decoder"),
    ],
)
def test_nan_in_a_reasoning_module(tmp_path: Path, part: str, what: str, message: str) -> None:
    """Its data are integers, which cannot be NaN."""
    model = reasoning_module()
    name = next(name for name, p in model.named_parameters() if name.startswith(part) and p.ndim == 2)
    with pytest.raises(NumericalFailure, match=f"^training stopped at step 2: {message}"):
        trainer(tmp_path, callbacks=[NaNIn(name, what)]).fit(model, datamodule=reasoning_data())
