"""What the pending steps of a tail give: a loss's gradient, or one window's linearization."""

from __future__ import annotations

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.chain import loss_sweep, state_sweep
from rtrl_moe_pl.linearization.tail import Tail
from rtrl_moe_pl.linearization.terms import tap_terms
from rtrl_moe_pl.linearization.window import Block, Term, WindowLinearization, separate


@torch.no_grad()
def pull_back(tail: Tail, cotangents: Tensor, shapes: dict[str, torch.Size]) -> tuple[Tensor, dict[Block, list[Term]]]:
    """A loss on the tail's last k steps, as its cotangent of the state the tail began with, and its own part.

    Args:
        cotangents: from the loss, [k + 1, B, S]: of the state that these began with, and of those returned.
        shapes: of the parameters wanted, by name.

    Returns:
        [B, S]; and terms of which only the gradients are of use.
    """
    swept = loss_sweep(tail, cotangents)
    return swept.start, tap_terms(tail.taps, swept.taps, shapes)


@torch.no_grad()
def multiply_out(tail: Tail, cotangents: Tensor, shapes: dict[str, torch.Size]) -> WindowLinearization:
    """A tail as one window; arguments as for ``pull_back``."""
    loss = loss_sweep(tail, cotangents)
    ends, sources = tail.slots_used()
    state = state_sweep(tail, loss.taps, ends=ends)
    terms = tap_terms(tail.taps, state.taps, shapes)
    return separate(WindowLinearization(state.start, loss.start, terms, shapes, ends, sources))
