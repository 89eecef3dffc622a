"""A probe compares the gradient with BPTT at the present weights, and leaves training alone."""

from __future__ import annotations

import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rtrl_moe_pl.cells import GRU
from rtrl_moe_pl.gradients import BPTT, RTRL, TBPTT
from rtrl_moe_pl.modules import ProbeWatch, SequenceModule, TrainingWarning
from tests.modules.helpers import Figures, data, module, trainer
from tests.modules.reasoning_helpers import module as reasoning_module
from tests.training.small_run import equal


class Shortened(RTRL):
    """Claims to be exact, and leaves out all influence."""

    def step(self, cell: Any, readout: Any, inputs: Any, targets: Any, loss_fn: Any, memory: Any, *rest: Any) -> Any:
        memory.scale_influence_(0.0)
        return super().step(cell, readout, inputs, targets, loss_fn, memory, *rest)


def probed(folder: Path, gradient: Any, **options: Any) -> tuple[list[float], list[str]]:
    """The cosines, and the warnings."""
    seen, watch = Figures(), ProbeWatch(every=4, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(folder, callbacks=[watch, seen], log_every_n_steps=2, max_steps=12)
        run.fit(module(gradient), data(batch_size=8, batches_per_epoch=30))
    cosines = [logged["train/probe_cosine"] for logged in seen.logged if "train/probe_cosine" in logged]
    return list(dict.fromkeys(cosines)), [str(one.message) for one in caught if one.category is TrainingWarning]


def test_an_exact_gradient_is_that_of_backpropagation(tmp_path: Path) -> None:
    cosines, said = probed(tmp_path, RTRL(window=3))
    assert len(cosines) >= 1
    assert all(cosine == pytest.approx(1.0, abs=1e-9) for cosine in cosines)
    assert said == []


def test_a_fault_in_an_exact_algorithm_is_warned_of(tmp_path: Path) -> None:
    cosines, [text] = probed(tmp_path, Shortened(window=3))
    assert max(cosines) < 0.999
    assert "though it claims to be exact: a fault; run audit" in text


def test_an_approximation_is_warned_of_below_its_threshold(tmp_path: Path) -> None:
    cosines, said = probed(tmp_path, TBPTT(window=1), threshold=0.9999)
    assert len(cosines) == 3  # after batches 4, 8 and 12
    assert max(cosines) < 0.9999
    assert len(said) == 1
    assert "to BPTT is" in said[0]
    assert "try a longer window, or RTRL" in said[0]
    assert probed(tmp_path, TBPTT(window=1), threshold=-1.0)[1] == []


@pytest.mark.parametrize("gradient", [RTRL(window=3), TBPTT(window=2)])
def test_training_goes_on_bit_for_bit(tmp_path: Path, gradient: Any) -> None:
    """Weights, carry, position of the data, modes and random numbers."""
    ends = []
    for watches in ([ProbeWatch(every=1, threshold=-1.0)], []):
        model, source = module(gradient), data()
        model.cell.train()
        torch.manual_seed(5)
        random.seed(5)
        run = trainer(tmp_path, callbacks=watches, max_steps=12)
        run.fit(model, source)
        assert model._memory is not None
        drawn = torch.rand(3), random.random(), source.state_dict()["train"], model.cell.training
        ends.append(([p.detach() for p in model.parameters()], model._memory.state_dict(), drawn))
    (one, carry, drawn), (other, carry_2, drawn_2) = ends
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert equal(carry, carry_2)
    assert torch.equal(drawn[0], drawn_2[0])
    assert drawn[1:] == drawn_2[1:]


def test_a_probe_without_labels_is_passed_over(tmp_path: Path) -> None:
    source = type(data())(n_min=60, n_max=64, batch_size=3, steps_per_batch=4, batches_per_epoch=6)
    seen = Figures()
    trainer(tmp_path, callbacks=[ProbeWatch(every=1), seen], max_epochs=1, max_steps=-1).fit(module(), source)
    assert not any("train/probe_cosine" in logged for logged in seen.logged)
    assert not any(math.isnan(value) for logged in seen.logged for value in logged.values())


def test_what_cannot_be_probed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"steps must be more than the window of RTRL\(window=4\), got 3"):
        trainer(tmp_path, callbacks=[ProbeWatch(steps=3)]).fit(module(), data())
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ProbeWatch(every=0)
    with pytest.raises(TypeError, match="ProbeWatch needs a SequenceModule, got ReasoningModule"):
        trainer(tmp_path, callbacks=[ProbeWatch()]).fit(reasoning_module())
    whole = SequenceModule(GRU(3, 5), 2, BPTT())
    seen = Figures()
    source = data(layout="sequences")
    trainer(tmp_path, callbacks=[ProbeWatch(every=2), seen], max_steps=3).fit(whole, source)
    assert seen.logged[-1]["train/probe_cosine"] == pytest.approx(1.0)
