"""Tables, attention and recurrent modules of torch.nn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gradients.user_cells.base import VOCABULARY, WIDTH, UserCell


class Tokens(UserCell):
    """Integer inputs through a table."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(VOCABULARY, 4, **settings), nn.Linear(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.table(x) + self.layer(s))


class TokenBag(Tokens):
    """Several tokens a step, and the table as a layer too (tied embedding)."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.table(x).sum(1) + self.layer(torch.softmax(F.linear(s, self.table.weight), -1)[:, :4]))


class Attention(UserCell):
    """Multi-head attention of three slots over themselves and the input, residual, LayerNorm, feed-forward."""

    def __init__(self) -> None:
        super().__init__(12)
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.feed = nn.Linear(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        slots = s.view(-1, 3, 4)
        normed = self.norm(slots)
        memory = torch.cat([normed, self.input(x).view(-1, 3, 4)], 1)
        slots = slots + self.attention(normed, memory, memory, need_weights=False)[0]
        return torch.tanh(slots + F.gelu(self.feed(self.norm(slots)))).reshape(-1, 12)


class WholeModules(UserCell):
    """torch.nn.GRU and LSTM, one step at a time, their states side by side."""

    def __init__(self) -> None:
        super().__init__(10)
        self.gru, self.lstm = nn.GRU(WIDTH, 2, num_layers=2, batch_first=True), nn.LSTM(2, 3, batch_first=True)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        layers = s[:, :4].view(-1, 2, 2).transpose(0, 1).contiguous()
        out, layers = self.gru(x[:, None], layers)
        h, c = (part[None].contiguous() for part in s[:, 4:].chunk(2, -1))
        _, (h, c) = self.lstm(out, (h, c))
        return torch.cat([layers.transpose(0, 1).reshape(-1, 4), h[0], c[0]], -1) + 0.1 * torch.tanh(self.input(x))
