"""Which classes and arguments an option takes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from torch import nn

from rtrl_moe_pl.modules import ManualModule
from rtrl_moe_pl.modules.optimization import UNUSABLE_CALLBACKS

PRECISIONS = "32-true", "64-true", "bf16-mixed"
# Bases, what takes other objects, and what cannot be stepped once per update; Muon takes no biases.
_NOT_OFFERED = {"Optimizer", "CombinedOptimizer", "SparseAdam", "LBFGS", "Muon"}
_NOT_OFFERED |= {"LRScheduler", "ReduceLROnPlateau", "SequentialLR", "ChainedScheduler"}
_NOT_OFFERED |= {cls.__name__ for cls in UNUSABLE_CALLBACKS} | {"GradientAccumulationScheduler"}


def takes(class_path: str) -> str:
    """Names of the arguments that a class can be configured with."""
    module, name = class_path.rsplit(".", 1)
    found = ArgumentParser().add_class_arguments(getattr(import_module(module), name), fail_untyped=False)
    return f"{name} takes {', '.join(found)}"


def no_class(owner: str | None, path: str, given: str) -> str:
    """What is said of a class that an option does not take, of the class that has it; None: of the command line."""
    names = _offered(owner, path) or "the name of an imported one"
    return f"{path}: there is no class {given} for it: give {names}, or the full path of another"


def _offered(owner: str | None, path: str) -> str:
    """Names of the classes that an option takes, ours first; "" if they are not known.

    Where any module will do, those of ours that the option's name stands for: readouts for a readout.
    """
    try:
        bases = _bases(_hint(owner, path))
    except NameError:  # imported for type checkers alone
        return ""
    if owner and not bases:
        place = f"{owner.rpartition('.')[0]}.{path.rpartition('.')[2]}"
        bases = [cls for cls in _concrete(nn.Module) if cls.__module__.startswith(place)]
    found = {cls for base in bases for cls in _concrete(base) if _public(cls) and not (owner is None and cls in bases)}
    found = {cls for cls in found if cls.__name__ not in _NOT_OFFERED}
    ordered = sorted(found, key=lambda cls: (not cls.__module__.startswith("rtrl_moe_pl."), cls.__name__))
    return ", ".join(dict.fromkeys(cls.__name__ for cls in ordered))


def _hint(owner: str | None, path: str) -> Any:
    """The type of an option, of the class that has it; None: of the command line."""
    if owner is None and not path.startswith("trainer."):
        return {"model": ManualModule, "data": LightningDataModule}.get(path)
    module, name = (owner or "lightning.pytorch.Trainer").rsplit(".", 1)
    return get_type_hints(getattr(import_module(module), name).__init__).get(path.rsplit(".", 1)[-1])


def _public(cls: type) -> bool:
    """Whether its package (a module that is in none: itself), or its module's list, offers the class."""
    package = sys.modules.get(cls.__module__.rpartition(".")[0] or cls.__module__)
    listed = getattr(sys.modules.get(cls.__module__), "__all__", ())
    return hasattr(package, cls.__name__) or cls.__name__ in listed


def _bases(hint: Any) -> list[type]:
    """The classes of a type hint: for a callable, of what it returns."""
    if isinstance(hint, type):
        return [hint] if hint is not nn.Module and hint.__module__ != "builtins" else []
    parts = get_args(hint)[-1:] if get_origin(hint) is Callable else get_args(hint)
    return [base for part in parts for base in _bases(part)]


def _concrete(base: type) -> Iterator[type]:
    """Subclasses of a class, and itself, that can be made."""
    if not inspect.isabstract(base) and not base.__name__.startswith("_"):
        yield base
    for derived in base.__subclasses__():
        yield from _concrete(derived)
