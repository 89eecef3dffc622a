"""What is differentiated and what is not: frozen, stopped, detached, written in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.gradients.user_cells.base import WIDTH, UserCell, parameter
from tests.gradients.user_cells.vectors import AffineNorm


class Frozen(UserCell):
    """A frozen layer, a buffer as a weight and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("fixed", torch.randn(4, 4))
        self.unused = parameter(2, 2)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        fixed = self.get_buffer("fixed")
        return torch.tanh(self.input(x) + self.layer(torch.tanh(self.frozen(s))) + s @ fixed)


class Reservoir(UserCell):
    """Nothing in the cell is trained: the readout alone is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.requires_grad_(False)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + self.layer(s))


class StoppedGradient(UserCell):
    """Layers whose parameters are trainable, but not from here: autograd is off while they run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        with torch.no_grad():
            seen, gate = self.norm(self.input(x)), self.gate(s)
        return torch.tanh(seen + torch.sigmoid(gate) * self.layer(s) + self.gate(x.mean(-1, True) + s).detach())


class Detached(UserCell):
    """Every step forgets its own past."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + s.detach())


class NoGraph(UserCell):
    """Nothing is differentiable."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + s).detach()


class DelayLine(nn.Module):
    """The state is the last input: no parameters, and no use of the state."""

    state_size = WIDTH

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return x


class Memoryless(UserCell):
    """A cell that ignores its state."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x))


class InPlace(UserCell):
    """Sums, activations and residuals written into tensors that the layers returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        new = self.input(x)
        new += self.layer(s)
        new.sub_(0.1)
        return torch.tanh(new) * self.relu(self.gate(s)) + 0.5 * s


class InPlaceDense(AffineNorm):
    """The same with dense derivatives."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        new = self.layer(s)
        new += self.input(x)
        new.tanh_()
        return self.after(new + s)


class InPlaceAfterFrozen(UserCell):
    """What a frozen layer was given is written to afterwards: legal, because it keeps no input for its weight."""

    def __init__(self, size: int = 4) -> None:
        super().__init__(size)
        self.frozen, self.gain = nn.Linear(size, size).requires_grad_(False), parameter(size)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        inner = s * self.gain + torch.tanh(self.input(x))
        seen = self.frozen(inner)
        inner.mul_(0.5)
        return torch.tanh(inner) + 0.5 * torch.sin(seen)


class MixedPrecision(nn.Module):
    """Weights in float32, a state that is summed up in float64."""

    state_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.input, self.layer = nn.Linear(WIDTH, 4), nn.Linear(4, 4)

    def initial_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 4, dtype=torch.float64)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return 0.9 * s + torch.tanh(self.input(x) + self.layer(s.float())).double()
