"""From taps and their cotangents to the blocks and terms of M."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.backward import Key, jacobian_key
from rtrl_moe_pl.linearization.cotangents import Cotangents, StoredCotangents
from rtrl_moe_pl.linearization.step import Jacobian
from rtrl_moe_pl.linearization.taps import Tap
from rtrl_moe_pl.linearization.window import Block, IndexTerm, Member, OuterTerm, Term


@dataclass
class _Meeting:
    """A tap ready for its product over time: cotangents [k, B, rows, S], inputs [k, B, columns]."""

    tap: Tap
    key: Key  # equal for taps with the same cotangents
    cotangents: Cotangents
    inputs: Tensor | None


def tap_terms(
    taps: Sequence[tuple[Tap, Jacobian]],
    cotangents: Mapping[Key, Cotangents],
    shapes: Mapping[str, torch.Size],
) -> dict[Block, list[Term]]:
    """Blocks and terms of all taps with a trainable parameter."""
    meetings = _meet(taps, cotangents, shapes)
    uses = Counter(name for m in meetings for name in (m.tap.weight, m.tap.bias) if name in shapes)
    terms: dict[Block, list[Term]] = defaultdict(list)

    joint: dict[Key, list[_Meeting]] = defaultdict(list)
    for meeting in meetings:
        tap = meeting.tap
        names = [n for n in (tap.weight, tap.bias) if n is not None and n in shapes]
        if tap.is_lookup:
            assert tap.weight is not None
            assert meeting.inputs is not None
            vocabulary, width = shapes[tap.weight]
            block = Block(width, vocabulary, (Member(tap.weight, 0, vocabulary, transposed=True),))
            terms[block].append(IndexTerm(meeting.cotangents, meeting.inputs))
        elif all(uses[name] == 1 for name in names):
            joint[meeting.key].append(meeting)
        else:
            for name in names:
                block, inputs = _single(meeting, name, shapes)
                terms[block].append(OuterTerm(meeting.cotangents, inputs))
    for group in joint.values():
        block, inputs = _grouped(group, shapes)
        terms[block].append(OuterTerm(group[0].cotangents, inputs))
    return dict(terms)


def _meet(
    taps: Sequence[tuple[Tap, Jacobian]], known: Mapping[Key, Cotangents], shapes: Mapping[str, torch.Size]
) -> list[_Meeting]:
    meetings = []
    for tap, jacobian in taps:
        if tap.weight not in shapes and tap.bias not in shapes:
            continue
        key = jacobian_key(jacobian)
        cotangents, inputs = known[key], tap.input
        steps, batch, _ = cotangents.shape
        rows = tap.output.shape[-1]
        copies = tap.output[0].numel() // rows
        if copies > 1:  # the layer acted on several vectors a row: they count as more steps
            values = cotangents.part(0, batch, 0, copies * rows).clone()
            cotangents = StoredCotangents(*(_as_steps(v, copies) for v in (values, cotangents.loss)))
            key = (*key, copies)
        if inputs is not None:
            inputs = inputs.detach().reshape(steps, batch, copies, *(() if tap.is_lookup else (-1,)))
            inputs = inputs.transpose(1, 2).flatten(0, 1)
        meetings.append(_Meeting(tap, key, cotangents, inputs))
    return meetings


def _as_steps(value: Tensor, copies: int) -> Tensor:
    """[k, B, copies rows, ..] as [k copies, B, rows, ..]."""
    return value.unflatten(2, (copies, value.shape[2] // copies)).transpose(1, 2).flatten(0, 1)


def _single(meeting: _Meeting, name: str, shapes: Mapping[str, torch.Size]) -> tuple[Block, Tensor | None]:
    tap, shape = meeting.tap, shapes[name]
    if name != tap.weight:
        return Block.alone(name, shape), None
    assert meeting.inputs is not None
    width = meeting.inputs.shape[-1]
    return Block(shape.numel() // width, width, (Member(name, 0, width, tap.transposed),)), meeting.inputs


def _grouped(group: list[_Meeting], shapes: Mapping[str, torch.Size]) -> tuple[Block, Tensor | None]:
    """One block for all parameters that meet the same cotangents, their inputs side by side."""
    members: list[Member] = []
    inputs: list[Tensor] = []
    columns = 0
    cotangents = group[0].cotangents
    for meeting in group:
        tap = meeting.tap
        if tap.weight in shapes:
            assert tap.weight is not None
            assert meeting.inputs is not None
            width = meeting.inputs.shape[-1]
            members.append(Member(tap.weight, columns, width, tap.transposed))
            inputs.append(meeting.inputs)
            columns += width
    for meeting in group:
        if meeting.tap.bias in shapes:
            assert meeting.tap.bias is not None
            members.append(Member(meeting.tap.bias, columns, 1))
            inputs.append(cotangents.loss.new_ones(1, 1, 1).expand(*cotangents.shape[:2], 1))
            columns += 1
    block = Block(cotangents.shape[2], columns, tuple(members))
    if all(meeting.tap.weight not in shapes for meeting in group):
        if len(members) == 1:
            return block, None
    return block, torch.cat(inputs, -1)
