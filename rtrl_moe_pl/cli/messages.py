"""Errors in one line: which key, what it got, what it needs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser
from torch import nn

_TREE = re.compile(r'Parser key "|Does not validate against any of|is not accepted|unrecognized arg|not accept option')
_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)')
_OF_CALLABLE = re.compile(r"Type \S.* expects a function or a callable class: ")
_WHOLE = re.compile(r"\. Got value: Namespace\(class_path=.*")
_CLASS = re.compile(r"Problem with given class_path '([^']+)':|.*Got value: Namespace\(class_path='([^']+)'")
_NOISE = re.compile(
    r"Does not validate against any of|Subtypes: |Errors:|Given value type: |Expected (?:a )?<class 'NoneType'>|"
    r"Problem with given class_path|Expected a path but |Subclass types expect one of|$"
)
_GIVEN = re.compile(r"Given value: (?:NestedArg\(key='[^']*', val='?(.*?)'?\)$|(.*))")
_UNKNOWN = re.compile(
    r"Option '([^']+)' is not accepted|unrecognized arguments: -*([\w.]+)|not accept option '([^']+)'"
)
_EXPECTED = re.compile(r"Expected (?:an? )?(?:<class '([^']+)'>|typing\.(\S.*?))(?:\. Got value: (.*))?$")
_NO_OBJECT = re.compile(r"No module named|.*has no attribute|.*cannot import name")
_NO_CLASS_GIVEN = re.compile(
    r"Not a valid subclass of|Expected an instantiatable class|Option 'class_path' is not accepted"
)
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_TYPES = {"collections.abc.Sequence": "a list", "collections.abc.Mapping": "keys and values"}
_NO_CLASS = re.compile(r"Expected a dot import path string: (.*)")
_NO_YAML = re.compile(r"(?:Problems parsing config: |Unexpected config: *)(.*)", re.DOTALL)


def one_line(error: BaseException) -> str:
    """What an error says, in one line.

    The parser's own messages are trees, with a branch for every type a value was tried as: the first branch is the
    one that was meant.
    """
    text = _OF_CALLABLE.sub("", str(error).strip())
    if not text:
        return type(error).__name__
    if found := _NO_YAML.match(text):
        return (
            f"--config: the file is not a YAML mapping of keys to values: {' '.join(found[1].split()) or 'it is empty'}"
        )
    if not _TREE.search(text):
        return " ".join(text.split())
    keys: list[str] = []
    owner = given = None
    causes: list[str] = []
    other = False
    for line in text.splitlines():
        line = line.strip().removeprefix("- ")
        if key := _KEY.match(line):
            if causes:  # another branch
                break
            keys.append(key[1])
            line = key[2]
        if found := _CLASS.match(line):
            other = bool(causes)  # the next branch of a union
            owner = owner if other else found[1] or found[2]
        line = _WHOLE.sub("", line)
        if found := _GIVEN.match(line):
            given = found[1] or found[2]
            break
        if not other and not _NOISE.match(line):
            causes.append(line)
    return _sentence(".".join(keys), causes, owner, given) or " ".join(text.split())


def _sentence(path: str, causes: list[str], owner: str | None, given: str | None) -> str:
    expected: list[re.Match[str]] = []
    for cause in causes:
        if found := _EXPECTED.match(cause):
            expected.append(found)
            continue
        if _NO_CLASS_GIVEN.match(cause):
            return f"{path}: needs the name of a class, or class_path and init_args and no other key, got {given}"
        if _NO_OBJECT.match(cause):
            cause, _, name = cause.partition(". Got value: ")
            return f"{path}: cannot import {name or owner}: {cause}"
        if missing := _REQUIRED.match(cause):
            return f"{path}: {missing[1]} is missing" + (f": {_takes(owner)}" if owner else "")
        if unknown := _UNKNOWN.search(cause):
            key = ".".join(filter(None, [path, unknown[1] or unknown[2] or unknown[3]]))
            return f"unknown key {key}" + (f": {_takes(owner)}" if owner else "")
        if missing := _NO_CLASS.search(cause):
            if expected:  # a class would have done, too
                continue
            names = _imported(owner, path.rsplit(".", 1)[-1]) or "the name of an imported one"
            return f"{path}: there is no class {missing[1]} for it: give {names}, or the full path of another"
        return ": ".join(filter(None, [path, cause]))  # a class's own words
    types = " or ".join(_readable(found[1] or found[2]) for found in expected)
    return f"{path}: needs {types}, got {expected[0][3] or given}" if expected else path


def _readable(name: str) -> str:
    """The name of a type, for those who write YAML."""
    return _TYPES.get(name, f"one of {name[8:-1]}" if name.startswith("Literal[") else name)


def _takes(class_path: str) -> str:
    """Names of the arguments that a class can be configured with."""
    module, name = class_path.rsplit(".", 1)
    found = ArgumentParser().add_class_arguments(getattr(import_module(module), name), fail_untyped=False)
    return f"{name} takes {', '.join(found)}"


def _imported(owner: str | None, key: str) -> str:
    """Names of the classes that an argument of a class takes; "" if they are not known, or any module will do."""
    if owner is None:
        return ""
    module, name = owner.rsplit(".", 1)
    try:
        hint = get_type_hints(getattr(import_module(module), name).__init__).get(key)
    except NameError:  # imported for type checkers alone
        return ""
    return ", ".join(sorted({found.__name__ for base in _bases(hint) for found in _concrete(base)}))


def _bases(hint: Any) -> list[type]:
    """The classes of a type hint: for a callable, of what it returns."""
    if isinstance(hint, type):
        return [hint] if hint not in (nn.Module, type(None)) else []
    parts = get_args(hint)[-1:] if get_origin(hint) is Callable else get_args(hint)
    return [base for part in parts for base in _bases(part)]


def _concrete(base: type) -> Iterator[type]:
    """Subclasses of a class, and itself, that can be made."""
    if not inspect.isabstract(base) and not base.__name__.startswith("_"):
        yield base
    for derived in base.__subclasses__():
        yield from _concrete(derived)
