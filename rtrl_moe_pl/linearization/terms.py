"""From taps and their cotangents to the blocks and terms of M."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtrl_moe_pl.linearization.cotangents import Cotangents
from rtrl_moe_pl.linearization.derivatives import Jacobian, Key, jacobian_key, place
from rtrl_moe_pl.linearization.experts import ExpertTerm, Uses
from rtrl_moe_pl.linearization.taps import Tap
from rtrl_moe_pl.linearization.window import Block, IndexTerm, Member, OuterTerm, Term


@dataclass
class _Meeting:
    """A tap ready for its product over time: cotangents [k, B, rows, S], inputs [k, B, columns]."""

    tap: Tap
    key: Key  # equal for taps with the same cotangents
    cotangents: Cotangents
    inputs: Tensor | None
    uses: Uses | None = None


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
            terms[block].append(IndexTerm(meeting.cotangents, meeting.inputs, vocabulary))
        elif all(uses[name] == 1 for name in names):
            joint[meeting.key].append(meeting)
        else:
            for name in names:
                block, inputs = _single(meeting, name, shapes)
                terms[block].append(_product(meeting, inputs))
    for group in joint.values():
        block, inputs = _grouped(group, shapes)
        terms[block].append(_product(group[0], inputs))
    return dict(terms)


def _product(meeting: _Meeting, inputs: Tensor | None) -> Term:
    if meeting.uses is None:
        return OuterTerm(meeting.cotangents, inputs)
    return ExpertTerm(meeting.cotangents, inputs, meeting.uses)


def _meet(
    taps: Sequence[tuple[Tap, Jacobian]], known: Mapping[Key, Cotangents], shapes: Mapping[str, torch.Size]
) -> list[_Meeting]:
    meetings = []
    found: dict[Key, Uses] = {}  # banks that are met together share the work of sorting
    for tap, jacobian in taps:
        if tap.weight not in shapes and tap.bias not in shapes:
            continue
        key = jacobian_key(jacobian)
        cotangents, inputs = known[key], tap.input
        steps, batch, _ = cotangents.shape
        rows = tap.output.shape[-1]
        copies = tap.output[0].numel() // rows
        if copies > 1:  # the layer acted on several vectors a row: they count as more steps
            cotangents = cotangents.as_steps(copies)
            key = (*key, copies)
        if inputs is not None:
            inputs = inputs.detach().reshape(steps, batch, copies, *(() if tap.is_lookup else (-1,)))
            inputs = inputs.movedim(2, 0).flatten(0, 1)
        uses = None
        if tap.experts is not None:
            which = place(tap.experts)
            experts = tap.experts.reshape(steps, batch, copies).movedim(2, 0).flatten(0, 1)
            count = next(shapes[name][0] for name in (tap.weight, tap.bias) if name is not None and name in shapes)
            uses = found.setdefault((which, count), Uses(experts, count))
            key = (*key, "experts", which)
        meetings.append(_Meeting(tap, key, cotangents, inputs, uses))
    return meetings


def _single(meeting: _Meeting, name: str, shapes: Mapping[str, torch.Size]) -> tuple[Block, Tensor | None]:
    tap, shape = meeting.tap, shapes[name]
    experts = 1 if meeting.uses is None else meeting.uses.count
    if name != tap.weight:
        return Block(shape.numel() // experts, experts, (Member(name, 0, 1),), experts), None
    assert meeting.inputs is not None
    width = meeting.inputs.shape[-1]
    rows = shape.numel() // width // experts
    return Block(rows, experts * width, (Member(name, 0, width, tap.transposed),), experts), meeting.inputs


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
    experts = 1 if group[0].uses is None else group[0].uses.count
    block = Block(cotangents.shape[2], experts * columns, tuple(members), experts)
    if all(meeting.tap.weight not in shapes for meeting in group):
        if len(members) == 1:
            return block, None
    return block, torch.cat(inputs, -1)
