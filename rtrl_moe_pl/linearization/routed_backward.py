"""One step back in time of a routed cell: the rows of the slots it wrote are replaced, all others pass unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtrl_moe_pl.cells.routed import Routing
from rtrl_moe_pl.linearization.derivatives import StepDerivatives
from rtrl_moe_pl.linearization.window import copy_flushed
from rtrl_moe_pl.linearization.workspace import Workspace


class RoutedBackward:
    """By the written rows of ds'/ds, [W d, (R + W) d]: cotangents are changed in place.

    On the way are the cotangents of the new contents of the slots written, [B, W d, ..].
    """

    has_tap = False
    in_place = True

    def __init__(self, workspace: Workspace, capacity: int) -> None:
        self.workspace = workspace
        self.jacobians: list[Tensor] = []  # [B, W d, (R + W) d]
        self.flipped: list[Tensor] = []
        self.routings: list[Routing] = []  # of B rows
        self.written: list[Tensor] = []  # [B W] slots, numbered through all lanes
        self.touched: list[Tensor] = []  # [B (R + W)]

    def width(self, size: int) -> int:
        """Numbers on the way, per lane."""
        return self.jacobians[0].shape[1]

    def extend(self, derivatives: StepDerivatives, like: Tensor) -> None:
        assert derivatives.dense is not None
        assert derivatives.routing is not None
        routing = Routing(*(index.unflatten(0, (len(like), -1)) for index in derivatives.routing))
        self._extend(derivatives.dense.unflatten(0, (len(like), -1)), routing, like)

    def _extend(self, jacobians: Tensor, routing: Routing, like: Tensor) -> None:
        """Add k steps: [k, B, W d, (R + W) d], and the routing of [k, B]."""
        self.size, self.slot_size = like.shape[2], jacobians.shape[2] // routing.written.shape[2]
        first = torch.arange(like.shape[1], device=like.device)[:, None] * (self.size // self.slot_size)
        self.jacobians += jacobians.unbind(0)
        self.flipped += jacobians.transpose(2, 3).unbind(0)
        self.written += (routing.written + first).flatten(1).unbind(0)
        self.touched += (torch.cat([routing.read, routing.written], 2) + first).flatten(1).unbind(0)
        self.routings += map(Routing, *(index.unbind(0) for index in routing))

    def slots_used(self, started: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the steps wrote, [B, U], and what they read or wrote, [B, V]; None for all slots.

        A lane with fewer than others has some of the rest as well.

        Args:
            started: lanes [B] in which a start replaced all slots.
        """
        slots = self.size // self.slot_size

        def most(mask: Tensor) -> Tensor:
            return mask.byte().topk(int(mask.sum(1).max()), 1).indices

        mask = started[:, None].repeat(1, slots)
        mask.view(-1)[torch.cat(self.written)] = True
        written = most(mask)
        mask.scatter_(1, written, True)  # J is the identity for those that a lane has beyond its own
        mask.view(-1)[torch.cat(self.touched)] = True
        used = most(mask)
        return (
            None if written.shape[1] == slots else written,
            None if used.shape[1] == slots else used,
        )

    def state_dict(self) -> dict[str, Any]:
        routing = [torch.stack(indices) for indices in zip(*self.routings, strict=True)]
        return {"jacobians": torch.stack(self.jacobians), "routing": routing}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        routing = Routing(*(index.to(like.device) for index in state["routing"]))
        self._extend(state["jacobians"].to(like), routing, like)

    def states(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        assert out is not None
        written = self._take(t, later, out)
        copy_flushed(written, written)
        back = self.workspace.empty("back", (len(out), self.flipped[t].shape[1], out.shape[2]), out)
        torch.bmm(self.flipped[t], out, out=back)
        self._put(t, earlier, back)

    def add_loss(self, t: int, later: Tensor, earlier: Tensor, out: Tensor | None) -> None:
        assert out is not None
        later, out = later.transpose(1, 2), out.transpose(1, 2)  # [B, .., 1]
        self._take(t, later, out)
        carried = later.clone()
        self._put(t, carried, torch.bmm(self.flipped[t], out))
        earlier.add_(carried.transpose(1, 2))

    def _rows(self, cotangents: Tensor) -> Tensor:
        """[B, S, C] by slots, [B slots, d C]."""
        return cotangents.view(-1, self.slot_size * cotangents.shape[2])

    def _take(self, t: int, cotangents: Tensor, out: Tensor) -> Tensor:
        """Those of the slots written."""
        rows = self._rows(cotangents)
        return torch.index_select(rows, 0, self.written[t], out=out.view(-1, rows.shape[1]))

    def _put(self, t: int, cotangents: Tensor, back: Tensor) -> None:
        """Replace those of the slots written by what the step hands back to the slots it read and wrote."""
        rows = self._rows(cotangents)
        rows.index_fill_(0, self.written[t], 0.0)
        rows.index_add_(0, self.touched[t], back.view(-1, rows.shape[1]))
