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
