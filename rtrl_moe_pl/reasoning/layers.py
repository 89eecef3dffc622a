"""Blocks of recursive reasoning models: rotary attention or an MLP over positions, SwiGLU, parameter-free RMSNorm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rtrl_moe_pl.cells.base import positive

EPSILON = 1e-5  # of RMSNorm
HIDDEN_MULTIPLE = 256  # hidden widths of SwiGLU are rounded up to it, as in the published models


def rms_norm(x: Tensor) -> Tensor:
    """x / root mean square of its last axis; no parameters."""
    return functional.rms_norm(x, (x.shape[-1],), eps=EPSILON)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias, weights normal with standard deviation 1 / sqrt(inputs), cut at two of these."""
    layer = nn.Linear(inputs, outputs, bias=False)
    truncated_normal_(layer.weight, 1 / math.sqrt(inputs))
    return layer


def truncated_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill with normal numbers cut at twice their standard deviation, and scaled so that ``std`` is what is left."""
    kept = 0.8796256610342398  # standard deviation of a standard normal cut at -2 and 2
    with torch.no_grad():
        return nn.init.trunc_normal_(tensor, std=std / kept, a=-2 * std / kept, b=2 * std / kept)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x), without biases. Its hidden width is 2/3 expansion x width, rounded up.

    References: Shazeer 2020, "GLU variants improve transformer".
    """

    def __init__(self, width: int, expansion: float = 4.0) -> None:
        super().__init__()
        hidden = math.ceil(positive("expansion", expansion) * width * 2 / 3 / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
        self.gate_up = linear(width, 2 * hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # [.., width] -> [.., width]
        return _GatedDown.apply(self.gate_up(x), self.down.weight)


class _GatedDown(torch.autograd.Function):
    """W (silu(gate) * up) of [gate, up] [.., 2 h] and W [width, h].

    Autograd would keep silu(gate) and the product as well, half of a block's memory; they are cheap to make again.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, -1)
        return functional.linear(functional.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        sigmoid = gate.sigmoid()
        gated = gate * sigmoid
        of_weight = grad.flatten(0, -2).T @ (gated * up).flatten(0, -2)
        of_hidden = grad @ weight
        # silu' = sigmoid (1 + gate (1 - sigmoid)) = sigmoid + silu (1 - sigmoid)
        slope = torch.addcmul(sigmoid, gated, 1 - sigmoid).mul_(up)
        return torch.cat([slope.mul_(of_hidden), of_hidden.mul_(gated)], -1), of_weight


class Rotary(nn.Module):
    """Rotary position embedding of queries and keys.

    References: Su et al. 2021, arXiv 2104.09864.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, positions: int, base: float = 10000.0) -> None:
        super().__init__()
        if head_width % 2:
            raise ValueError(f"rotary positions need an even width per head, got {head_width}: change width or heads")
        frequency = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
        angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency  # [T, d/2]
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], -1).float(), persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [.., T, d] -> [.., T, d]
        half = x.shape[-1] // 2
        return torch.addcmul(x * self.cos, torch.roll(x, half, -1), self.sin)


class Attention(nn.Module):
    """Multi-head attention of all positions to all (not causal), without biases.

    Args:
        width: D, a multiple of ``heads``.
        heads: number of heads.
        rotary: applied to queries and keys; None: positions are not told apart here.
    """

    def __init__(self, width: int, heads: int, rotary: Rotary | None = None) -> None:
        super().__init__()
        require_heads(width, heads)
        self.heads = heads
        self.rotary = rotary
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; mask [B, T] bool: which positions may be attended to (None: all; at least one)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)  # [B, heads, 3, T, d]
        q, k, v = qkv.unbind(2)
        if self.rotary is not None:
            q, k = self.rotary(qkv[:, :, :2]).unbind(2)
        mask = None if mask is None else mask[:, None, None, :]
        return self.out(functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of queries to other positions, without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        require_heads(width, heads)
        self.heads = heads
        self.q = linear(width, width)
        self.kv = linear(width, 2 * width)
        self.out = linear(width, width)

    def forward(self, queries: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, Q, D], [B, T, D], mask [B, T] bool (None: all; at least one per row) -> [B, Q, D]."""
        q = self.q(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[:, None, None, :]
        return self.out(functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Mix over positions, then over channels; each added, then normalised (post-norm)."""

    def __init__(self, width: int, mixer: nn.Module, expansion: float = 4.0) -> None:
        super().__init__()
        self.mixer = mixer
        self.mlp = SwiGLU(width, expansion)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; mask [B, T] bool: which positions count (None: all)."""
        x = rms_norm(x + (self.mixer(x) if mask is None else self.mixer(x, mask)))
        return rms_norm(x + self.mlp(x))


class PositionMLP(nn.Module):
    """A SwiGLU over the axis of positions instead of attention: for short inputs of one fixed length."""

    def __init__(self, positions: int, expansion: float = 4.0) -> None:
        super().__init__()
        self.mlp = SwiGLU(positions, expansion)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, D]
        return self.mlp(x.transpose(1, 2)).transpose(1, 2)


def require_heads(width: int, heads: int) -> None:
    """Refuse a width that cannot be shared out between the heads."""
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width ({width}, decoder.width for encoders too), got {heads}")
