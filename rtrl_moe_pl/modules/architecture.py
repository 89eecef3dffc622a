"""Whether the parameters of a checkpoint are those of a module, told apart before torch loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from rtrl_moe_pl.modules.naming import some

ARCHITECTURE = "rtrl_moe_pl_architecture"


def architecture_of(module: nn.Module) -> dict[str, str]:
    """Classes of the parts, and what they say of themselves that the shapes of their parameters do not tell."""
    found: dict[str, str] = {}
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            found[name] = type(child).__name__
            options = getattr(child, "architecture", dict)()
            found |= {f"{name}.{option}": str(value) for option, value in options.items()}
    return found


def check_architecture(
    module: nn.Module, checkpoint: Mapping[str, Any], part: str = "", what: str = "--ckpt_path: the checkpoint"
) -> None:
    """Compare a checkpoint's parameters with the module's.

    Args:
        part: only those whose name begins so.
        what: holds the checkpoint, in the user's words.

    Raises:
        ValueError: if they differ, in one line.
    """
    here, there = architecture_of(module), checkpoint.get(ARCHITECTURE, {})
    differing = [
        f"{name} is {there[name]} there and {here[name]} here"
        for name in here
        if name.startswith(part) and there.get(name, here[name]) != here[name]
    ]
    ours, saved = (
        {name: list(value.shape) for name, value in state.items() if name.startswith(part)}
        for state in (module.state_dict(), checkpoint["state_dict"])
    )
    differing += [
        f"{name} is {saved.get(name, 'missing')} there and {ours.get(name, 'missing')} here"
        for name in sorted(ours.keys() | saved.keys())
        if ours.get(name) != saved.get(name)
    ]
    if differing:
        raise ValueError(
            f"{what} is of another architecture than the model configured here: {some(differing)}; configure the model "
            "it was made with, which is in the config.yaml of its run"
        )
