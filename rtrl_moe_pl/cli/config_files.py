"""Configuration files: an error names its file, and what YAML or the parser takes without a word is refused."""

from __future__ import annotations

from argparse import ArgumentError, _SubParsersAction
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from rtrl_moe_pl.cli.messages import CONFIG, one_line


class ConfigParser(LightningArgumentParser):
    """Refuses keys that a file gives twice, of which the last would count, and unknown sections that are empty.

    Raises:
        TypeError: in one line, with the file's name; jsonargparse makes an error of its own of it.
    """

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

    def _require_known(self, root: yaml.Node, path: str = "") -> None:
        """Raise ValueError for a key that is no option and no part of one; classes check what is below theirs."""
        actions = self._actions
        commands = [name for action in actions if isinstance(action, _SubParsersAction) for name in action.choices]
        options = {action.dest for action in actions if not action.dest.endswith("help")}
        options = {*options, *commands} - {"print_config", "subcommand"}
        sections = {option.rpartition(".")[0] for option in options} - {""}
        for key, _, value in _entries(root):
            here = f"{path}{key}".rstrip("+")
            whole = here in options or here.split(".")[0] in options - sections or key.startswith(("$", "<<"))
            if here in sections:
                self._require_known(value, f"{here}.")
            elif not whole:
                beside = sorted(option[len(path) :] for option in options if option.rpartition(".")[0] == path[:-1])
                near = get_close_matches(key, beside)
                fix = f"did you mean {' or '.join(near)}?" if near else f"give one of {', '.join(beside)}"
                raise ValueError(f"unknown key {here}{' before the command' * bool(commands)}: {fix}")


def require_plain(node: yaml.Node, above: tuple[yaml.Node, ...] = ()) -> None:
    """Raise ValueError for a key that a mapping within a YAML text gives twice, and for what has itself within it."""
    if node in above:
        raise ValueError(f"line {node.start_mark.line + 1} has an alias of itself within it: write out what is meant")
    lines: dict[str, int] = {}
    for key, line, value in _entries(node):
        if key in lines:
            raise ValueError(f"the key {key} is given twice, in line {lines[key]} and in line {line}: leave one out")
        lines[key] = line
        require_plain(value, (*above, node))
    for item in node.value if isinstance(node, yaml.SequenceNode) else ():
        require_plain(item, (*above, node))


def _entries(node: yaml.Node) -> Iterator[tuple[str, int, yaml.Node]]:
    """Keys that are plain values, with their lines, and what they stand for; none of what is no mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key.value, key.start_mark.line + 1, value
