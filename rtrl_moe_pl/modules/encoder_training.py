"""How the encoder of a recursive model is trained: as the decoder, at a rate of its own, or by another optimizer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer

from rtrl_moe_pl.reasoning.encoders import Encoder, PuzzleEmbedding
from rtrl_moe_pl.reasoning.etrm import Mode
from rtrl_moe_pl.reasoning.trm import TRM
from rtrl_moe_pl.training import CombinedOptimizer


def require_trainable(
    encoder: Encoder, mode: Mode, encoder_lr: float | None, embedding_optimizer: OptimizerCallable | None
) -> None:
    """Raise ValueError for options of a `ReasoningModule` that do not suit its encoder, or each other."""
    if mode == "cached" and encoder.recurrent:
        raise ValueError(
            f"mode 'cached' encodes a puzzle once, but {type(encoder).__name__} goes on at every step: use "
            "mode 're_encode', or another encoder"
        )
    if embedding_optimizer is not None and not isinstance(encoder, PuzzleEmbedding):
        raise ValueError(
            f"embedding_optimizer is for a PuzzleEmbedding, but the encoder is {type(encoder).__name__}: leave it out"
        )
    if embedding_optimizer is not None and encoder_lr is not None:
        raise ValueError("encoder_lr has no effect beside embedding_optimizer: give that one its own lr")


def make_optimizer(
    optimizer: OptimizerCallable,
    decoder: TRM,
    encoder: Encoder,
    encoder_lr: float | None,
    embedding_optimizer: OptimizerCallable | None,
) -> Optimizer:
    """Of decoder and encoder; see the arguments of `ReasoningModule`."""
    table = encoder.table if isinstance(encoder, PuzzleEmbedding) else None
    apart = table is not None and embedding_optimizer is not None
    groups: list[dict[str, Any]] = [
        {"params": list(decoder.parameters())},
        {"params": [] if apart else list(encoder.parameters())},
    ]
    if encoder_lr is not None:
        groups[1]["lr"] = encoder_lr
    made = optimizer([group for group in groups if group["params"]])
    if not apart:
        return made
    assert embedding_optimizer is not None
    return CombinedOptimizer([made, embedding_optimizer([table])])
