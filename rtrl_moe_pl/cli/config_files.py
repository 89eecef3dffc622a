"""Configuration files and keys: errors name the file and what is near, and what YAML or the parser drops is refused."""

from __future__ import annotations

import re
from argparse import ArgumentError, _SubParsersAction
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from rtrl_moe_pl.cli.messages import CONFIG, one_line

_UNRECOGNIZED = re.compile(r"unrecognized arguments: (--?([^\s=+]+)\+?)")
_OF_CLASS = {"class_path", "init_args", "dict_kwargs", "<<"}
# A default may be a string of a class of its own, such as Lightning's `Interval`: written as the string that it is.
yaml.SafeDumper.add_multi_representer(str, lambda dumper, value: dumper.represent_str(str.__str__(value)))


class ConfigParser(LightningArgumentParser):
    """Refuses keys that a file gives twice, of which the last would count, and unknown ones that are empty.

    Unknown keys are told from those that are near, in files and on the command line alike.

    Raises:
        TypeError: in one line, with the file's name; jsonargparse makes an error of its own of it.
    """

    _inner_parser = False  # jsonargparse's: whether it is of a class's options

    def parse_path(self, path: Any, *args: Any, **options: Any) -> Any:
        try:
            return super().parse_path(path, *args, **options)
        except UnicodeDecodeError as error:
            fault = f"not a text in UTF-8: {error}"
        except (ArgumentError, KeyError, RecursionError, TypeError, ValueError) as error:
            fault = one_line(error).removeprefix(f"{CONFIG}: ")
        raise TypeError(fault if fault.startswith(f"{CONFIG} ") else f"{CONFIG} {path}: {fault}")

    def parse_string(self, content: Any, *args: Any, **options: Any) -> Any:
        try:
            root = yaml.compose(content, yaml.SafeLoader)
        except yaml.YAMLError:  # the parser says what is wrong
            root = None
        if root is not None:
            require_plain(root)
            self._require_known(root)
        return super().parse_string(content, *args, **options)

    def parse_object(self, obj: Any, *args: Any, **options: Any) -> Any:
        """Options of a class: one that is empty, and that the class does not have, would be dropped."""
        if self._inner_parser and isinstance(obj, dict | Namespace):
            known = {action.dest.partition(".")[0] for action in self._actions}
            for key in obj.keys(branches=True) if isinstance(obj, Namespace) else obj:
                if str(key).partition(".")[0] not in known and obj[key] in ({}, Namespace()):
                    self.error(f"Option '{key}' is not accepted")  # in the parser's own words
        return super().parse_object(obj, *args, **options)

    def error(self, message: str, *args: Any) -> NoReturn:
        if not self._inner_parser and (found := _UNRECOGNIZED.match(message)):
            one_dash = not found[1].startswith("--") and found[2].partition(".")[0] in self._options()
            message = ("" if one_dash else self._unknown(found[2])) or f"{found[1]} is no option: give --{found[2]}"
        super().error(message, *args)

    def _require_known(self, root: yaml.Node, path: str = "") -> None:
        """Raise ValueError for a key that is no option and no part of one; classes check what is below theirs."""
        options = self._options()
        sections = {option.rpartition(".")[0] for option in options} - {""}
        for key, _, value in _entries(root):
            here = f"{path}{key}".rstrip("+")
            whole = here in options or here.split(".")[0] in options - sections or key.startswith(("$", "<<"))
            if here in sections:
                self._require_known(value, f"{here}.")
            elif not whole:
                raise ValueError(self._unknown(here))

    def _options(self) -> set[str]:
        actions = self._actions
        commands = [name for action in actions if isinstance(action, _SubParsersAction) for name in action.choices]
        options = {action.dest for action in actions if not action.dest.endswith("help")}
        return {*options, *commands} - {"print_config", "print_shtab", "subcommand"}

    def _unknown(self, key: str) -> str:
        """What is said of a key that is no option: its first part that is none, and what it can have meant."""
        path, before = "", " before the command" if self._subparsers else ""
        for part in key.split("."):
            beside = sorted({o[len(path) :].partition(".")[0] for o in self._options() if o.startswith(path)})
            if part not in beside:
                near = get_close_matches(part, beside)
                fix = f"did you mean {' or '.join(near)}?" if near else f"give one of {', '.join(beside)}"
                return f"unknown key {path}{part}{before}: {fix if beside else f'{path[:-1]} takes no keys'}"
            path = f"{path}{part}."
        return ""


def require_plain(node: yaml.Node, path: str = "", above: tuple[yaml.Node, ...] = ()) -> None:
    """Raise ValueError for a key that a mapping within a YAML text gives twice, and for what has itself within it.

    And for a key beside class_path that is not one of a class: the parser would take it for an option.
    """
    if node in above:
        raise ValueError(f"line {node.start_mark.line + 1} has an alias of itself within it: write out what is meant")
    lines: dict[str, int] = {}
    for key, line, value in _entries(node):
        if key in lines:
            raise ValueError(f"the key {key} is given twice, in line {lines[key]} and in line {line}: leave one out")
        lines[key] = line
        here = path if key == "init_args" else f"{path}.{key}".lstrip(".")
        require_plain(value, here, (*above, node))
    if "class_path" in lines and (beside := [key for key in lines if key not in _OF_CLASS]):
        fix = "did you mean init_args?" if get_close_matches(beside[0], ["init_args"]) else "options go into init_args"
        raise ValueError(f"unknown key {path}{'.' * bool(path)}{beside[0]} beside class_path: {fix}")
    for item in node.value if isinstance(node, yaml.SequenceNode) else ():
        require_plain(item, path, (*above, node))


def _entries(node: yaml.Node) -> Iterator[tuple[str, int, yaml.Node]]:
    """Keys that are plain values, with their lines, and what they stand for; none of what is no mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key.value, key.start_mark.line + 1, value
