"""What a routed cell reads, writes and uses over time, drawn after every validation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.func import jacrev, vmap

from rtrl_moe_pl.cells import RoutedCell
from rtrl_moe_pl.cells.base import at_least
from rtrl_moe_pl.data import Batch
from rtrl_moe_pl.gradients import BlockRTRL, LazyExpertRTRL
from rtrl_moe_pl.modules.usage import usage_entropy
from rtrl_moe_pl.tasks import Task
from rtrl_moe_pl.training.pictures import picture_folder, show, when

EVERY = 8  # steps between two norms of P: a window costs about the same whatever its length
MARKS = ("tab:red", "tab:brown", "black", "tab:purple")  # colours


class Trace(NamedTuple):
    """T steps of one lane."""

    read: Tensor  # [T, S] bool
    written: Tensor  # [T, S] bool
    experts: Tensor  # [T, E] bool
    state_norm: Tensor  # [T]
    jacobian_norm: Tensor | None  # [T], Frobenius, over the root of S d: 1 for the identity; None where vmap fails
    influence_norm: Tensor | None  # Frobenius, of P after every EVERY steps; None for a cell that BlockRTRL refuses


@torch.inference_mode(False)  # in which nothing can be differentiated
@torch.no_grad()
def trace(cell: RoutedCell, inputs: Tensor) -> Trace:
    """Run a cell from its initial state over inputs [T, ..].

    Cost: T steps, S d cotangents through all of them for the norms of ds'/ds, and T / ``EVERY`` windows of RTRL.
    """
    inputs = inputs.clone()
    state, states, routings = cell.initial_state(1), [], []
    for x in inputs:
        states.append(state)
        state, routing = cell.advance(x[None], state)
        routings.append(routing)
    given = torch.cat(states)  # [T, S d]
    sizes = cell.num_slots, cell.num_slots, cell.num_experts
    read, written, experts = (
        torch.zeros(len(inputs), size, dtype=torch.bool, device=given.device).scatter_(1, torch.cat(index), True)
        for index, size in zip(zip(*routings, strict=True), sizes, strict=True)
    )
    norms = torch.cat([*states[1:], state]).norm(dim=1)
    return Trace(read, written, experts, norms, jacobian_norms(cell, inputs, given), influence_norms(cell, inputs))


def jacobian_norms(cell: RoutedCell, inputs: Tensor, given: Tensor) -> Tensor | None:
    """Norms of ds'/ds at the states given [T, S d], [T]; None for a cell that vmap refuses: a picture stops nothing."""
    try:
        jacobians = vmap(jacrev(lambda s, x: cell(x[None], s[None])[0]), chunk_size=16)(given, inputs)
    except RuntimeError:
        return None
    return torch.linalg.matrix_norm(jacobians) / cell.state_size**0.5


def influence_norms(cell: RoutedCell, inputs: Tensor) -> Tensor | None:
    """Norm of P after every ``EVERY`` of T steps from the initial state; None if BlockRTRL cannot train the cell."""
    algorithm, norms = (LazyExpertRTRL if cell.num_experts else BlockRTRL)(window=EVERY, chunk=EVERY), []
    try:
        memory = algorithm.init(cell, 1)
        for window in inputs.split(EVERY):
            labels = window.new_zeros(1, len(window))
            memory = algorithm.step(cell, nn.Identity(), window[None], labels, _no_loss, memory).memory
            norms.append(memory.sensitivity.norm())
    except ValueError:
        return None
    return torch.stack(norms)


def _no_loss(outputs: Tensor, _: Any) -> Tensor:
    return 0 * outputs.sum()


class RoutingPicture(Callback):
    """Rasters of the slots read and written and the experts used over one sequence, how often each was, and costs.

    The first lane of the first validation batch is run again, from its beginning; where it comes in windows, the next
    ones follow. Steps that the data's task marks (key, value and question) are pointed out. The figure goes to loggers
    that take figures (TensorBoard), as ``val/routing``, and beside the logs as ``val_routing.png``, of the latest.
    Needs a module whose ``cell`` is a ``RoutedCell``. Nothing is drawn in sanity checks and under ``fast_dev_run``.

    Args:
        steps: at most as many steps are drawn, at least 1.

    Attributes:
        latest: what was drawn last.

    Cost: about two seconds for 128 steps of 4 slots of 32 numbers.
    """

    def __init__(self, steps: int = 128) -> None:
        self.steps = at_least(1, "steps", steps)
        self.latest: Trace | None = None
        self._inputs: list[Tensor] = []
        self._goes_on = False  # the lane, in the next validation batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        cell = getattr(pl_module, "cell", None)
        if not isinstance(cell, RoutedCell):
            raise TypeError(
                f"RoutingPicture needs a cell that chooses slots, such as RecurrentMoE, got {type(cell).__name__}"
            )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx > 0:
            return
        if batch_idx == 0:
            self._inputs, self._goes_on = [], True
        elif batch.starts[0, 0]:
            self._goes_on = False
        if self._goes_on:
            seen = sum(map(len, self._inputs))
            self._inputs.append(batch.inputs[0, : self.steps - seen].clone())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = picture_folder(trainer)
        quiet = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        if not self._inputs or quiet or not trainer.is_global_zero:
            return
        cell: Any = pl_module.cell
        inputs = torch.cat(self._inputs)
        self.latest = trace(cell, inputs)
        task = getattr(trainer.datamodule, "task", None)  # type: ignore[attr-defined]
        marks = task.marks(inputs if inputs.ndim == 1 else inputs.argmax(-1)) if isinstance(task, Task) else {}
        title = f"the first {len(inputs)} steps of one lane, {when(trainer)}"
        show(partial(draw, cell, self.latest, title, marks), trainer, folder, "val", "routing", dpi=110)


