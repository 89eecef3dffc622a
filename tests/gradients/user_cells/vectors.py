"""Ways to meet a vector or a number, and initial states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.gradients.user_cells.base import UserCell, parameter


class ElementWise(UserCell):
    """Gains, a bias without a layer, and a leak."""

    def __init__(self) -> None:
        super().__init__(10)
        self.layer, self.gain, self.bias, self.leak = nn.Linear(10, 10), parameter(10), parameter(10), parameter(10)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        new = torch.tanh(self.layer(torch.sigmoid(self.gain) * s) + self.input(x) + self.bias)
        return torch.lerp(s, new, torch.sigmoid(self.leak))


class Scalar(UserCell):
    """Single numbers: without an axis, and with one."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.layer, self.gain = nn.Linear(size, size), parameter(size)
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), parameter(1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.scale * self.layer(self.gain * s) + self.input(x) + self.shift)


class SoftmaxGain(UserCell):
    """A parameter normalised over its own entries."""

    def __init__(self) -> None:
        super().__init__(10)
        self.layer, self.logits = nn.Linear(10, 10), parameter(10)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.layer(s * 5 * torch.softmax(self.logits, 0)) + self.input(x))


class UniformVector(UserCell):
    """A vector of equal entries, used along its axis: one copy for every row gives the same states."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.gain, self.use = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), use

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.layer(s) * self.use(self.gain) + self.input(x))


class ZeroVector(UniformVector):
    """The same with zeros, which a running sum leaves as they are."""

    def __init__(self, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__(use)
        nn.init.zeros_(self.gain)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.layer(s) + s * self.use(self.gain) + self.input(x))


class AffineNorm(UserCell):
    """LayerNorm with gain and bias, before and after the activation."""

    def __init__(self, size: int = 10) -> None:
        super().__init__(size)
        self.layer, self.before, self.after = nn.Linear(size, size), nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return self.after(torch.tanh(self.before(self.layer(s) + self.input(x))) + s)


class NormTwice(AffineNorm):
    """One LayerNorm in two places, and its gain once more alone."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.before(self.layer(self.before(s)) + self.input(x)) + self.before.weight * s)


class OtherNorms(UserCell):
    """GroupNorm, RMSNorm and a learned slope: gains in other functions."""

    def __init__(self) -> None:
        super().__init__(6)
        self.layer, self.group, self.rms, self.slope = nn.Linear(6, 6), nn.GroupNorm(2, 6), nn.RMSNorm(6), nn.PReLU()

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.group(self.layer(s)) + self.slope(self.rms(s) + self.input(x)))


class Reparametrised(UserCell):
    """Weights that are functions of other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.rotated = parametrizations.orthogonal(nn.Linear(4, 4, bias=False))

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.normed(s) + 0.5 * self.rotated(s))


class InitialFromStep(UserCell):
    """The initial state is computed from parameters that the step uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.tanh(self.layer.bias + self.layer.weight.sum(0) + self.input.bias).expand(batch_size, -1)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.layer(s))


class InitialByLane(InitialFromStep):
    """Every lane has an initial state of its own."""

    def initial_state(self, batch_size: int) -> Tensor:
        lanes = torch.linspace(-1, 1, batch_size, dtype=self.layer.bias.dtype)
        return torch.tanh(lanes[:, None] * self.layer.bias)
