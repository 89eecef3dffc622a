"""Losses summed over lanes and steps; the one division by the weight is in `training.update`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightedCrossEntropy(nn.Module):
    """sum over lanes and steps of weight * cross-entropy, in nats.

    outputs [B, k, classes], targets (labels [B, k] int64, weights [B, k]) -> 0-dim. Labels of weight 0 are not read.
    """

    def forward(self, outputs: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        labels, weights = targets
        losses = functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
        return torch.dot(losses, weights.flatten().to(losses.dtype))