def cost_table(cell: RoutedCell, trace: Trace) -> list[tuple[str, float, float]]:
    """Multiply-adds of a step if everything were dense, and as done: name, dense, done."""
    p = sum(q.numel() for q in cell.parameters())
    by_expert = sum(cell.get_parameter(name).numel() for name in cell.banks) / max(1, cell.num_experts)
    size, d = cell.state_size, cell.slot_size
    written = float(trace.written.sum(1).float().mean()) * d
    touched = float((trace.read | trace.written).sum(1).float().mean()) * d
    used = float(trace.experts.sum(1).float().mean()) if cell.num_experts else 0.0
    return [
        ("experts", by_expert * cell.num_experts, by_expert * used),
        ("ds'/ds", float(size * size), written * touched),
        ("J P, step by step", float(size) * size * p, written * touched * p),
    ]


def draw(cell: RoutedCell, trace: Trace, title: str, marks: Mapping[str, Tensor]) -> Figure:
    """Rasters and norms over time at the left, with steps that ``marks`` names [T]; usage and costs at the right."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    rows = [("slots read", trace.read), ("slots written", trace.written), ("experts used", trace.experts)]
    rows = [row for row in rows if row[1].shape[1]]
    axes = figure.subplots(len(rows) + 1, 2, width_ratios=(3, 1), height_ratios=[1] * len(rows) + [1.1])
    for (name, chosen), (left, right) in zip(rows, axes, strict=False):
        _raster(left, name, chosen)
        _usage(right, chosen)
    norms, table = axes[-1]
    count = len(trace.state_norm)
    norms.plot(trace.state_norm.tolist(), label="norm of state")
    if trace.jacobian_norm is not None:
        norms.plot(trace.jacobian_norm.tolist(), label="norm of ds'/ds (1: identity)")
    if trace.influence_norm is not None:
        ends = [min(begin + EVERY, count) - 1 for begin in range(0, count, EVERY)]
        norms.plot(ends, trace.influence_norm.tolist(), marker=".", label="norm of influence P")
    norms.set(xlabel="step", ylabel="norms", xlim=(-0.5, count - 0.5), yscale="log")
    norms.grid(alpha=0.3)
    for left in axes[:, 0]:
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = list(norms.lines)
    for colour, (name, mask) in zip(MARKS, marks.items(), strict=False):
        for step in mask.nonzero().flatten().tolist():
            lines = [left.axvline(step, color=colour, linewidth=1) for left in axes[:, 0]]
            lines[0].set_label(name)
        handles += lines[:1] if mask.any() else []
    figure.legend(handles=handles, fontsize=8, loc="outside lower left", ncols=7)
    table.axis("off")
    lines = [f"{'multiply-adds a step':18s}{'dense':>9s}{'done':>9s}"]
    lines += [f"{name:18s}{dense:9.2g}{done:9.2g}" for name, dense, done in cost_table(cell, trace)]
    table.text(0, 0.95, "\n".join(lines), family="monospace", fontsize=8, va="top")
    return figure


def _raster(axes: Axes, name: str, chosen: Tensor) -> None:
    axes.imshow(
        chosen.T.cpu().numpy(), aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1, origin="lower"
    )
    axes.set(ylabel=name)
    count = chosen.shape[1]
    for row in range(count - 1):  # neighbours that are both in use stay apart
        axes.axhline(row + 0.5, color="white", linewidth=1 if count <= 16 else 0.5)
    axes.set_yticks(_ticks(count))


def _usage(axes: Axes, chosen: Tensor) -> None:
    counts = chosen.sum(0)
    share = (counts / counts.sum().clamp(min=1)).tolist()
    unused = int((counts == 0).sum())
    axes.barh(range(len(share)), share, color="tab:blue")
    axes.axvline(1 / len(share), color="0.4", linestyle="--")
    entropy = float(usage_entropy(counts))
    axes.set_title(f"share (dashed: even), entropy {entropy:.0%}, {unused} unused", fontsize=8)
    axes.set_ylim(-0.5, len(share) - 0.5)
    axes.set_yticks(_ticks(len(share)))


def _ticks(count: int) -> range:
    """At most eight of some rows."""
    return range(0, count, -(-count // 8))
