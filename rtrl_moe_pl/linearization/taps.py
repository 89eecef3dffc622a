"""Find where a cell meets its parameters: the outputs ("taps") of affine maps, look-ups and scalings.

A step of the cell is run once under a function mode that sees every torch function, however it was reached (module,
functional or operator). Where a parameter is met in a form with known factors, the output is recorded, and cut from
the graph: what is then differentiated is the cell between its taps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rtrl_moe_pl.cells.experts import expert_linear


@dataclass
class Tap:
    """One meeting with parameters: ``output = input W^T + b``; a look-up ``W[ids]``; or a bias alone.

    ``output`` is [N, .., rows]; ``input`` [N, .., columns], or integer ids [N, ..] for a look-up, or None. With
    ``experts`` [N, A] the parameters are banks, of which output [N, A, rows] met those experts.
    """

    output: Tensor
    input: Tensor | None
    weight: str | None
    bias: str | None
    transposed: bool = False  # the weight is stored [columns, rows]
    version: int = 0  # of the input when it was met
    experts: Tensor | None = None

    @property
    def is_unchanged(self) -> bool:
        """Whether the input still holds what the parameters met (it may have been changed in place)."""
        return self.input is None or self.input._version == self.version

    @property
    def is_lookup(self) -> bool:
        return self.input is not None and not self.input.is_floating_point()

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must stay the same from window to window for a plan to hold."""
        kind = (self.transposed, self.is_lookup, self.experts is not None)
        return self.weight, self.bias, kind, self.output.shape[1:]


_MATMULS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


def _rnn(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def step(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None):
        return activation(F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h))

    return step


def _gru(
    x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
) -> Tensor:
    x_r, x_z, x_n = F.linear(x, w_x, b_x).chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, w_h, b_h).chunk(3, -1)
    reset, update = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    new = torch.tanh(x_n + reset * h_n)
    return new + update * (h - new)


def _lstm(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = (F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


# fused steps of torch.nn cells, opened so that their affine maps are seen
_FUSED: dict[Any, Callable[..., Any]] = {
    torch.rnn_tanh_cell: _rnn(torch.tanh),
    torch.rnn_relu_cell: _rnn(torch.relu),
    torch.gru_cell: _gru,
    torch.lstm_cell: _lstm,
}


@dataclass
class TapRecorder:
    """Records, and cuts, the taps of one evaluation over N rows.

    Args:
        names: parameter names by ``id`` of the tensor; only these are looked for.
        rows: N, the leading dimension that marks a per-row tensor.
        cut: replace each output by a leaf, or leave the graph whole.
    """

    names: dict[int, str]
    rows: int
    cut: bool
    taps: list[Tap] = field(default_factory=list)

    def run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Call ``function(*args)`` with every torch function seen."""
        with _Mode(self):
            return function(*args)

    def per_row(self, name: str, parameter: Tensor, output_ndim: int | None = None) -> Tensor:
        """A copy of a parameter for every row, as a leaf: its cotangent is then the row's own."""
        ndim = parameter.ndim + 1 if output_ndim is None else output_ndim
        shape = (self.rows, *(1,) * (ndim - 1 - parameter.ndim), *parameter.shape)
        leaf = parameter.detach().expand(shape).clone().requires_grad_()
        self.taps.append(Tap(leaf, None, None, name))
        return leaf

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function's result, through its tap where it has one."""
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func is F.linear:
            return self._affine(func, args, kwargs, *_bind(("input", "weight", "bias"), args, kwargs))
        if func in _MATMULS and len(args) == 2 and not kwargs:
            return self._affine(func, args, kwargs, args[0], args[1], None, transposed=True)
        if func in (torch.addmm, Tensor.addmm) and len(args) == 3 and not kwargs:
            return self._affine(func, args, kwargs, args[1], args[2], args[0], transposed=True)
        if func is F.embedding and not _special_lookup(args, kwargs):
            return self._lookup(func, args, kwargs)
        if func is F.layer_norm:
            return self._layer_norm(func, args, kwargs)
        if func is expert_linear:
            return self._experts(args, kwargs)
        if func in _FUSED:
            with _Mode(self):
                return _FUSED[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _name(self, value: Any) -> str | None:
        return self.names.get(id(value)) if isinstance(value, Tensor) else None

    def _record(
        self, output: Tensor, source: Tensor | None, weight: str | None, bias: str | None, flip: bool
    ) -> Tensor:
        if self.cut or not output.requires_grad:
            output = output.detach().requires_grad_()
        self.taps.append(Tap(output, source, weight, bias, flip, 0 if source is None else source._version))
        return output.clone()  # the cell may change it in place

    def _affine(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        source: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool = False,
    ) -> Tensor:
        output = func(*args, **kwargs)
        weight_name, bias_name = self._name(weight), self._name(bias)
        fits = weight_name is not None and weight.ndim == 2 and source.ndim >= 2 and source.shape[0] == self.rows
        whole_bias = bias is None or (bias_name is not None and bias.shape == output.shape[-1:])
        if fits and whole_bias and (not self.cut or source.is_floating_point()):
            return self._record(output, source, weight_name, bias_name, transposed)
        return output

    def _lookup(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        ids, weight = _bind(("input", "weight"), args, kwargs)
        output = func(*args, **kwargs)
        name = self._name(weight)
        if name is not None and ids.ndim >= 1 and ids.shape[0] == self.rows:
            return self._record(output, ids, name, None, False)
        return output

    def _experts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        source, weight, bias, experts = _bind(("input", "weight", "bias", "experts"), args, kwargs)
        names = self._name(weight), self._name(bias)
        if names[0] is None or (bias is not None and names[1] is None) or len(source) != self.rows:
            return expert_linear(source, weight, bias, experts)
        # what is recorded needs no graph to its parameters
        output = expert_linear(source, weight.detach(), None if bias is None else bias.detach(), experts)
        source = source.expand(-1, experts.shape[1], -1)
        output = self._record(output, source, *names, False)
        self.taps[-1].experts = experts
        return output

    def _layer_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        source, shape, weight, bias, eps = _bind(names, args, kwargs, eps=1e-5)
        known = all(p is None or self._name(p) is not None for p in (weight, bias))
        if not known or source.shape[0] != self.rows or len(shape) != 1:
            return func(*args, **kwargs)
        output = func(source, shape, None, None, eps)
        if weight is not None:
            output = output * self.per_row(self.names[id(weight)], weight, source.ndim)
        if bias is not None:
            output = output + self.per_row(self.names[id(bias)], bias, source.ndim)
        return output


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], **defaults: Any) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name, defaults.get(name)) for name in names]


def _special_lookup(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    _, _, padding, max_norm, _, scale, _ = _bind(names, args, kwargs)
    return padding is not None or max_norm is not None or bool(scale)


class _Mode(TorchFunctionMode):
    def __init__(self, recorder: TapRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return self.recorder.see(func, args, kwargs or {})
