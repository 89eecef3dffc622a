"""The reverse sweep over a tail of steps: S + 1 cotangents from its end to its start, and on to the taps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.cotangents import Cotangents, ProductCotangents, ScaledCotangents, StoredCotangents
from rtrl_moe_pl.linearization.derivatives import Jacobian, Key, jacobian_key
from rtrl_moe_pl.linearization.sparse import SparseJacobian
from rtrl_moe_pl.linearization.tail import Tail
from rtrl_moe_pl.linearization.window import copy_flushed

FLUSH_EVERY = 8  # steps; a contracting cell loses a few orders of magnitude in that time


@dataclass
class LossSweep:
    """What a loss hands back, one number per entry.

    Args:
        losses: cotangent of the state returned at each step, [K, B, S].
        start: of the state the tail began with, [B, S].
        initial: of the initial state used at the starts, summed over them, [B, S]; None if there was none.
        taps: of taps' outputs, by ``jacobian_key``.
    """

    losses: Tensor
    start: Tensor
    initial: Tensor | None
    taps: dict[Key, Cotangents]


@dataclass
class StateSweep:
    """The same for the S entries of the end state.

    Args:
        states: of the state returned at each step, [K, B, S, S]; None where no one needs them.
        start: of the state the tail began with, [B, S, S]: J transposed.
        initial: of the initial state used at the starts, [B, S, S]; None if there was none, or no one asked.
        taps: of taps' outputs, the loss's among them.
    """

    states: Tensor | None
    start: Tensor
    initial: Tensor | None
    taps: dict[Key, Cotangents]


def loss_sweep(tail: Tail, cotangents: Tensor) -> LossSweep:
    """Pull a loss on the last k steps back through all of them.

    Args:
        cotangents: of the state that those began with and of the states that they returned, [k + 1, B, S].

    Cost: K B S^2 multiply-adds, in K small steps.
    """
    backward = tail.backward
    assert backward is not None
    steps, before = len(tail), len(tail) + 1 - len(cotangents)
    # [t + 1] belongs to the state that step t returned, [0] to the tail's start
    every = torch.cat([cotangents.new_zeros(before, *cotangents.shape[1:]), cotangents])
    batch, size = cotangents.shape[1:]
    width = backward.width(size)
    on_the_way = every.new_empty(steps, batch, width) if width else None
    rows = every.unsqueeze(2).unbind(0)  # [B, 1, S]
    out = [None] * steps if on_the_way is None else on_the_way.unsqueeze(2).unbind(0)
    initial = None
    no_loss = not bool(cotangents.any())
    if no_loss:
        if on_the_way is not None:
            on_the_way.zero_()
        if any(here is not None for here in tail.starts):
            initial = cotangents.new_zeros(batch, size)
    for t in reversed(range(0 if no_loss else steps)):
        here = tail.starts[t]
        if here is None:
            backward.add_loss(t, rows[t + 1], rows[t], out[t])
        else:
            loss = torch.zeros_like(rows[t])
            backward.add_loss(t, rows[t + 1], loss, out[t])
            taken = torch.where(here[:, None], loss[:, 0], 0.0)
            initial = taken if initial is None else initial + taken
            rows[t].add_(loss.masked_fill_(here[:, None, None], 0.0))
        if t % FLUSH_EVERY == 0:
            copy_flushed(rows[t], rows[t], torch.finfo(every.dtype).tiny)
    taps: dict[Key, Cotangents] = {}
    if on_the_way is not None and tail.on_the_way is not None:
        taps[tail.on_the_way] = Cotangents(on_the_way)
    for _, jacobian in tail.taps:
        key = jacobian_key(jacobian)
        if key not in taps:
            assert on_the_way is not None or not backward.in_place
            taps[key] = loss_cotangents(jacobian, on_the_way if backward.in_place else every[1:])  # type: ignore[arg-type]
    return LossSweep(every[1:], every[0], initial, taps)


def state_sweep(
    tail: Tail,
    losses: Mapping[Key, Cotangents],
    keep_states: bool = False,
    keep_initial: bool = False,
    ends: Tensor | None = None,
) -> StateSweep:
    """Pull the identity on the end state back through all steps.

    Args:
        losses: the taps' cotangents from the loss, to be handed on with those of the states.
        keep_states: keep the cotangents of all states, not only of the first.
        keep_initial: sum up what the initial state receives.
        ends: begin with the entries of these slots alone, [B, U]: S below is then U d wherever it comes last.

    Cost: K B S^3 multiply-adds; K small steps in sequence, all else is batched over the tail.
    """
    backward, like = tail.backward, tail.like
    assert backward is not None
    assert like is not None
    steps, (batch, size) = len(tail), like.shape
    keys = {jacobian_key(jacobian): jacobian for _, jacobian in tail.taps}
    keep_states |= bool(keys.keys() - {tail.on_the_way}) and not backward.in_place
    kept = steps + 1 if keep_states else 1 if backward.in_place else 2  # a ring; kept whole, [0] is the tail's start
    identity = _identity(like, ends, backward.slot_size)
    ring = tail.workspace.empty("states", (kept, *identity.shape), like)
    states = ring.unbind(0)
    states[steps % kept].copy_(identity)
    width, entries = backward.width(size), identity.shape[2]
    room = tail.workspace.empty if backward.in_place else tail.workspace.steps
    on_the_way = room("on the way", (steps, batch, width, entries), like) if width else None
    out = [None] * steps if on_the_way is None else on_the_way.unbind(0)
    initial = None
    for t in reversed(range(steps)):
        earlier, here = states[t % kept], tail.starts[t]
        backward.states(t, states[(t + 1) % kept], earlier, out[t])
        if here is not None:
            if keep_initial:
                taken = torch.where(here[:, None, None], earlier, 0.0)
                initial = taken if initial is None else initial + taken
            earlier.masked_fill_(here[:, None, None], 0.0)
        if t % FLUSH_EVERY == 0 and not backward.in_place:
            copy_flushed(earlier, earlier)
    later = ring[1:] if keep_states else None
    taps: dict[Key, Cotangents] = {}
    for key, jacobian in keys.items():
        from_loss = losses[key].loss
        if key == tail.on_the_way and on_the_way is not None:
            taps[key] = StoredCotangents(on_the_way, from_loss)
            continue
        if backward.in_place:
            assert on_the_way is not None
            assert isinstance(jacobian, Tensor)
            taps[key] = ProductCotangents(on_the_way, from_loss, jacobian, tail.workspace)
            continue
        assert later is not None
        if isinstance(jacobian, SparseJacobian):
            taps[key] = ScaledCotangents(later, from_loss, jacobian, tail.workspace)
        else:
            values = tail.workspace.empty(f"tap {len(taps)}", (steps * batch, jacobian.shape[2], size), like)
            torch.bmm(jacobian.transpose(1, 2), later.flatten(0, 1), out=values)
            taps[key] = StoredCotangents(values.unflatten(0, (steps, batch)), from_loss)
    return StateSweep(later, states[0], initial, taps)


def _identity(like: Tensor, ends: Tensor | None, slot_size: int) -> Tensor:
    """One cotangent an entry of the end state, [B, S, S]; or of some of its slots ``ends`` [B, U], [B, S, U d]."""
    batch, size = like.shape
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    if ends is None:
        return eye.expand(batch, size, size)
    slots = size // slot_size
    return eye.view(slots, slot_size, size)[ends].permute(0, 3, 1, 2).flatten(2)


def loss_cotangents(jacobian: Jacobian, losses: Tensor) -> Cotangents:
    """Of a tap's output at every step, given those of the states [K, B, S]."""
    flat = losses.flatten(0, 1)
    if isinstance(jacobian, SparseJacobian):
        found = jacobian.times_left(flat)
    else:
        found = torch.bmm(flat[:, None], jacobian)[:, 0]
    return Cotangents(found.unflatten(0, losses.shape[:2]))
