"""Ordered products over any range of the latest items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.cells.base import at_least


class CircularSegmentTree:
    """The last ``capacity`` items of a sequence, and what they combine to over any range, in O(log capacity).

    Index 0 is the oldest item kept. Products are taken in the order of the items, never across the place where the
    newest stands beside the oldest.

    Args:
        capacity: items kept, at least 1; one more drops the oldest.
        combine: ``combine(later, earlier)``, associative; it need not commute. For tensors it must take any leading
            dimensions, as ``torch.matmul`` does.
        identity: ``combine(identity, x) == combine(x, identity) == x``; a tensor that items' shape broadcasts, or any
            object if the items are none.

    Cost: append and query O(log capacity) combinations; memory 2 to 4 capacity items.
    """

    def __init__(self, capacity: int, combine: Callable[[Any, Any], Any], identity: Any) -> None:
        self.capacity = at_least(1, "capacity", capacity)
        self.combine = combine
        self.identity = identity
        self._size = 1 << (capacity - 1).bit_length()  # leaves: node self._size + place
        self._nodes: Any = None  # [2 size, ..] or a list; node 0 is always the identity
        self._first = self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, item: Any) -> None:
        """Add the newest item (a copy of it); drops the oldest when full.

        Raises:
            ValueError: if a tensor's shape differs from the first item's.
        """
        if self._nodes is None:
            self._nodes = self._empty(item)
        if isinstance(item, Tensor) and item.shape != self._nodes.shape[1:]:
            raise ValueError(f"an item of shape {tuple(item.shape)} among items of {tuple(self._nodes.shape[1:])}")
        if self._count == self.capacity:
            self._first = (self._first + 1) % self.capacity
        else:
            self._count += 1
        node = self._size + (self._first + self._count - 1) % self.capacity
        self._nodes[node] = item
        while node > 1:
            node //= 2
            self._nodes[node] = self.combine(self._nodes[2 * node + 1], self._nodes[2 * node])

    def __getitem__(self, index: int) -> Any:
        """An item, 0 the oldest, without a combination.

        Raises:
            IndexError: unless 0 <= index < len.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"no item {index} among {self._count}: needs 0 <= index < length")
        return self._nodes[self._size + (self._first + index) % self.capacity]

    def query(self, start: int | Tensor, stop: int | Tensor) -> Any:
        """``combine(.., combine(item[start + 1], item[start]))`` up to ``stop``, exclusive; an empty range's identity.

        Args:
            start, stop: two numbers; or index tensors [B, ..] where items are [B, ..], the range of each lane's own
                items: ``query(start, stop)[b, e]`` is ``query(start[b, e], stop[b, e])[b]``. A number counts for all.

        Raises:
            IndexError: unless 0 <= start <= stop <= len.
        """
        if isinstance(start, Tensor) or isinstance(stop, Tensor):
            device = self._nodes.device if isinstance(self._nodes, Tensor) else None
            limits = torch.as_tensor(start, device=device), torch.as_tensor(stop, device=device)
            return self._query_lanes(*torch.broadcast_tensors(*limits))
        if not 0 <= start <= stop <= self._count:
            raise IndexError(f"no range {start}..{stop} in {self._count} items: needs 0 <= start <= stop <= length")
        if self._nodes is None:
            return self.identity
        found = self._nodes[0]
        for begin, end in self._pieces(start, stop):
            found = self.combine(self._piece(begin, end), found)
        return found

    def reset(self, mask: Tensor | None = None) -> None:
        """Forget all items; or, where ``mask`` [B] is true, let all that lanes have become the identity.

        Raises:
            ValueError: if a mask is not one of the items' lanes.
        """
        if mask is None:
            self._nodes, self._first, self._count = None, 0, 0
        elif self._nodes is not None:
            if not isinstance(self._nodes, Tensor) or mask.shape != self._nodes.shape[1:2]:
                lanes = tuple(self._nodes.shape[1:2]) if isinstance(self._nodes, Tensor) else "none"
                raise ValueError(f"mask has shape {tuple(mask.shape)}, the items' lanes {lanes}")
            self._nodes[:, mask] = self._nodes[0, mask]

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, copied; items must be tensors."""
        items = {"items": torch.stack([self[i] for i in range(len(self))])} if len(self) else {}
        return items | {"first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, on the identity's device and of its type: bit for bit with this capacity.

        A smaller tree keeps the newest items.
        """
        self.reset()
        self._first = state["first"] % self.capacity
        for item in state.get("items", ()):
            self.append(item.to(self.identity))

    @property
    def nbytes(self) -> int:
        """Of tensors."""
        return self._nodes.nbytes if isinstance(self._nodes, Tensor) else 0

    def _empty(self, item: Any) -> Any:
        if not isinstance(item, Tensor):
            return [self.identity] * (2 * self._size)
        identity = torch.as_tensor(self.identity, dtype=item.dtype, device=item.device).expand_as(item)
        return identity.repeat(2 * self._size, *(1,) * item.ndim)

    def _pieces(self, start: Any, stop: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        """The places of a range, earlier and later part; the latter is what lies beyond the wrap."""
        begin, end, last = self._first + start, self._first + stop, self.capacity
        if isinstance(begin, Tensor):
            return (begin.clamp(max=last), end.clamp(max=last)), (
                (begin - last).clamp(min=0),
                (end - last).clamp(min=0),
            )
        return (min(begin, last), min(end, last)), (max(begin - last, 0), max(end - last, 0))

    def _piece(self, begin: int, end: int) -> Any:
        earlier = later = self._nodes[0]
        left, right = begin + self._size, end + self._size
        while left < right:
            if left % 2:
                earlier = self.combine(self._nodes[left], earlier)
                left += 1
            if right % 2:
                right -= 1
                later = self.combine(later, self._nodes[right])
            left, right = left // 2, right // 2
        return self.combine(later, earlier)

    def _query_lanes(self, start: Tensor, stop: Tensor) -> Tensor:
        if bool(((start < 0) | (start > stop) | (stop > self._count)).any()):
            raise IndexError(f"a range lies outside the {self._count} items: needs 0 <= start <= stop <= length")
        if not isinstance(self._nodes, Tensor):
            raise ValueError("index tensors need items that are tensors [B, ..], of which there are none yet")
        if start.shape[:1] != self._nodes.shape[1:2]:
            raise ValueError(f"index tensors [B, ..] for {self._nodes.shape[1]} lanes have shape {tuple(start.shape)}")
        lane = torch.arange(len(start), device=start.device).view(-1, *(1,) * (start.ndim - 1)).expand_as(start)
        zero = torch.zeros_like(start)
        found = self._nodes[zero, lane]
        for begin, end in self._pieces(start, stop):
            earlier = later = self._nodes[zero, lane]
            left, right = begin + self._size, end + self._size
            while bool((left < right).any()):
                odd = (left < right) & (left % 2 == 1)
                earlier = self.combine(self._nodes[torch.where(odd, left, 0), lane], earlier)
                left = left + odd.long()
                odd = (left < right) & (right % 2 == 1)
                right = right - odd.long()
                later = self.combine(later, self._nodes[torch.where(odd, right, 0), lane])
                left, right = left // 2, right // 2
            found = self.combine(self.combine(later, earlier), found)
        return found
