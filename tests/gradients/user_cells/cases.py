"""What is known of the user cells: which path their parameters must take, and which data they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.gradients.user_cells import flow, graphs, lanes, matrices, modules, vectors
from tests.gradients.user_cells.base import VOCABULARY, WIDTH

TAPS, FUNCTIONAL, UNUSED = "taps", "functional", "unused"
LAYER = {"cell.layer.weight": TAPS, "cell.layer.bias": TAPS}
INPUT = {"cell.input.weight": TAPS, "cell.input.bias": TAPS}


@dataclass
class Case:
    """A cell and what is known of it.

    Args:
        make: the cell.
        paths: the path of some parameters.
        tokens: trailing shape of integer inputs; None for real inputs.
        remembers: TBPTT must give another gradient.
        warns: the cell needs the slowest path, and says so.
        batches: lanes to try.
    """

    make: Callable[[], Any]
    paths: dict[str, str] = field(default_factory=dict)
    tokens: tuple[int, ...] | None = None
    remembers: bool = True
    warns: bool = False
    batches: tuple[int, ...] = (1, 2, 3)


CASES: dict[str, Case] = {
    "right matrix": Case(matrices.RightMatrix, INPUT | {"cell.weight": TAPS}),
    "left matrix": Case(matrices.LeftMatrix, INPUT | {"cell.weight": FUNCTIONAL}),
    "left product": Case(matrices.LeftProduct, INPUT | {"cell.weight": FUNCTIONAL}),
    "addmm": Case(matrices.Addmm, {"cell.weight": TAPS, "cell.bias": TAPS}),
    "broadcast bias": Case(matrices.BroadcastBias, INPUT),
    "transposed weight": Case(matrices.TransposedWeight, INPUT | {"cell.layer.weight": FUNCTIONAL}),
    "tied forward and back": Case(matrices.TiedForwardAndBack, INPUT | {"cell.layer.weight": FUNCTIONAL}),
    "layer twice": Case(matrices.LayerTwice, INPUT | LAYER),
    "layer for input and state": Case(matrices.LayerForInputAndState, LAYER | {"cell.input.weight": UNUSED}),
    "low rank": Case(matrices.LowRank),
    "linear of linear": Case(matrices.LinearOfLinear, {"cell.down.weight": TAPS, "cell.up.bias": TAPS}),
    "one affine map": Case(matrices.OneAffineMap, LAYER),
    "several vectors": Case(matrices.SeveralVectors, {"cell.mix.weight": TAPS, "cell.gate.bias": TAPS}),
    "bilinear": Case(matrices.Bilinear, INPUT | {"cell.layer.weight": FUNCTIONAL}),
    "convolution": Case(matrices.Convolution, INPUT | {"cell.layer.weight": FUNCTIONAL}),
    "complex decay": Case(matrices.ComplexDecay, INPUT | {"cell.decay": FUNCTIONAL}),
    "element-wise": Case(vectors.ElementWise, LAYER | {"cell.gain": TAPS, "cell.bias": TAPS, "cell.leak": TAPS}),
    "scalar": Case(lambda: vectors.Scalar(4), LAYER | {"cell.scale": TAPS, "cell.shift": TAPS}),
    "scalar of many": Case(lambda: vectors.Scalar(10), LAYER | {"cell.gain": TAPS}),
    "softmax gain": Case(vectors.SoftmaxGain, LAYER | {"cell.logits": FUNCTIONAL}),
    "uniform flipped": Case(lambda: vectors.UniformVector(lambda p: p.flip(0)), INPUT | LAYER),
    "uniform mean": Case(lambda: vectors.UniformVector(lambda p: p.mean(0)), INPUT | LAYER),
    "uniform first": Case(lambda: vectors.UniformVector(lambda p: p[0]), INPUT | LAYER),
    "zeros summed": Case(lambda: vectors.ZeroVector(lambda p: p.cumsum(0)), INPUT | LAYER),
    "affine norm": Case(vectors.AffineNorm, LAYER | {"cell.before.weight": TAPS, "cell.after.bias": TAPS}),
    "small affine norm": Case(lambda: vectors.AffineNorm(5), LAYER | {"cell.before.weight": TAPS}),
    "norm twice": Case(vectors.NormTwice, LAYER),
    "other norms": Case(vectors.OtherNorms, LAYER),
    "reparametrised": Case(
        vectors.Reparametrised, INPUT | {"cell.rotated.parametrizations.weight.original": FUNCTIONAL}
    ),
    "initial from step": Case(
        vectors.InitialFromStep, {"cell.layer.weight": "taps + initial state", "cell.input.weight": TAPS}
    ),
    "initial by lane": Case(vectors.InitialByLane, {"cell.layer.bias": "taps + initial state"}),
    "tokens": Case(modules.Tokens, LAYER | {"cell.table.weight": TAPS}, tokens=()),
    "tokens, padding": Case(lambda: modules.Tokens(padding_idx=1), LAYER, tokens=()),
    "token bag": Case(modules.TokenBag, LAYER, tokens=(2,)),
    "attention": Case(
        modules.Attention,
        {"cell.feed.weight": TAPS, "cell.attention.in_proj_weight": FUNCTIONAL, "cell.norm.weight": TAPS},
    ),
    "whole modules": Case(modules.WholeModules, INPUT),
    "cdist": Case(flow.Cdist, LAYER | {"cell.centres": FUNCTIONAL}),
    "cdist bare": Case(flow.CdistBare, warns=True),
    "custom function": Case(flow.CustomFunction),
    "branch on state": Case(flow.BranchOnState, warns=True, batches=(2, 3)),
    "branch on input": Case(flow.BranchOnInput, warns=True, batches=(2, 3)),
    "divided by batch": Case(flow.DividedByBatch, warns=True, batches=(2, 3)),
    "lane count": Case(flow.LaneCount, warns=True, batches=(2,)),
    "top units": Case(lambda: flow.TopUnits(6, 2), LAYER),
    "top units of many": Case(lambda: flow.TopUnits(24, 2), LAYER),
    "mostly dead": Case(flow.MostlyDead, LAYER),
    "opens later": Case(flow.OpensLater, LAYER | {"cell.late.weight": TAPS}),
    "other branch later": Case(flow.OtherBranchLater, warns=True),
    "inner gradient": Case(flow.InnerGradient, warns=True),
    "checkpointed": Case(flow.Checkpointed, INPUT | LAYER),
    "frozen": Case(graphs.Frozen, INPUT | LAYER | {"cell.unused": UNUSED}),
    "reservoir": Case(graphs.Reservoir, remembers=False),
    "stopped gradient": Case(graphs.StoppedGradient, LAYER),
    "detached": Case(graphs.Detached, INPUT, remembers=False),
    "no graph": Case(graphs.NoGraph, remembers=False),
    "delay line": Case(graphs.DelayLine, remembers=False),
    "memoryless": Case(graphs.Memoryless, INPUT, remembers=False),
    "in place": Case(graphs.InPlace),
    "in place, dense": Case(graphs.InPlaceDense),
    "in place after frozen": Case(graphs.InPlaceAfterFrozen, warns=True),
    "input mean": Case(lanes.InputMean, warns=True, batches=(2, 3)),
}


def data(case: Case, batch: int, steps: int) -> torch.Tensor:
    """Inputs [B, T, ..]; real ones are small for the first half, so that some paths open late."""
    if case.tokens is not None:
        return torch.randint(0, VOCABULARY, (batch, steps, *case.tokens))
    inputs = torch.randn(batch, steps, WIDTH, dtype=torch.float64)
    inputs[:, : steps // 2].clamp_(-1.5, 1.5)
    inputs[0, steps // 2, 0] = 2.7
    return inputs
