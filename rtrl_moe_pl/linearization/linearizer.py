"""Linearize a window of any cell: the fast path where it is provably right, the slow one elsewhere."""

from __future__ import annotations

import warnings
from collections import defaultdict

import torch
from torch import Tensor, nn

from rtrl_moe_pl.linearization.chain import sweep
from rtrl_moe_pl.linearization.planner import make_plan
from rtrl_moe_pl.linearization.slow import functional_terms, initial_terms, whole_window
from rtrl_moe_pl.linearization.step import Plan, PlanMismatch, StepLinearizer
from rtrl_moe_pl.linearization.terms import tap_terms
from rtrl_moe_pl.linearization.window import Block, Term, WindowLinearization, separate
from rtrl_moe_pl.linearization.workspace import Workspace


class Linearizer:
    """Holds a cell's plan and linearizes its windows.

    Three ways, chosen on the first window and guarded on every one:

    - *taps*: all steps of the window are evaluated as one batch of rows; parameters met as affine maps, look-ups,
      norms or element-wise are differentiated through the cotangents of those meetings.
    - *functional*: other parameters, by batched vector-Jacobian products over each lane's steps.
    - *window*: cells that are random, or whose steps cannot be evaluated together, by differentiating the window as
      it ran, lane by lane.

    Guards, every window: the batched evaluation must return the states of the sequential one, no parameter may be
    used outside what the plan describes, and a random cotangent for every row must agree with autograd.

    Args:
        cell: the module.
        parameters: its parameters by public name.

    Raises:
        ValueError: if the cell contains batch normalisation, which couples lanes.
    """

    def __init__(self, cell: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        refuse_batch_norm(cell)
        self.cell = cell
        self.trainable: dict[str, Tensor] = {n: p for n, p in parameters.items() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in self.trainable.items()}
        buffers = {f"buffer.{name}": b for name, b in cell.named_buffers()}
        known: dict[str, Tensor] = {**parameters, **buffers}
        self._step = StepLinearizer(cell, {id(p): n for n, p in known.items()}, known)
        self._workspace = Workspace()
        self._plan: Plan | None = None
        self._window_path = ""  # the reason, once the slowest path was chosen
        self._initial_names: set[str] = set()

    @property
    def paths(self) -> dict[str, str]:
        """Which path each trainable parameter takes: taps, functional, window, initial state or unused.

        Empty before the first window.
        """
        if self._window_path:
            return dict.fromkeys(self.trainable, "window")
        if self._plan is None:
            return {}
        tapped = {name for weight, bias, *_ in self._signature for name in (weight, bias)}
        result = {}
        for name in self.trainable:
            ways = [
                way
                for way, there in (
                    ("taps", name in tapped),
                    ("functional", name in self._plan.untapped),
                    ("initial state", name in self._initial_names),
                )
                if there
            ]
            result[name] = " + ".join(ways) or "unused"
        return result

    @property
    def is_sparse(self) -> bool | None:
        """Whether the cell's own derivatives are compressed by colouring; None before the first window."""
        return None if self._plan is None else self._plan.patterns is not None

    @property
    def _signature(self) -> tuple[tuple[str | None, ...], ...]:
        assert self._plan is not None
        return self._plan.signature  # type: ignore[return-value]

    def needs_graph(self) -> bool:
        """Whether windows must be run with their graph, because they will be differentiated as they ran."""
        return bool(self._window_path)

    def linearize(
        self,
        inputs: Tensor,  # [k, B, ..]
        given: Tensor,  # [k, B, S]
        returned: Tensor,  # [k, B, S]
        loss_cotangents: Tensor,  # [k, B, S]
        initial: Tensor | None,  # [B, S] with its graph; None if no lane starts
        starts: Tensor | None,  # [B, k]
        starting: list[bool],
    ) -> WindowLinearization | None:
        """Derivatives of a window that ran without a graph.

        Returns:
            None if this cell needs the window's own graph: run it again with one, from the same start, and call
            ``linearize_graph``.
        """
        steps, batch, size = given.shape
        x, s = inputs.flatten(0, 1), given.flatten(0, 1)
        try:
            if self._plan is None:
                self._plan = make_plan(self._step, x, s)
            try:
                outputs, derivatives = self._step.derivatives(self._plan, x, s)
            except PlanMismatch:
                self._plan = make_plan(self._step, x, s)
                outputs, derivatives = self._step.derivatives(self._plan, x, s)
            _require_same_states(outputs.view(steps, batch, size), returned)
        except (PlanMismatch, RuntimeError, ValueError, IndexError, NotImplementedError) as reason:
            self._fall_back(reason)
            return None

        with torch.no_grad():
            keep = bool(self._plan.untapped)
            swept = sweep(derivatives, loss_cotangents, starts, starting, keep, self._workspace)
            terms: dict[Block, list[Term]] = defaultdict(list)
            for block, found in tap_terms(derivatives.taps, swept.taps, self.trainable).items():
                terms[block] += found
        if swept.states is not None and self._plan.untapped:
            untapped = {name: self.trainable[name] for name in sorted(self._plan.untapped)}
            for block, dense in functional_terms(
                self.cell, untapped, inputs, given, swept.states, swept.losses
            ).items():
                terms[block] += dense
        if swept.initial is not None and swept.initial_loss is not None and initial is not None:
            at_starts = swept.initial, swept.initial_loss
            for block, dense in initial_terms(initial, self.trainable, *at_starts).items():
                terms[block] += dense
                self._initial_names |= {member.name for member in block.members}
        return separate(WindowLinearization(swept.transition, swept.cotangent, dict(terms), self.shapes))

    @torch.enable_grad()
    def linearize_graph(self, start: Tensor, returned: list[Tensor], loss_cotangents: Tensor) -> WindowLinearization:
        """Derivatives of a window that ran with its graph from the leaf ``start`` [B, S]."""
        transition, cotangent, dense = whole_window(start, returned, loss_cotangents, self.trainable)
        terms: dict[Block, list[Term]] = {block: list(found) for block, found in dense.items()}
        return WindowLinearization(transition, cotangent, terms, self.shapes)

    def _fall_back(self, reason: Exception) -> None:
        first_line = (str(reason).splitlines() or [type(reason).__name__])[0]
        self._window_path = first_line
        warnings.warn(
            f"{type(self.cell).__name__}: the steps of a window cannot be differentiated together ({first_line}); "
            "each window is differentiated as it ran, which is exact but slow",
            stacklevel=2,
        )


def refuse_batch_norm(cell: nn.Module) -> None:
    """Raise ValueError if the cell holds a normalisation over the batch."""
    for name, module in cell.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"the cell's {name or type(module).__name__} is a {type(module).__name__}: it mixes the lanes of a "
                "batch, so that no lane has an influence matrix of its own; use LayerNorm or GroupNorm"
            )


def _require_same_states(batched: Tensor, sequential: Tensor) -> None:
    tolerance = 1e-10 if sequential.dtype == torch.float64 else 1e-4
    wrong = (batched - sequential).abs().max() > tolerance * (1 + sequential.abs().max())
    if bool(wrong):  # false for NaN, which is reported where states are used
        raise PlanMismatch("evaluated together they give other states: the cell is random, or mixes rows")
