"""A routed cell of a user's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rtrl_moe_pl.cells import RoutedCell, Routing, expert_linear


class Plain(RoutedCell):
    """Parameters met element-wise and by a norm with gain, one bank without a bias."""

    def __init__(self) -> None:
        super().__init__(3, num_slots=5, slot_size=3, num_experts=4, read_slots=1, write_slots=2, active_experts=2)
        self.embed = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.gain = nn.Parameter(torch.randn(3))
        self.bank = nn.Parameter(torch.randn(4, 3, 6))

    def route(self, x: Tensor, s: Tensor) -> Routing:
        scores = s.unflatten(1, (5, 3)) @ x.unsqueeze(-1) + torch.arange(5)[:, None] * x.sum(1)[:, None, None].sin()
        order = scores.squeeze(-1).argsort(1)
        return Routing(order[:, :1], order[:, -2:], order[:, :2] % 4)

    def update(self, x: Tensor, read: Tensor, old: Tensor, routing: Routing) -> Tensor:
        both = torch.cat([self.norm(read[:, 0] + self.embed(x)), x], -1)[:, None]
        return torch.tanh(self.gain * old + expert_linear(both, self.bank, None, routing.experts))
