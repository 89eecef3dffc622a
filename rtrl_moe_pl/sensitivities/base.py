"""What carries the influence of the past: P = ds/dtheta, in whatever representation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rtrl_moe_pl.linearization import Block, Term, WindowLinearization
from rtrl_moe_pl.linearization.window import add_parts, gradient_of


class Sensitivity(ABC):
    """An implicit influence matrix P [B, S, |theta|]: read by ``vjp``, then written by ``advance``.

    Args:
        shapes: shape of every parameter it covers, by name.
        batch_size: lanes B.
        state_size: S.
        dtype, device: of the numbers kept.
    """

    exact: bool
    algorithm: ClassVar[str]  # whose representation it is, for people

    def __init__(
        self,
        shapes: dict[str, torch.Size],
        batch_size: int,
        state_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes = shapes
        self.batch_size = batch_size
        self.state_size = state_size
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Contract with a cotangent of the state.

        Args:
            cotangent: [B, S].

        Returns:
            gradient by parameter name, each of the parameter's shape, summed over the lanes.
        """

    @abstractmethod
    def advance(self, linearization: WindowLinearization) -> None:
        """Carry P over one window, P <- J P + M."""

    def contract(self, cotangent: Tensor, terms: Mapping[Block, list[Term]]) -> dict[str, Tensor]:
        """A loss's whole gradient: what it hands back to the state P is of, and its own part inside the window.

        Args:
            cotangent: dL/ds_start, [B, S].
            terms: of the window, see ``WindowLinearization``; only their gradients are used.
        """
        gradients = gradient_of(terms, self.shapes, cotangent)
        add_parts(self.vjp(cotangent), gradients)
        return gradients

    def contract_and_advance(self, linearization: WindowLinearization) -> dict[str, Tensor]:
        """``contract``, then ``advance``.

        The two accesses to P in the only right order. A representation may join them to pass over P once.
        """
        gradients = self.contract(linearization.cotangent, linearization.terms)
        self.advance(linearization)
        return gradients

    @abstractmethod
    def to_dense(self) -> dict[str, Tensor]:
        """P by parameter name, each [B, S, *shape]. For tests and diagnostics: it copies."""

    @abstractmethod
    def norm(self) -> Tensor:
        """Frobenius norm of P, a 0-dim tensor."""

    @abstractmethod
    def zero_(self) -> None:
        """Forget every influence: P = 0."""

    @abstractmethod
    def scale_(self, factor: float) -> None:
        """Multiply every influence, P <- factor P; ``zero_`` forgets it."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of P as held now."""

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors by parameter name (empty when nothing is held)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        unknown = sorted(set(state) - set(self.shapes))
        if unknown:
            raise ValueError(f"the saved influence covers {unknown[0]!r}, which this cell does not have")


class ZeroSensitivity(Sensitivity):
    """P held at zero: the past before the window is a constant (BPTT over a whole sequence, TBPTT).

    Exact only when every window begins at a start.
    """

    exact = False
    algorithm = "TBPTT"

    def vjp(self, cotangent: Tensor) -> dict[str, Tensor]:
        return {}

    def advance(self, linearization: WindowLinearization) -> None:
        return None

    def to_dense(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros(self.batch_size, self.state_size, *shape, dtype=self.dtype, device=self.device)
            for name, shape in self.shapes.items()
        }

    def norm(self) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.device)

    def zero_(self) -> None:
        return None

    def scale_(self, factor: float) -> None:
        return None

    @property
    def nbytes(self) -> int:
        return 0
