"""Real-time recurrent learning over windows."""

from __future__ import annotations

from bisect import bisect_right
from typing import Literal

import torch
from torch import Tensor, nn

from rtrl_moe_pl.gradients.base import (
    GradientAlgorithm,
    WindowResult,
    autograd_gradients,
    checked_window,
    named_parameters,
    with_fresh_start,
)
from rtrl_moe_pl.gradients.memory import (
    Forecast,
    Memory,
    MemoryForecastError,
    forecast_influence,
    free_memory,
    readable,
    recurrent_parameters,
)
from rtrl_moe_pl.gradients.run_window import RunWindow
from rtrl_moe_pl.gradients.side_effects import SideEffects
from rtrl_moe_pl.gradients.windows import (
    LossFunction,
    Targets,
    auxiliary_loss,
    evaluate_loss,
    read_out,
    routings_of,
    starting_steps,
)
from rtrl_moe_pl.linearization import (
    Linearizer,
    Steps,
    Tail,
    WindowLinearization,
    multiply_out,
    pull_back,
    refuse_batch_norm,
)
from rtrl_moe_pl.sensitivities import DenseSensitivity, Sensitivity


def cheapest_chunk(state_size: int, window: int, is_sparse: bool | None = True) -> int:
    """Steps between two advances of P: many make them rare, but each window's loss goes back through all since.

    Bounded so that a chunk's cotangents and Jacobians take no more than a few times the room of P; below that, S / 2
    windows, where both costs are about the same (measured at S = 64 and 128).

    Args:
        is_sparse: whether the cell's derivatives are compressed; dense ones take more room a step. None: not known.
    """
    longest = max(3 * state_size, 64) if is_sparse else max(state_size // 4, 8)
    return min(longest, window * max(1, state_size // 2))


class RTRL(GradientAlgorithm):
    """Real-time recurrent learning in windows: reverse mode over the latest steps, forward mode before them.

    Args:
        window: steps k, after which the loss's gradient is due. Any length gives the same gradient.
        chunk: steps after which the influence matrix is advanced; until then a window's loss is also pulled back
            through the windows since the last advance, as they were differentiated. Any length gives the same
            gradient; a longer window is cut, at no loss. None: about the cheapest (``cheapest_chunk``).
        influence_dtype: "bfloat16" keeps P in half the bytes: computed in the state's type, rounded to 8 bits when an
            advance writes it. None: in the state's type.

    Cost: with c = chunk, a step and lane, S |theta| (1 + S / c) + S^3 multiply-adds beside the forward pass, and a
        window (S^2 + |theta|) c / 2 and a pass over P; memory B S |theta| for the influence and about 2 B c S^2 for a
        chunk, whatever the length of the sequence.
    Exact: equals BPTT over the whole sequence while parameters are fixed, for any cell. With an update after every
        window it is the gradient for an offset shared by all past parameters, their increments frozen. With
        ``influence_dtype`` approximate: what comes through P has a relative error of about 2^-9 an advance.
    Not recommended: for sequences that fit in memory (BPTT is cheaper), or large dense states (S above about 256).
    References: Williams & Zipser 1989, Neural Computation 1(2):270-280; Schmidhuber 1992, Neural Computation
        4(2):243-248.
    """

    exact = True
    carries_influence = True

    def __init__(
        self, window: int, chunk: int | None = None, influence_dtype: Literal["bfloat16"] | None = None
    ) -> None:
        super().__init__(checked_window(window))
        self.chunk = None if chunk is None else checked_window(chunk, "chunk")
        if influence_dtype not in (None, "bfloat16"):
            raise ValueError(
                f"influence_dtype must be 'bfloat16', or None for the state's own type, got {influence_dtype!r}"
            )
        self.influence_dtype = influence_dtype
        if influence_dtype is not None:  # a subclass may be approximate for reasons of its own
            self.exact = False

    @property
    def storage(self) -> torch.dtype | None:
        """Type that P is kept in; None: the state's."""
        return None if self.influence_dtype is None else getattr(torch, self.influence_dtype)

    def __repr__(self) -> str:
        given = {"window": self.window, "chunk": self.chunk, "influence_dtype": self.influence_dtype}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in given.items() if v is not None)})"

    def chunk_for(self, cell: nn.Module, is_sparse: bool | None = True, batch_size: int = 1) -> int:
        """Steps between two advances of P for this cell and batch; see ``cheapest_chunk``."""
        assert self.window is not None
        return self.chunk or cheapest_chunk(int(cell.state_size), self.window, is_sparse)  # type: ignore[arg-type]

    def _init(self, cell: nn.Module, state: Tensor) -> Memory:
        refuse_batch_norm(cell)
        parameters = recurrent_parameters(cell)
        shapes = {name: p.shape for name, p in parameters.items() if p.requires_grad}
        self.require_room(cell, state.shape[0], state.dtype, state.device)
        sensitivity = self._sensitivity(cell, shapes, state)
        return Memory(state, sensitivity, linearizer=self._linearizer(cell, parameters))

    def _linearizer(self, cell: nn.Module, parameters: dict[str, nn.Parameter]) -> Linearizer:
        return Linearizer(cell, parameters)

    def _sensitivity(self, cell: nn.Module, shapes: dict[str, torch.Size], state: Tensor) -> Sensitivity:
        return DenseSensitivity(shapes, *state.shape, state.dtype, state.device, storage=self.storage)

    def require_room(self, cell: nn.Module, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        def forecast(lanes: int) -> Forecast:
            return self.forecast(cell, lanes, dtype, self.chunk_for(cell, batch_size=lanes))

        chunk, needed, free = self.chunk_for(cell, batch_size=batch), forecast(batch), free_memory(device)
        if needed.total_bytes > free:
            count = sum(p.numel() for p in cell.parameters() if p.requires_grad)
            lanes = bisect_right(range(1, batch), free, key=lambda n: forecast(n).total_bytes)
            fix = f"lower batch_size to {lanes}" if lanes > 0 else "make the cell smaller"
            steps = int((free - needed.influence_bytes) * chunk / needed.workspace_bytes)
            fix = f"set chunk to {steps}, {fix}" if steps > 0 else fix
            raise MemoryForecastError(
                f"{self} needs {readable(needed.influence_bytes)} for the influence matrix (B={batch}, "
                f"S={cell.state_size}, {count} parameters) and about {readable(needed.workspace_bytes)} for a chunk, "
                f"but {readable(free)} are free: {fix}, or use TBPTT"
            )

    def forecast(
        self, cell: nn.Module, batch_size: int, dtype: torch.dtype, steps: int, delivered: int | None = None
    ) -> Forecast:
        """Of ``steps`` steps, of which ``delivered`` come together (None: all): those added to others are copied."""
        assert self.window is not None
        steps, kept = min(self.chunk_for(cell, batch_size=batch_size), steps), (self.storage or dtype).itemsize
        new = min(steps, delivered or steps, self.window)
        return forecast_influence(cell, batch_size, dtype.itemsize, steps, kept, new if 2 * new <= steps else 0)

    @torch.no_grad()
    def step(
        self,
        cell: nn.Module,
        readout: nn.Module,
        inputs: Tensor,
        targets: Targets,
        loss_fn: LossFunction,
        memory: Memory,
        starts: Tensor | None = None,
        auxiliary_weight: float | Tensor = 1.0,
    ) -> WindowResult:
        starts = with_fresh_start(self, cell, memory, inputs, targets, starts)
        starting = starting_steps(starts, inputs.shape[1])
        parameters = recurrent_parameters(cell)
        linearizer = memory.linearizer
        if linearizer is None:
            linearizer = memory.linearizer = self._linearizer(cell, parameters)
        linearizer.require_same_cell(cell, parameters)
        initial: Tensor | None = None
        if any(starting):
            with torch.enable_grad():
                initial = cell.initial_state(memory.batch_size)  # type: ignore[operator]
        window = RunWindow(
            cell, inputs, memory.state.clone(), initial, starts, starting, routings_of(cell), self.unroll
        )

        given, returned = [], []
        if not linearizer.needs_graph():
            effects = SideEffects(cell, inputs.device)
            given, returned = window.unroll()
            if effects.undo():
                linearizer.fall_back("it draws random numbers or changes its buffers")
        if not linearizer.needs_graph():
            outputs, loss, grads, cotangents = _read(
                cell, readout, memory.state, torch.stack(returned), window, targets, loss_fn, auxiliary_weight
            )
            begin = 0
            while begin < len(given):
                first = linearizer.is_sparse is None
                length = self.chunk_for(cell, linearizer.is_sparse, memory.batch_size)
                segment = window.cut(begin, begin + length, given[begin])
                part = cotangents[begin : begin + length + 1]
                if begin:
                    part = torch.cat([torch.zeros_like(part[:1]), part[1:]])  # counted with the last segment
                states = torch.stack(given[begin : begin + length]), torch.stack(returned[begin : begin + length])
                found = segment.linearize(linearizer, *states, part)
                if found is None and begin == 0:
                    effects.undo()  # of the readout, which draws once more
                    break  # nothing has been written yet: run the whole window again, with its graph
                if found is None:
                    found = segment.linearize_again(linearizer, states[1], part)
                capacity = self.chunk_for(cell, linearizer.is_sparse, memory.batch_size)
                if first and capacity > length:
                    continue  # in parts as long as in later windows: a resumed run rounds as an unbroken one
                memory.half_written = True
                if isinstance(found, Steps):
                    _extend_tail(memory, found, part, capacity, grads)
                else:
                    _contract_and_advance(memory, found, grads)
                del found  # as large as what the next part needs
                begin += length
            else:
                return _finish(memory, loss, outputs, grads, returned[-1], window)

        leaf, returned = window.unroll_with_graph()
        states = torch.stack([state.detach() for state in returned])
        outputs, loss, grads, cotangents = _read(
            cell, readout, memory.state, states, window, targets, loss_fn, auxiliary_weight
        )
        linearization = linearizer.linearize_graph(leaf, returned, cotangents)
        memory.half_written = True
        _contract_and_advance(memory, linearization, grads)
        return _finish(memory, loss, outputs, grads, returned[-1], window)


def _read(
    cell: nn.Module,
    readout: nn.Module,
    start: Tensor,  # [B, S]
    states: Tensor,  # [k, B, S]
    window: RunWindow,
    targets: Targets,
    loss_fn: LossFunction,
    auxiliary_weight: float | Tensor,
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Outputs, loss, the parameters' direct gradients and the loss's cotangents [k + 1, B, S].

    Those are of the state the window began with (not zero if the cell has an auxiliary loss), and of every state that
    it returned.
    """
    with torch.enable_grad():
        leaf = torch.cat([start[None], states]).detach().requires_grad_()
        outputs = read_out(readout, leaf[1:], window.inputs)
        auxiliary = auxiliary_loss(cell, window.inputs, window.given(leaf[:-1]), auxiliary_weight)
        loss = evaluate_loss(loss_fn, outputs, targets, auxiliary)
        grads, (cotangents,) = autograd_gradients(loss, named_parameters(cell, readout), leaf)
    return outputs.detach(), loss.detach(), grads, cotangents


def _extend_tail(
    memory: Memory,
    steps: Steps,
    cotangents: Tensor,  # [k + 1, B, S]
    capacity: int,
    grads: dict[str, Tensor],
) -> None:
    """Add steps to the tail, and the gradient of their loss to ``grads``; advance P if a next one would not fit."""
    tail = memory.tail
    if tail is None or tail.capacity != capacity or not tail.takes(steps):
        memory.settle()
    if tail is None or tail.capacity != capacity:
        tail = memory.tail = Tail(capacity)
    tail.append(steps)
    if len(tail) + len(steps) <= tail.capacity:
        if cotangents.any():
            _add(memory.base.contract(*pull_back(tail, cotangents, memory.base.shapes)), grads)
    else:
        _add(memory.base.contract_and_advance(multiply_out(tail, cotangents, memory.base.shapes)), grads)
        tail.clear()


def _contract_and_advance(memory: Memory, linearization: WindowLinearization, grads: dict[str, Tensor]) -> None:
    """A window that goes into P at once, after what is pending."""
    memory.settle()
    _add(memory.base.contract_and_advance(linearization), grads)


def _add(found: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    for name, gradient in found.items():
        grads[name] += gradient


def _finish(
    memory: Memory, loss: Tensor, outputs: Tensor, grads: dict[str, Tensor], state: Tensor, window: RunWindow
) -> WindowResult:
    if window.routings:
        memory.count(window.routings, window.cell)  # type: ignore[arg-type]
    memory.state, memory.fresh, memory.half_written = state.detach(), False, False
    return WindowResult(loss, outputs, grads, memory)
