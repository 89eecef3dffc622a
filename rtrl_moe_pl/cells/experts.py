"""A bank of experts in one parameter, and the product that meets only the chosen ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function


def expert_linear(input: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    """``weight[e] @ input + bias[e]`` for every row's chosen experts e.

    Use it wherever a cell meets a stacked bank: gradient algorithms that see this call keep the influence of each
    expert apart, and pay only for those that were chosen. It is overridable like torch's own functions.

    Args:
        input: [N, A, in], one vector an expert; or [N, 1, in], the same for all.
        weight: [E, out, in].
        bias: [E, out], or None.
        experts: [N, A] int64, those chosen.

    Returns:
        [N, A, out].
    Cost: N A out in multiply-adds, and a copy of the chosen weights.
    """
    arguments: tuple[Any, ...] = (input, weight, bias, experts)
    if has_torch_function(arguments):
        return handle_torch_function(expert_linear, arguments, input, weight, bias, experts)
    output = matvec(weight[experts], input.expand(-1, experts.shape[1], -1))
    return output if bias is None else output + bias[experts]


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` for every row: [.., out, in] and [.., in], of equal leading dimensions.

    Unlike ``torch.matmul`` it does not copy the matrices for each of several cotangents that ``vmap`` pulls back
    through it together.
    """
    return _MatrixVector.apply(matrix, vector)  # type: ignore[return-value]


class _MatrixVector(Function):
    @staticmethod
    def forward(matrix: Tensor, vector: Tensor) -> Tensor:
        return torch.matmul(matrix, vector.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None]:
        matrix, vector = ctx.saved_tensors
        by_matrix, by_vector = ctx.needs_input_grad
        return (
            cotangent.unsqueeze(-1) * vector.unsqueeze(-2) if by_matrix else None,
            matvec(matrix.transpose(-1, -2), cotangent) if by_vector else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], matrix: Tensor, vector: Tensor) -> tuple[Tensor, int]:
        """Many vectors for one matrix are one product with it."""
        matrix_dim, vector_dim = in_dims
        if vector_dim is None:
            vector = vector.expand(info.batch_size, *vector.shape)
        else:
            vector = vector.movedim(vector_dim, 0)
        if matrix_dim is None:
            return torch.matmul(matrix, vector.movedim(0, -1)).movedim(-1, 0), 0
        return matvec(matrix.movedim(matrix_dim, 0), vector), 0
