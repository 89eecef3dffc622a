"""Exact derivatives of what has no rule: parameter by parameter, or the whole window at once. Slower, never wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtrl_moe_pl.linearization.derivatives import PlanMismatch
from rtrl_moe_pl.linearization.step import batched_vjp, require_close
from rtrl_moe_pl.linearization.window import Block, DenseTerm


def pull_back(output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    """``batched_vjp`` through vmap where every operation allows it, one cotangent at a time elsewhere."""
    if not output.requires_grad:
        return [value.new_zeros(len(cotangents), *value.shape) for value in inputs]
    try:
        found = batched_vjp(output, inputs, cotangents, batched=True)
    except RuntimeError:
        return batched_vjp(output, inputs, cotangents, batched=False)
    # one operation (cdist) is silently wrong under vmap: compare a combination of all cotangents
    mix = torch.linspace(0.5, 1.5, len(cotangents), dtype=output.dtype, device=output.device)
    mixed = torch.tensordot(mix, cotangents, 1)
    truth = torch.autograd.grad(output, inputs, mixed, retain_graph=True, materialize_grads=True)
    try:
        for batch, expected in zip(found, truth, strict=True):
            require_close(torch.tensordot(mix.to(batch.dtype), batch, 1), expected)
    except PlanMismatch:
        return batched_vjp(output, inputs, cotangents, batched=False)
    return found


def functional_terms(
    cell: nn.Module,
    parameters: dict[str, Tensor],
    inputs: Tensor,  # [k, B, ..]
    given: Tensor,  # [k, B, S] states that the cell was given
    states: Tensor,  # [k, B, S, S] cotangents of the states that it returned, from the end state
    losses: Tensor,  # [k, B, S] and from the loss
    returned: Tensor,  # [k, B, S] the states that it returned
) -> dict[Block, list[DenseTerm]]:
    """M of parameters in any use, by running the cell over each lane's k steps as one batch.

    Cost: B forward passes over k rows, and S + 1 cotangents through each.

    Raises:
        PlanMismatch: if a lane's steps run together give other states.
    """
    lanes: list[list[Tensor]] = []
    for b in range(given.shape[1]):
        with torch.enable_grad():
            output = cell(inputs[:, b], given[:, b])
        require_close(output.detach(), returned[:, b])
        cotangents = torch.cat([states[:, b].permute(2, 0, 1), losses[None, :, b]])  # [S + 1, k, S]
        lanes.append(pull_back(output, list(parameters.values()), cotangents))
    return {
        Block.alone(name, parameters[name].shape): [_dense_term([lane[i] for lane in lanes])]
        for i, name in enumerate(parameters)
    }


def _dense_term(lanes: list[Tensor]) -> DenseTerm:
    """From one [S + 1, *shape] a lane, the loss last."""
    flat = torch.stack([lane.reshape(len(lane), -1).T[None] for lane in lanes])  # [B, 1, numel, S + 1]
    return DenseTerm(flat[..., :-1], flat[..., -1].sum(0))


def initial_terms(
    initial: Tensor,  # [B, S], with its graph
    parameters: dict[str, Tensor],
    cotangents: Tensor,  # [B, S, S], from the end state
    loss: Tensor,  # [B, S]
) -> dict[Block, list[DenseTerm]]:
    """M of the parameters of a learned initial state, given the cotangents it received at the starts."""
    if not initial.requires_grad:
        return {}
    names = list(parameters)
    reached = torch.autograd.grad(initial.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    used = {n: parameters[n] for n, g in zip(names, reached, strict=True) if g is not None}
    lanes = []
    for b in range(initial.shape[0]):
        lane = torch.cat([cotangents[b].T, loss[b][None]])  # [S + 1, S]
        lanes.append(pull_back(initial[b], list(used.values()), lane))
    return {
        Block.alone(name, used[name].shape): [_dense_term([lane[i] for lane in lanes])] for i, name in enumerate(used)
    }


def whole_window(
    start: Tensor,  # leaf [B, S]
    returned: Sequence[Tensor],  # k states [B, S], with their graph
    loss_cotangents: Tensor,  # [k, B, S]
    parameters: dict[str, Tensor],
) -> tuple[Tensor, Tensor, dict[Block, list[DenseTerm]]]:
    """J, the loss's cotangent at the start, and M, from the graph of the window as it ran.

    For cells that are random, or whose rows cannot be evaluated together. Cost: B (S + 1) backward passes (S + 1 at a
    time where vmap allows it).

    Raises:
        ValueError: if a lane's state depends on another lane's.
    """
    batch, size = start.shape
    joined = torch.stack(list(returned))  # [k, B, S]
    names = list(parameters)
    inputs = [start, *parameters.values()]
    transition = start.new_empty(batch, size, size)
    cotangent = torch.empty_like(start)
    lanes: list[list[Tensor]] = []
    for b in range(batch):
        cotangents = joined.new_zeros(size + 1, *joined.shape)
        cotangents[:size, -1, b] = torch.eye(size, dtype=start.dtype, device=start.device)
        cotangents[size, :, b] = loss_cotangents[:, b]
        at_start, *found = pull_back(joined, inputs, cotangents)  # [S + 1, B, S], [S + 1, *shape] each
        others = at_start.clone()
        others[:, b] = 0.0
        if bool(others.any()):
            raise ValueError(
                f"lane {b}'s state depends on other lanes' states: online gradients need lanes that are independent "
                "(replace batch statistics by LayerNorm, for example)"
            )
        transition[b] = at_start[:size, b].T
        cotangent[b] = at_start[size, b]
        lanes.append(found)
    terms = {
        Block.alone(name, parameters[name].shape): [_dense_term([lane[i] for lane in lanes])]
        for i, name in enumerate(names)
    }
    return transition, cotangent, terms
