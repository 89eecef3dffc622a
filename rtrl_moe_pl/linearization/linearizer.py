"""Linearize a window of any cell: the fast path where it is provably right, the slow one elsewhere."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rtrl_moe_pl.cells.routed import Routing
from rtrl_moe_pl.linearization.chain import loss_cotangents, loss_sweep, state_sweep
from rtrl_moe_pl.linearization.derivatives import PlanMismatch, StepDerivatives, jacobian_key
from rtrl_moe_pl.linearization.planner import make_plan, probing_rows, without_taps
from rtrl_moe_pl.linearization.routed import RoutedInputs
from rtrl_moe_pl.linearization.slow import functional_terms, initial_terms, whole_window
from rtrl_moe_pl.linearization.step import Plan, StepLinearizer, require_close
from rtrl_moe_pl.linearization.tail import Steps, Tail
from rtrl_moe_pl.linearization.terms import tap_terms
from rtrl_moe_pl.linearization.window import Block, Term, WindowLinearization, gradient_of, separate


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
        step: what is differentiated in its place.

    Raises:
        ValueError: if the cell contains batch normalisation, which couples lanes.
    """

    def __init__(self, cell: nn.Module, parameters: dict[str, nn.Parameter], step: nn.Module | None = None) -> None:
        refuse_batch_norm(cell)
        self.cell = cell
        self.trainable: dict[str, Tensor] = {n: p for n, p in parameters.items() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in self.trainable.items()}
        buffers = {f"buffer.{name}": b for name, b in cell.named_buffers()}
        known: dict[str, Tensor] = {**parameters, **buffers}
        self._step = StepLinearizer(cell if step is None else step, {id(p): n for n, p in known.items()}, known)
        self._plan: Plan | None = None
        self._identities = _identities(parameters)
        self._window_path = ""  # the reason, once the slowest path was chosen for good
        self._failures = 0
        self._succeeded = False
        self._initial_names: set[str] = set()
        self._alone = Tail(capacity=0)

    @property
    def paths(self) -> dict[str, str]:
        """Which path each trainable parameter takes: taps, functional, window, initial state or unused.

        Empty before the first window.
        """
        if self._window_path:
            return dict.fromkeys(self.trainable, "window")
        if self._plan is None:
            return {}
        tapped = {name for weight, bias, *_ in self._plan.signature for name in (weight, bias)}
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

    def needs_graph(self) -> bool:
        """Whether windows must be run with their graph, because they will be differentiated as they ran."""
        return bool(self._window_path)

    def linearize(
        self,
        inputs: Tensor,  # [k, B, ..]
        given: Tensor,  # [k, B, S]
        returned: Tensor,  # [k, B, S]
        cotangents: Tensor,  # [k + 1, B, S], from the loss, of the first state and of those returned
        initial: Tensor | None,  # [B, S] with its graph; None if no lane starts
        starts: Tensor | None,  # [B, k]
        starting: list[bool],
        routings: Sequence[Routing] = (),
    ) -> Steps | WindowLinearization | None:
        """Derivatives of a window that ran without a graph.

        Returns:
            steps to be added to a tail; or the whole linearization, where it needs the weights as they are now; or
            None if this cell needs the window's own graph: run it again with one, from the same start, and call
            ``linearize_graph``.
        """
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels' derivatives cannot be batched
                steps = self._differentiate(inputs, given, returned, starts, starting, routings)
                assert self._plan is not None
                result: Steps | WindowLinearization = steps
                if self._plan.untapped or (initial is not None and initial.requires_grad):
                    result = self._at_once(steps, inputs, given, returned, cotangents, initial)
        except torch.OutOfMemoryError:
            raise
        except Exception as reason:  # whatever a cell raises for rows that it did not expect: the slow path is exact
            self._failures += 1
            self.fall_back(str(reason) or type(reason).__name__, for_good=not self._succeeded or self._failures >= 3)
            return None
        self._succeeded = True
        return result

    def _differentiate(
        self,
        inputs: Tensor,
        given: Tensor,
        returned: Tensor,
        starts: Tensor | None,
        starting: list[bool],
        routings: Sequence[Routing],
    ) -> Steps:
        outputs, derivatives = self._derivatives(inputs.flatten(0, 1), given.flatten(0, 1))
        require_same_states(outputs.view(given.shape), returned)
        return Steps(derivatives, given, starts, starting)

    def _derivatives(self, x: Tensor | RoutedInputs, state: Tensor) -> tuple[Tensor, StepDerivatives]:
        """The new states and their derivatives by the plan, or by a new one where it does not hold."""
        if self._plan is None:
            self._plan = self._new_plan(x, state)
        try:
            return self._step.derivatives(self._plan, x, state)
        except PlanMismatch:
            self._plan = self._new_plan(x, state, self._plan)
            return self._step.derivatives(self._plan, x, state)

    def _at_once(
        self,
        steps: Steps,
        inputs: Tensor,
        given: Tensor,
        returned: Tensor,
        cotangents: Tensor,
        initial: Tensor | None,
    ) -> WindowLinearization:
        """Everything about a window whose parameters are met in forms that are not kept."""
        assert self._plan is not None
        untapped = {name: self.trainable[name] for name in sorted(self._plan.untapped)}
        self._alone.clear()
        self._alone.append(steps)
        with torch.no_grad():
            loss = loss_sweep(self._alone, cotangents)
            state = state_sweep(self._alone, loss.taps, keep_states=bool(untapped), keep_initial=True)
            terms: dict[Block, list[Term]] = defaultdict(list, tap_terms(self._alone.taps, state.taps, self.shapes))
        if state.states is not None and untapped:
            dense = functional_terms(self.cell, untapped, inputs, given, state.states, loss.losses, returned)
            for block, functional in dense.items():
                terms[block] += functional
        if state.initial is not None and loss.initial is not None and initial is not None:
            for block, learned in initial_terms(initial, self.trainable, state.initial, loss.initial).items():
                terms[block] += learned
                self._initial_names |= {member.name for member in block.members}
        return separate(WindowLinearization(state.start, loss.start, dict(terms), self.shapes))

    def _new_plan(self, x: Tensor | RoutedInputs, state: Tensor, previous: Plan | None = None) -> Plan:
        """A plan whose parameter gradients equal autograd's for a random cotangent of every row."""
        plan = make_plan(self._step, x, state, previous)
        rows, states = probing_rows(self._step, x, state)
        x, state = x[torch.cat([torch.arange(len(state), device=rows.device), rows])], torch.cat([state, states])
        try:
            self._step.derivatives(plan, x, state)
        except PlanMismatch:  # derivatives that vanish at the rows probed
            plan = make_plan(self._step, x, state, plan)
        wrong = self._wrong_taps(plan, x, state)
        if wrong:
            plan = without_taps(self._step, plan, wrong, x, state)
            if self._wrong_taps(plan, x, state):
                raise PlanMismatch(f"the gradient of {min(wrong)} through its taps is not autograd's")
        return plan

    def _wrong_taps(self, plan: Plan, x: Tensor | RoutedInputs, state: Tensor) -> set[str]:
        outputs, derivatives = self._step.derivatives(plan, x, state)
        probe = self._step.probe(outputs)[None]  # every row as a lane of one step
        with torch.no_grad():
            cotangents = {jacobian_key(j): loss_cotangents(j, probe) for _, j in derivatives.taps}
            terms = tap_terms(derivatives.taps, cotangents, self.shapes)
            found = gradient_of(terms, self.shapes, probe)
        free = {name: p for name, p in self.trainable.items() if name not in plan.untapped}
        if not free:
            return set()
        output = self._step.cell(x, state)
        truth: Sequence[Tensor | None] = [None] * len(free)
        if output.requires_grad:
            truth = torch.autograd.grad(output, list(free.values()), probe[0], allow_unused=True)
        scale = max((float(expected.abs().max()) for expected in truth if expected is not None), default=0.0)
        wrong = set()
        for (name, parameter), expected in zip(free.items(), truth, strict=True):
            zero = torch.zeros_like(parameter)
            try:
                require_close(found.get(name, zero), zero if expected is None else expected, scale)
            except PlanMismatch:
                wrong.add(name)
        return wrong

    @torch.enable_grad()
    def linearize_graph(self, start: Tensor, returned: list[Tensor], loss_cotangents: Tensor) -> WindowLinearization:
        """Derivatives of a window that ran with its graph from the leaf ``start``; cotangents [k + 1, B, S]."""
        transition, cotangent, dense = whole_window(start, returned, loss_cotangents[1:], self.trainable)
        cotangent += loss_cotangents[0]
        terms: dict[Block, list[Term]] = {block: list(found) for block, found in dense.items()}
        return WindowLinearization(transition, cotangent, terms, self.shapes)

    def fall_back(self, reason: str, for_good: bool = True) -> None:
        """Take the slowest path from now on, or for one window, and say why."""
        first_line = reason.splitlines()[0]
        if for_good:
            self._window_path = first_line
        which = "each window is" if for_good else "this window is"
        warnings.warn(
            f"{type(self.cell).__name__}: the steps of a window cannot be differentiated together ({first_line}); "
            f"{which} differentiated as it ran, which is exact but slow",
            stacklevel=2,
        )

    def require_same_cell(self, cell: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        """Raise ValueError if the cell or its parameters are not those that the influence was carried for."""
        if cell is not self.cell:
            raise ValueError("this memory was made for another cell: call init for this one")
        now = _identities(parameters)
        if now != self._identities:
            changed = sorted({name for name, *_ in now ^ self._identities})[0]
            raise ValueError(
                f"{changed} was replaced, frozen or unfrozen after this memory was made: its influence cannot be "
                "carried on; call init again after changing parameters"
            )


def _identities(parameters: dict[str, nn.Parameter]) -> frozenset[tuple[str, int, bool]]:
    return frozenset((name, id(p), p.requires_grad) for name, p in parameters.items())


def refuse_batch_norm(cell: nn.Module) -> None:
    """Raise ValueError if the cell holds a normalisation over the batch."""
    for name, module in cell.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"the cell's {name or type(module).__name__} is a {type(module).__name__}: it mixes the lanes of a "
                "batch, so that no lane has an influence matrix of its own; use LayerNorm or GroupNorm"
            )


def require_same_states(batched: Tensor, sequential: Tensor, why: str = "it is random, or mixes rows") -> None:
    """Raise PlanMismatch if the steps' batched evaluation is not what they were."""
    try:
        require_close(batched, sequential)
    except PlanMismatch:
        raise PlanMismatch(f"evaluated together they give other states: {why}") from None
