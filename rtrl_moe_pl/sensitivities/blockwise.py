"""What representations that keep P in blocks of parameters share: which blocks there are, saving and restoring."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rtrl_moe_pl.linearization import Block, Term, WindowLinearization
from rtrl_moe_pl.linearization.window import unshared
from rtrl_moe_pl.sensitivities.base import Sensitivity


class BlockMatrix(Protocol):
    """P of some blocks, wherever it lies in memory."""

    blocks: Sequence[Block]

    def read(self, block: Block) -> Tensor:
        """A block in full, [B, columns, rows, S]; a copy."""
        ...

    def write(self, block: Block, whole: Tensor) -> None:
        """The inverse of ``read``."""
        ...

    def norms(self) -> list[Tensor]:
        """Of its parts, 0-dim each."""
        ...

    def zero_(self) -> None:
        """Set P to zero."""
        ...

    def scale_(self, factor: float) -> None:
        """Multiply P by a number."""
        ...

    @property
    def nbytes(self) -> int:
        """Of P."""
        ...


class BlockwiseSensitivity(Sensitivity):
    """P kept in blocks; one is allocated when a parameter of it is first reached, and costs nothing until then.

    Args:
        storage: type that P is kept in, by default ``dtype``. All is computed in ``dtype``; a narrower type rounds what
            is written, which is then no longer exact.
    """

    exact = True

    def __init__(self, *args: Any, storage: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.storage = storage or self.dtype
        self.exact = self.storage == self.dtype
        self._matrix = self._empty(())

    @abstractmethod
    def _empty(self, blocks: Iterable[Block]) -> BlockMatrix:
        """A matrix of these blocks, zero."""

    def contract(self, cotangent: Tensor, terms: Mapping[Block, list[Term]]) -> dict[str, Tensor]:
        self._cover(unshared(terms, self.shapes))
        return super().contract(cotangent, terms)

    def _require_lanes(self, linearization: WindowLinearization) -> None:
        lanes = len(linearization.transition)
        if lanes != self.batch_size:
            raise ValueError(
                f"a window of {lanes} lanes cannot advance an influence matrix of {self.batch_size}: "
                "the batch size must stay the same while influence is carried"
            )

    def _cover(self, blocks: Iterable[Block]) -> None:
        """Make room for blocks, taking along what their members already had elsewhere."""
        known = self._matrix.blocks
        new = [block for block in blocks if block not in known]
        if not new:
            return
        names = {member.name for block in new for member in block.members}
        kept = [block for block in known if not names & {m.name for m in block.members}]
        held = self._held()
        covered = names | {member.name for block in kept for member in block.members}
        alone = [Block.alone(name, self.shapes[name]) for name in held if name not in covered]
        self._fill([*kept, *alone, *new], held)

    def _fill(self, blocks: Iterable[Block], held: dict[str, Tensor]) -> None:
        """Begin anew with these blocks and the members' P [B, S, *shape] in ``held``; zero where it has none."""
        self._matrix = self._empty(())
        self._matrix = self._empty(blocks)
        for block in self._matrix.blocks:
            if any(member.name in held for member in block.members):
                whole = self._matrix.read(block)
                block.join(held, whole.permute(0, 3, 1, 2))
                self._matrix.write(block, whole)

    def _held(self) -> dict[str, Tensor]:
        """P of what has been reached, [B, S, *shape] each, as stored; copies."""
        held: dict[str, Tensor] = {}
        for block in self._matrix.blocks:
            held |= block.split(self._matrix.read(block).permute(0, 3, 1, 2), self.shapes)
        return held

    def to_dense(self) -> dict[str, Tensor]:
        held = {name: p.to(self.dtype) for name, p in self._held().items()}
        for name, shape in self.shapes.items():
            if name not in held:
                size = (self.batch_size, self.state_size, *shape)
                held[name] = torch.zeros(size, dtype=self.dtype, device=self.device)
        return held

    def norm(self) -> Tensor:
        norms = self._matrix.norms()
        return torch.stack(norms).norm() if norms else torch.zeros((), dtype=self.dtype, device=self.device)

    def zero_(self) -> None:
        self._matrix.zero_()

    def scale_(self, factor: float) -> None:
        self._matrix.scale_(factor)

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes

    def state_dict(self) -> dict[str, Any]:
        return {name: p.contiguous() for name, p in self._held().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave; that of another type is converted, with a warning."""
        super().load_state_dict(state)
        for name, value in state.items():
            expected = (self.batch_size, self.state_size, *self.shapes[name])
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"the saved influence of {name} has shape {tuple(value.shape)}, this run needs {expected}: "
                    "resume with the batch size and the model it was saved with"
                )
        kept = next((value.dtype for value in state.values()), self.storage)
        if kept != self.storage:
            names = (str(dtype).removeprefix("torch.") for dtype in (kept, self.storage))
            warnings.warn("the saved influence is kept in {}, this run's in {}: converted".format(*names), stacklevel=2)
        held = {name: value.to(self.device, self.storage) for name, value in state.items()}
        self._fill([Block.alone(name, self.shapes[name]) for name in held], held)
