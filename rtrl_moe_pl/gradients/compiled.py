"""Running windows by torch.compile: several steps of the cell as one graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells.routed import Routing
from rtrl_moe_pl.gradients.windows import unroll

# Of a graph. A GRU's step (32 units, 8 lanes, one thread) takes 14 us in place of 38, with its way back 56 in place of
# 132; in a graph of its own it takes 52. Longer graphs take longer to compile.
STEPS = 16


class CompiledUnroll:
    """``unroll``, its steps compiled some at a time; numbers differ by rounding.

    The first window is run eagerly, which checks the cell. Steps that fill no graph, and routed cells, are run eagerly
    always. What torch.compile does not support is run eagerly from then on, with one warning. On a GPU graphs are CUDA
    graphs (mode "reduce-overhead"), which write their results, and gradients, where they wrote those before.

    Args:
        window: steps that are mostly asked for at a time, cut into equal graphs of at most 16 steps; None: 16.
        backend: of torch.compile.

    Cost: compiling takes 10 to 100 s, for windows with and without starts, and again for another batch size.
    """

    def __init__(self, window: int | None = None, backend: str | Callable[..., Any] = "inductor") -> None:
        window = window or STEPS
        self.steps = window // -(-window // STEPS)
        self.backend = backend
        self._checked: nn.Module | None = None
        self._compiled: Any = None
        self._failed = False

    def __call__(
        self,
        cell: nn.Module,
        inputs: Sequence[Tensor],  # k tensors [B, ..]
        state: Tensor,  # [B, S]
        initial: Tensor | None,  # [B, S]
        starts: Tensor | None,  # [B, k] bool
        starting: list[bool],
        routings: list[Routing] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See ``unroll``."""
        eager = self._checked is not cell or routings is not None
        self._checked = cell
        given: list[Tensor] = []
        returned: list[Tensor] = []
        for begin in range(0, len(inputs), self.steps):
            here = slice(begin, begin + self.steps)
            part = inputs[here]
            began = starts[:, here] if starts is not None and any(starting[here]) else None
            found = None
            if not (eager or self._failed) and len(part) == self.steps:
                found = self._graph(cell, torch.stack(list(part)), state, None if began is None else initial, began)
            if found is None:
                found = unroll(cell, part, state, initial, began, starting[here], routings)
            given += found[0]
            returned += found[1]
            state = returned[-1]
        return given, returned

    def _graph(
        self, cell: nn.Module, inputs: Tensor, state: Tensor, initial: Tensor | None, starts: Tensor | None
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
        """One graph's steps, or None if it cannot be made."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # a second, only where it is needed

        if self._compiled is None:
            mode = "reduce-overhead" if state.is_cuda and self.backend == "inductor" else None
            self._compiled = torch.compile(_steps, fullgraph=True, backend=self.backend, mode=mode)
        try:
            given, returned = self._compiled(cell, inputs, state, initial, starts)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self._failed = True
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"compile: torch.compile does not support {type(cell).__name__} here ({reason}): its windows are run "
                "eagerly",
                stacklevel=2,
            )
            return None
        if state.is_cuda:
            given, returned = given.clone(), returned.clone()
        return given.unbind(0), returned.unbind(0)


def _steps(
    cell: nn.Module, inputs: Tensor, state: Tensor, initial: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """States given and returned, [k, B, S] each."""
    given, returned = [], []
    for t, x in enumerate(inputs.unbind(0)):
        if starts is not None and initial is not None:
            state = torch.where(starts[:, t, None], initial, state)
        given.append(state)
        state = cell(x, state)
        returned.append(state)
    return torch.stack(given), torch.stack(returned)
