"""Comparison of states: nests of dicts, lists, tensors and numbers."""

from __future__ import annotations

from typing import Any

import torch


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nests differ in a bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differing(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differing(*pair, f"{path}/{i}")]
    nested = isinstance(a, dict | list | tuple)
    return [] if not nested and type(a) is type(b) and a == b else [path]
