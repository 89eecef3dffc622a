"""Runs that begin with weights of another, and train parts of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rtrl_moe_pl.modules import ReasoningModule
from rtrl_moe_pl.reasoning import Carry, PairTokenEncoder, PuzzleEmbedding
from rtrl_moe_pl.reasoning.encoders import VariationalEncoder
from rtrl_moe_pl.training import Freeze, SignSGD
from tests.modules.helpers import trainer
from tests.modules.reasoning_helpers import data, module, run


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_a_pretrained_decoder_is_taken_and_an_encoder_of_the_same_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = module()
    made, _ = run(tmp_path, source)
    made.save_checkpoint(tmp_path / "a.ckpt")
    for encoder, taken in ((PairTokenEncoder, True), (VariationalEncoder, False)):
        model = module(encoder, seed=5, pretrained=str(tmp_path / "a.ckpt"))
        before = {name: p.detach().clone() for name, p in model.encoder.named_parameters()}
        caplog.clear()
        with caplog.at_level("INFO"):
            run(tmp_path, model, 0)
        said = f"model.pretrained: begins with the decoder{' and the encoder' * taken} of {tmp_path / 'a.ckpt'}"
        assert said in caplog.messages
        assert all(
            torch.equal(p, q) for p, q in zip(model.decoder.parameters(), source.decoder.parameters(), strict=True)
        )
        mine = dict(model.encoder.named_parameters())
        reference = dict(source.encoder.named_parameters()) if taken else before
        assert all(torch.equal(p, reference[name]) for name, p in mine.items())
        assert not torch.equal(
            next(iter(module(encoder, seed=5).decoder.parameters())), next(model.decoder.parameters())
        )


def test_a_table_of_another_size_begins_with_the_mean_of_its_rows(tmp_path: Path) -> None:
    source = module(PuzzleEmbedding)
    made, _ = run(tmp_path, source)
    made.save_checkpoint(tmp_path / "a.ckpt")
    fewer = data(train_rules=3)
    torch.manual_seed(3)
    model = ReasoningModule(
        fewer.shape, lambda _: module().decoder, PuzzleEmbedding, pretrained=str(tmp_path / "a.ckpt")
    )
    run(tmp_path, model, 0, datamodule=fewer)
    assert isinstance(source.encoder, PuzzleEmbedding)
    assert isinstance(model.encoder, PuzzleEmbedding)
    assert source.encoder.table.any()
    assert torch.equal(model.encoder.table, source.encoder.table.mean(0).expand(5, -1))


def test_a_table_of_the_same_size_is_kept(tmp_path: Path) -> None:
    source = module(PuzzleEmbedding)
    made, _ = run(tmp_path, source)
    made.save_checkpoint(tmp_path / "a.ckpt")
    model = module(PuzzleEmbedding, seed=5, pretrained=str(tmp_path / "a.ckpt"))
    run(tmp_path, model, 0)
    assert same(model.encoder, source.encoder)
    assert len(next(source.encoder.parameters()).unique(dim=0)) > 1


def test_a_pretrained_decoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    made, _ = run(tmp_path, module())
    made.save_checkpoint(tmp_path / "a.ckpt")
    other = module(pretrained=str(tmp_path / "a.ckpt"))
    other.decoder.l_cycles = 4
    with pytest.raises(
        ValueError, match=r"^model\.pretrained is of another architecture .*: decoder\.l_cycles is 1 there and 4 here"
    ):
        run(tmp_path, other)
    with pytest.raises(FileNotFoundError, match=r"^model\.pretrained: there is no file missing\.ckpt"):
        run(tmp_path, module(pretrained="missing.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"^model\.pretrained: .*other\.ckpt is not a checkpoint of a ReasoningModule"):
        run(tmp_path, module(pretrained=str(tmp_path / "other.ckpt")))


def test_rates_that_would_have_no_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^embedding_optimizer is for a PuzzleEmbedding, but the encoder is Pair"):
        module(embedding_optimizer=SignSGD)
    with pytest.raises(ValueError, match=r"^encoder_lr has no effect beside embedding_optimizer"):
        module(PuzzleEmbedding, embedding_optimizer=SignSGD, encoder_lr=0.1)


def test_only_the_embeddings_of_puzzles_seen_move_by_their_own_optimizer(tmp_path: Path) -> None:
    """Fine-tuning of embeddings alone: the decoder is frozen."""
    model = module(PuzzleEmbedding, embedding_optimizer=lambda p: SignSGD(p, lr=0.25, weight_decay=0))
    before = [p.detach().clone() for p in model.decoder.parameters()]
    made = trainer(tmp_path, max_steps=1, callbacks=[Freeze("decoder")])
    made.fit(model, datamodule=data(train_rules=4, held_out_rules=2))
    assert all(torch.equal(p, q) for p, q in zip(before, model.decoder.parameters(), strict=True))
    assert isinstance(model._carry, Carry)
    assert isinstance(model.encoder, PuzzleEmbedding)
    seen = model._carry.puzzles.identity.unique()
    moved = model.encoder.table.detach().abs() == 0.25
    assert moved[seen].any(1).all()
    assert int(moved.any(1).sum()) == len(seen) < 6
    assert len(made.optimizers[0].param_groups) == 2


def test_a_run_that_goes_on_does_not_need_the_file(tmp_path: Path) -> None:
    made, _ = run(tmp_path, module())
    made.save_checkpoint(tmp_path / "a.ckpt")
    made, _ = run(tmp_path, module(pretrained=str(tmp_path / "a.ckpt")), 2)
    made.save_checkpoint(tmp_path / "b.ckpt")
    (tmp_path / "a.ckpt").unlink()
    model = module(pretrained=str(tmp_path / "a.ckpt"))
    made, _ = run(tmp_path, model, 4, ckpt_path=str(tmp_path / "b.ckpt"))
    assert made.global_step == 4
    with pytest.raises(FileNotFoundError, match=r"model\.pretrained: there is no file"):
        run(tmp_path, module(pretrained=str(tmp_path / "a.ckpt")), 4)
