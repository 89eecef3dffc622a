"""What autograd keeps of a computation until its way back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RECORD_BYTES = 1600  # of an operation and of the headers of its tensors; 1.5 to 1.9 kB on CPUs with torch 2


def graph_bytes(run: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the way back of what ``run`` computes: numbers, and records of operations.

    A tensor that is kept several times counts once, views as the whole that they are of.
    """
    storages: dict[int, int] = {}
    records = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal records
        records += 1
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values()) + records * RECORD_BYTES
