"""Optimizers of the reasoning models, in plain torch, and several optimizers stepped as one."""

from __future__ import annotations

# pyright: reportPrivateImportUsage=false
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from rtrl_moe_pl.cells.base import not_negative


class AdamATan2(Optimizer):
    """Adam without epsilon: p <- p (1 - lr weight_decay) - lr a atan2(m, b sqrt(v)), m and v with bias correction.

    Steps do not depend on the scale of the gradient, and none is larger than lr a pi / 2. With a = 1.27 (4 / pi)
    and b = 1 the step is lr where abs(m) = sqrt(v), as Adam's; the CUDA extension that TRM was trained with has a = 1,
    so its learning rate of 1e-4 is 8e-5 here.

    Args:
        params: as of every torch optimizer; those without a gradient are skipped.
        lr: learning rate.
        betas: decays of the averages m of the gradient and v of its square.
        weight_decay: decoupled, as AdamW's.
        a: scale of the step.
        b: scale of sqrt(v): the larger, the more the step is linear in the gradient.

    Raises:
        ValueError: if an option is out of its range.
    Cost: two tensors of state and two temporary ones per parameter; one kernel per operation for all parameters of a
        group, except one each for atan2.
    References: Everett et al. 2024, arXiv 2407.05872.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        a: float = 1.27,
        b: float = 1.0,
    ) -> None:
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {betas}")
        for name, scale in (("a", a), ("b", b)):
            if not 0 < scale < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {scale}")
        not_negative("lr", lr)
        not_negative("weight_decay", weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "a": a, "b": b})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = _evaluate(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._move(params, [p.grad for p in params], group)
        return loss

    def _move(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        for state, p in zip(states, params, strict=True):
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
        lr, (beta1, beta2) = group["lr"], group["betas"]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        # atan2(c x, c y) = atan2(x, y): both bias corrections fall on the denominator
        scales = [group["b"] * (1 - beta1 ** state["step"]) / math.sqrt(1 - beta2 ** state["step"]) for state in states]
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_mul_(denominators, scales)
        angles = [torch.atan2(mean, denominator) for mean, denominator in zip(means, denominators, strict=True)]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, angles, alpha=-lr * group["a"])


class SignSGD(Optimizer):
    """Sign descent of the rows that have a gradient: p <- p (1 - lr weight_decay) - lr sign(gradient).

    For tables of puzzle embeddings, of which a batch sees few: the other rows neither move nor decay.

    Args:
        params: tables [N, ...]; a vector or scalar is one row.
        lr: learning rate.
        weight_decay: decoupled, as AdamW's.

    Raises:
        ValueError: if an option is out of its range.
    Cost: one pass over the gradient; no state.
    References: Bernstein et al. 2018, arXiv 1802.04434; the sparse form is that of HRM and TRM, arXiv 2510.04871.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-2, weight_decay: float = 0.1) -> None:
        not_negative("lr", lr)
        not_negative("weight_decay", weight_decay)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = _evaluate(closure)
        for group in self.param_groups:
            lr, decay = group["lr"], 1 - group["lr"] * group["weight_decay"]
            for p in group["params"]:
                if p.grad is not None:
                    rows, grads = torch.atleast_2d(p, p.grad)
                    seen = grads.flatten(1).any(1).nonzero().squeeze(1)  # [rows with a gradient]
                    rows[seen] = rows[seen] * decay - lr * grads[seen].sign()
        return loss


def parts_of(optimizer: Optimizer) -> Sequence[Optimizer]:
    """Those that it combines, or itself."""
    return optimizer.optimizers if isinstance(optimizer, CombinedOptimizer) else [optimizer]


class CombinedOptimizer(Optimizer):
    """Several optimizers as one, for Lightning, which counts one optimizer step per training step.

    Its ``param_groups`` are those of the members, and its ``state`` theirs, the very same objects: schedules act on
    the members, and checkpoints have torch's own format. From then on the members are stepped through it alone.

    Args:
        optimizers: at least one, of different parameters; stepped in this order.

    Raises:
        ValueError: if there is none, or two share a parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        if not optimizers:
            raise ValueError("optimizers: CombinedOptimizer needs at least one, got none")
        if not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
            raise TypeError("optimizers: CombinedOptimizer is made of optimizers, not of parameters: name one of them")
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = tuple(optimizers)
        for optimizer in optimizers:
            self.state.update(optimizer.state)
        self._share()

    def _share(self) -> None:
        start = 0
        for optimizer in self.optimizers:
            stop = start + len(optimizer.param_groups)
            optimizer.param_groups, optimizer.state = self.param_groups[start:stop], self.state
            start = stop

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = _evaluate(closure)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "optimizers"):  # no member would step it
            raise NotImplementedError("add the parameter group to one of the optimizers before combining them")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict comes here as well, with new groups and state
        self._share()


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    with torch.enable_grad():
        return None if closure is None else closure()
