"""Ways to meet a matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.gradients.user_cells.base import WIDTH, UserCell, parameter


class RightMatrix(UserCell):
    """s W with a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + s @ self.weight)


class LeftMatrix(RightMatrix):
    """W s by einsum: a form without a rule."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + torch.einsum("ij,bj->bi", self.weight, s))


class LeftProduct(RightMatrix):
    """W s^T: the parameter is the left factor of a product."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + (self.weight @ s.T).T)


class Addmm(RightMatrix):
    """b + s W in one call, with a second bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = parameter(4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + torch.addmm(self.bias, s, self.weight))


class BroadcastBias(RightMatrix):
    """One number as the bias of a whole layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = parameter(1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + F.linear(s, self.weight, self.bias))


class TransposedWeight(UserCell):
    """A Linear's weight, transposed: no hook of the module ever fires."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + F.linear(s, self.layer.weight.T))


class TiedForwardAndBack(TransposedWeight):
    """The same weight as it is and transposed, and a bias that is also a gain."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        inner = torch.tanh(self.layer(s))
        return torch.tanh(self.input(x) + F.linear(inner, self.layer.weight.T) + self.layer.bias * s)


class LayerTwice(TransposedWeight):
    """One layer applied twice in a row within a step."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(self.layer(s) + self.input(x))))


class LayerForInputAndState(UserCell):
    """One layer for the input and for the state, added: two meetings with the same cotangents."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) + self.layer(s))


class LowRank(UserCell):
    """W = U V, with as many rows in U as a window of 3 steps and 2 lanes has."""

    def __init__(self) -> None:
        super().__init__(6)
        self.left, self.right = parameter(6, 2), parameter(2, 6)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + F.linear(s, self.left @ self.right))


class LinearOfLinear(UserCell):
    """Layers with nothing between them, and none after them."""

    def __init__(self) -> None:
        super().__init__(10)
        self.down, self.up = nn.Linear(10, 2), nn.Linear(2, 10)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.up(self.down(s)) + self.input(x)


class OneAffineMap(UserCell):
    """The whole cell is one layer of [x, s]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH + 4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.layer(torch.cat([x, s], -1))


class SeveralVectors(UserCell):
    """A state of three slots: every layer acts on each of them."""

    def __init__(self) -> None:
        super().__init__(12)
        self.mix, self.gate, self.gain = nn.Linear(4, 4), nn.Linear(4, 4), parameter(4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        slots, seen = s.view(-1, 3, 4), self.input(x).view(-1, 3, 4)
        new = torch.sigmoid(self.gate(slots)) * torch.tanh(self.mix(slots) + seen) * self.gain
        return (0.5 * slots + new).reshape(-1, 12)


class Bilinear(UserCell):
    """x^T A s: no rule, and no batching rule either."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(WIDTH, 4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.layer(x, s))


class Convolution(UserCell):
    """A state seen as two channels."""

    def __init__(self) -> None:
        super().__init__(12)
        self.layer = nn.Conv1d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.layer(s.view(-1, 2, 6)).reshape(-1, 12))


class ComplexDecay(UserCell):
    """A diagonal complex recurrence over real parameters seen as complex numbers."""

    def __init__(self) -> None:
        super().__init__(8)
        self.decay = parameter(4, 2)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        z = torch.view_as_complex(self.decay) * torch.view_as_complex(s.view(-1, 4, 2))
        return torch.tanh(self.input(x) + torch.view_as_real(z).reshape(-1, 8))
