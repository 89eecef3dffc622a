"""Parts that are not trained for a while."""

from pathlib import Path

import pytest
import torch

from rtrl_moe_pl.training import Freeze
from tests.modules.helpers import trainer
from tests.modules.reasoning_helpers import data, module


def weights(folder: Path, steps: int, *frozen: Freeze) -> dict[str, torch.Tensor]:
    model = module()
    trainer(folder, max_steps=steps, callbacks=list(frozen)).fit(model, datamodule=data())
    assert all(p.requires_grad for p in model.parameters())
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_frozen_part_does_not_move(tmp_path: Path) -> None:
    begin, free = weights(tmp_path, 0), weights(tmp_path, 4)
    held = weights(tmp_path, 4, Freeze("encoder"))
    assert any(name.startswith("encoder") for name in begin)
    for name, weight in begin.items():
        assert torch.equal(weight, held[name]) == name.startswith("encoder"), name
        assert not torch.equal(weight, free[name]), name


def test_a_part_is_frozen_for_as_many_steps(tmp_path: Path) -> None:
    begin = weights(tmp_path, 0)
    for steps, moved in ((3, False), (4, True)):
        end = weights(tmp_path, steps, Freeze("encoder", steps=3))
        assert torch.equal(begin["encoder.queries"], end["encoder.queries"]) != moved


def test_a_part_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Freeze: no parameter's name begins with part='cell'; .*'decoder', 'enc"):
        weights(tmp_path, 1, Freeze("cell"))
    with pytest.raises(ValueError, match=r"^steps must be at least 0, got -1$"):
        Freeze("encoder", steps=-1)


def test_what_one_freeze_holds_another_does_not_release(tmp_path: Path) -> None:
    begin = weights(tmp_path, 0)
    for order in (1, -1):
        schedule = [Freeze("decoder"), Freeze("decoder.halt_head", steps=2)][::order]
        end = weights(tmp_path, 4, *schedule)
        assert torch.equal(begin["decoder.halt_head.weight"], end["decoder.halt_head.weight"])
        schedule = [Freeze("decoder", steps=2), Freeze("decoder.halt_head")][::order]
        end = weights(tmp_path, 4, *schedule)
        assert torch.equal(begin["decoder.halt_head.weight"], end["decoder.halt_head.weight"])
        assert not torch.equal(begin["decoder.answer_head.weight"], end["decoder.answer_head.weight"])


def test_what_was_frozen_before_stays_so(tmp_path: Path) -> None:
    model = module()
    model.decoder.halt_head.requires_grad_(False)
    trainer(tmp_path, max_steps=2, callbacks=[Freeze("decoder", steps=1)]).fit(model, datamodule=data())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"decoder.halt_head.weight", "decoder.halt_head.bias"}


def test_a_run_in_which_nothing_is_trained_is_refused_and_releases_all(tmp_path: Path) -> None:
    model = module()
    run = trainer(tmp_path, max_steps=2, callbacks=[Freeze("decoder"), Freeze("encoder")])
    with pytest.raises(ValueError, match=r"^Freeze: with part='encoder' every parameter is frozen: leave one to train"):
        run.fit(model, datamodule=data())
    assert all(parameter.requires_grad for parameter in model.parameters())
