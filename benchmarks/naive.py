"""The baseline that public code uses: RTRL step by step, all Jacobians by vmap(jacrev)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from rtrl_moe_pl.gradients.windows import LossFunction


class NaiveRTRL:
    """Exact, one step at a time, with no use of structure.

    Args:
        cell, readout: modules.
        batch_size: lanes.
    """

    def __init__(self, cell: nn.Module, readout: nn.Module, batch_size: int) -> None:
        self.cell, self.readout = cell, readout
        self.parameters = {name: p.detach() for name, p in cell.named_parameters()}
        self.state = cell.initial_state(batch_size).detach()  # type: ignore[operator]
        size = self.state.shape[1]
        self.influence = {n: self.state.new_zeros(batch_size, size, p.numel()) for n, p in self.parameters.items()}

        def step(parameters: dict[str, Tensor], state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            new = functional_call(cell, parameters, (x[None], state[None]))[0]
            return new, new

        self._jacobians = vmap(jacrev(step, argnums=(0, 1), has_aux=True), in_dims=(None, 0, 0))

    def step(self, inputs: Tensor, targets: Tensor, loss_fn: LossFunction) -> dict[str, Tensor]:
        """Gradient of the cell's parameters over inputs [B, k, ..]."""
        gradients = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for t in range(inputs.shape[1]):
            (m, j), self.state = self._jacobians(self.parameters, self.state, inputs[:, t])
            for name, p in self.influence.items():
                self.influence[name] = torch.baddbmm(m[name].flatten(2), j, p)
            leaf = self.state.detach().requires_grad_()
            loss = loss_fn(self.readout(leaf)[:, None], targets[:, t : t + 1])
            (cotangent,) = torch.autograd.grad(loss, leaf)
            for name, p in self.influence.items():
                gradients[name] += torch.einsum("bs,bsp->p", cotangent, p).view_as(gradients[name])
        return gradients
