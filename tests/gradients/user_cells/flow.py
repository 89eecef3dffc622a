"""Derivatives that depend on data, on the batch, or that come from inside the cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.gradients.user_cells.base import WIDTH, UserCell, parameter
from tests.gradients.user_cells.matrices import LeftMatrix


class Cdist(UserCell):
    """Distances to centres: torch.func.vmap differentiates cdist wrongly, without an error."""

    def __init__(self) -> None:
        super().__init__()
        self.centres, self.layer = parameter(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        distances = torch.cdist(s[:, None], self.centres[None].expand(s.shape[0], -1, -1))[:, 0]
        return torch.tanh(self.layer(torch.exp(-distances)) + self.input(x))


class CdistBare(UserCell):
    """The same without a layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = parameter(2, 2)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        distances = torch.cdist(s.view(-1, 2, 2), self.centres[None].expand(s.shape[0], -1, -1))
        return torch.tanh(distances.flatten(1) + self.input(x))


class GatedSum(torch.autograd.Function):
    """a tanh(w), whose backward looks at numbers."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(a, w)
        return a * w.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, w = ctx.saved_tensors
        if float(grads[0].abs().sum()) == 0.0:
            return torch.zeros_like(a), torch.zeros_like(w)
        return grads[0] * w.tanh(), (grads[0] * a * (1 - w.tanh() ** 2)).sum_to_size(w.shape)


class CustomFunction(UserCell):
    """A custom autograd function, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(4, 4), parameter(4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(GatedSum.apply(self.layer(s), self.gain) + self.input(x))  # type: ignore[operator]


class BranchOnState(UserCell):
    """A Python branch on one number of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), parameter(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        if bool(s[0, 0] > 0):
            return torch.tanh(self.input(x) + self.layer(s))
        return 0.9 * torch.tanh(self.input(x) + s @ self.other)


class BranchOnInput(LeftMatrix):
    """A branch that a batch of lanes never takes, but one lane alone would."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        factor = 2.0 if bool((x[:, 0] > 0).all()) else 1.0
        return torch.tanh(self.input(x) + factor * torch.einsum("ij,bj->bi", self.weight, s))


class DividedByBatch(LeftMatrix):
    """A cell that knows how many rows it is given."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(self.input(x) + torch.einsum("ij,bj->bi", self.weight, s) / x.shape[0])


class LaneCount(UserCell):
    """A cell that runs with a batch of two only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        assert x.shape[0] == 2, "made for two lanes"
        return torch.tanh(self.input(x) + self.layer(s))


class TopUnits(UserCell):
    """Only the most wanted units are written: which, depends on the data."""

    def __init__(self, size: int, active: int) -> None:
        super().__init__(size)
        self.layer, self.want, self.active = nn.Linear(size, size), nn.Linear(WIDTH, size), active

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        wanted = self.want(x)
        chosen = torch.zeros_like(wanted).scatter(1, wanted.topk(self.active, -1).indices, 1.0)
        return s + chosen * torch.sigmoid(wanted) * (torch.tanh(self.input(x) + self.layer(s)) - s)


class MostlyDead(UserCell):
    """ReLU units of which few are active at a time."""

    def __init__(self) -> None:
        super().__init__(20)
        self.layer = nn.Linear(20, 20)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return torch.relu(self.input(x) + self.layer(s) - 0.7) + 0.3 * s


class OpensLater(UserCell):
    """Two paths are closed until an input exceeds 2: the first windows do not show them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.late = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        door = torch.relu(x[:, :1] - 2.0)
        return torch.tanh(self.input(x) + self.layer(s) + door * self.late(s.flip(-1))) + door * s.roll(1, -1)


class OtherBranchLater(UserCell):
    """From the first large input on, another layer is used: another set of parameters, other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.wide, self.back = nn.Linear(4, 4), nn.Linear(4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        if bool((x[:, 0] > 2.0).any()):
            return torch.tanh(self.input(x) + self.back(torch.tanh(self.wide(s))))
        return torch.tanh(self.input(x) + self.layer(s))


class InnerGradient(UserCell):
    """A step down an energy, whose gradient is taken inside the cell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        with torch.enable_grad():
            s = s if s.requires_grad else s.detach().requires_grad_()
            energy = (self.layer(torch.tanh(s)) - self.input(x)).square().sum()
            (slope,) = torch.autograd.grad(energy, s, create_graph=True)
        return s - 0.1 * slope


class Checkpointed(UserCell):
    """A step that is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return checkpoint(lambda a, b: torch.tanh(self.input(a) + self.layer(b)), x, s, use_reentrant=False)
