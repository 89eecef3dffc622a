"""Errors in one line: which key, what it got, what it needs."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from pydoc import locate as find
from typing import Any

from jsonargparse import Namespace
from torch.optim import Optimizer

from rtrl_moe_pl.cli.offers import PRECISIONS, no_class, takes

_TREE = re.compile(r'Parser key "|Does not validate against any of|is not accepted|unrecognized arg|not accept option')
_KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)')
_OF_CALLABLE = re.compile(r"Type \S.* expects a function or a callable class: ")
_WHOLE = re.compile(r"\. Got value: Namespace\(class_path=.*")
_CLASS = re.compile(r"Problem with given class_path '([^']+)':|.*Got value: Namespace\(class_path='([^']+)'")
_NOISE = re.compile(
    r"Does not validate against any of|Subtypes: |Errors:|Given value type: |Expected (?:a )?<class 'NoneType'>|"
    r"Problem with given class_path|Expected a path but |Subclass types expect one of|Import path (?!torch\.|does)|$"
)
_GIVEN = re.compile(r"Given value: (?:NestedArg\(key='[^']*', val='?(.*?)'?\)$|(.*))")
_UNKNOWN = re.compile(
    r"Option '([^']+)' is not accepted|unrecognized arguments: -*([\w.]+)|not accept option '([^']+)'"
)
_ONE_OF_A_LIST = re.compile(r"Subtypes: \[list\[(\S+)\], <class '\1'>.*\s+Errors:\s+- (Expected a <class 'list'>)")
_EXPECTED = re.compile(r"Expected (?:an? )?(?:<class '([^']+)'>|typing\.(\S.*?))(?:\. Got value: ?(.*))?$")
_NO_OBJECT = re.compile(r"No module named|(?:module|type object) .*has no attribute|.*cannot import name")
_NO_CLASS_GIVEN = re.compile(
    r"Not a valid subclass of|Expected an instantiatable class|Option 'class_path' is not accepted|"
    r"argument of type '\w+' is not iterable|unhashable type|.* has no attribute 'keys'"
)
_WORD = re.compile(r"unrecognized arguments: ([^-\s]\S*)")
_REQUIRED = re.compile(r"the following arguments are required: (.*)")
_OF_CLASS = re.compile(r"Namespace\(class_path='([^']+)'")
_OPTION = re.compile(r"--|(model|data|trainer|checkpoint)[.:]")  # at the beginning of a message that names its option
_TYPES = {"collections.abc.Sequence": "a list", "collections.abc.Mapping": "keys and values"}
_NO_CLASS = re.compile(
    r"Expected a dot import path string: ?(.*)|Import path (?:(torch\.\S+) )?does not correspond to a subclass|"
    r"Expected '(.+)' to be a subclass of|Multiple subclasses with name (ReduceLROnPlateau)\."
)
_NO_FIGURE = re.compile(  # callback, figure, and those that there are
    r"`(ModelCheckpoint)\(monitor='(.*?)'\)` could not find the monitored key .*?: \[(.*?)\]|"
    r"(Early) stopping conditioned on metric `(.*?)` which is not available.*: (.*)"
)
_BEGINS = re.compile(r"(\w+)(?=( \([^)]*\)| \+ \w+)?( must| has|=| '|:))")  # about an option: no prose
_INVALID = re.compile(r"Invalid (.+?)(?: values?| parameter at index \d)?: (.*)")  # torch's optimizers
_OPTIONS = {"learning rate": "lr", "epsilon": "eps", "beta": "betas", "eta": "etas"}
_RANGES = {
    "betas": "at least 0 and below 1",
    "rho": "at least 0 and at most 1",
    "etas": "one in (0, 1) and one above 1",
}
_LOST = re.compile(r"(gloo|NCCL|TCPStore).*([Cc]onnection|[Bb]roken pipe|[Tt]imed out|timeout|remote)", re.DOTALL)
_AT = r"(?:^|\n)[ -]*([\w. ()]+: |)"  # where in the configuration, at the beginning of a line
_NO_MEMORY = re.compile(
    _AT + r"(?:\[enforce fail .*tried to allocate (\d+) bytes|CUDA out of memory\b|Unable to alloc)"
)
_TOO_LARGE = re.compile(
    _AT + r"(.*(?:int too (?:big|large)|Overflow when unpacking|calculation overflowed|multiplication overflow).*)"
)
_NO_KEYS = re.compile(r"Parser key \"(\w+)\":\s*Unable to load config '(.*)'")
_HIDDEN = "\u200b"  # Namespace puts it before keys that are names of its methods, such as values
_LONG_NUMBER = re.compile(r"\d{30,}")
LONGEST = 600  # characters of a line
CONFIG = "--config"  # before what is said of one, and of its file
_NO_YAML = re.compile(r'(?:Parser key "config": )?(?:Problems parsing config: |Unexpected config: *)(.*)', re.DOTALL)


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = _OF_CALLABLE.sub("", str(error).strip())
    return shortened(_sentence_of(text) if text else type(error).__name__)


def place_of(error: BaseException) -> str:
    """Where in a user's own code it was raised, or what was called last of it; "" if none is behind the error."""
    others = {str(Path(__file__).parents[1]), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        own = Path(frame.filename).is_file() and not any(Path(frame.filename).is_relative_to(place) for place in others)
        if own:
            return f" (in {frame.name}, {frame.filename}, line {frame.lineno}; --debug shows the whole way)"
    return ""


def shortened(line: str) -> str:
    """The same with long numbers told by their digits, and the middle left out of what is still too long."""
    line = _LONG_NUMBER.sub(lambda found: f"{found[0][:6]}.. ({len(found[0])} digits)", line)
    half = LONGEST // 2 - 2
    return line if len(line) <= LONGEST else f"{line[:half]} .. {line[-half:]}"


def _sentence_of(text: str) -> str:
    """One line of what is said by the parser, by Lightning and by torch.

    The parser's own messages are trees, with a branch for every type a value was tried as: the first branch is the
    one that was meant.
    """
    if _LOST.search(text):
        return (
            "another process of this run has ended or no longer answers: its own error, if it left one, is above; "
            "go on with --ckpt_path last"
        )
    if text.startswith(f"{CONFIG} "):  # has been made one before the file was named
        return text
    if found := _NO_YAML.match(text):
        return f"{CONFIG}: not a YAML mapping of keys to values: {' '.join(found[1].split()) or 'it is empty'}"
    if found := _NO_FIGURE.match(text):  # Lightning's
        callback, figure, logged = (word for word in found.groups() if word is not None)
        names = ", ".join(sorted(name.strip("'`") for name in logged.split(", ")))
        callback = callback.replace("Early", "EarlyStopping")
        return f"trainer.callbacks: {callback}.monitor: nothing logs {figure}: give one of {names}"
    if found := _NO_MEMORY.search(text):  # torch's
        asked = f"{float(found[2]) / 1e9:.3g} GB" if found[2] else "memory"
        return f"{found[1]}{asked} was asked for at once, more than there is: make the model or its data smaller"
    if found := _TOO_LARGE.search(text):  # torch's
        return f"{found[1]}a number is too large for a size ({found[2]})"
    if found := _NO_KEYS.match(text):
        return f"{found[1]}: needs keys and values, got {found[2]}"
    if text.startswith("Checkpoint file not found: "):  # Lightning's, of a URL
        return f"--ckpt_path: {text}"
    if word := _WORD.match(text):
        return f"{word[1]} is no option: options begin with --"
    if missing := _REQUIRED.match(text):  # of the command itself
        needed = " and ".join(re.sub(r"\w+\.", "", missing[1]).split(", "))
        return f"no {needed} given: name a configuration that has them, --config FILE"
    if not _TREE.search(text):
        return " ".join(text.split())
    alone = _ONE_OF_A_LIST.search(text)
    if alone:  # what was meant is the second branch
        text = text.replace(alone[2], "Expected a <class 'NoneType'>", 1)
    keys: list[str] = []
    owner = given = None
    causes: list[str] = []
    other = nullable = False
    for line in text.splitlines():
        line = line.strip().removeprefix("- ")
        if key := _KEY.match(line):
            if causes:  # another branch
                break
            keys.append(key[1])
            line, nullable = key[2], False
        if (found := _CLASS.match(line)) and not _NO_CLASS.search(line):
            other = bool(causes)  # the next branch of a union
            owner = owner if other else found[1] or found[2]
        nullable |= line.startswith("Subtypes: ") and "NoneType" in line
        line = _WHOLE.sub("", line)
        if found := _GIVEN.match(line):
            given = found[1] or found[2]
            break
        if not other and not _NOISE.match(line):
            causes.append(line)
    path = ".".join(CONFIG if key == "config" else key for key in keys)
    how = f"; --{path}+=NAME adds one, --{path}.OPTION sets what it takes" if alone else ""
    return (_sentence(path, causes, owner, given, nullable) or " ".join(text.split())) + how


def _sentence(path: str, causes: list[str], owner: str | None, given: str | None, nullable: bool) -> str:
    expected: list[re.Match[str]] = []
    for cause in causes:
        if found := _EXPECTED.match(cause):
            expected.append(found)
            continue
        if _NO_CLASS_GIVEN.match(cause):
            wanted = "the name of a class, or class_path and init_args and no other key"
            return f"{path}: needs {wanted}" + (f", got {given}" if given else "")
        if _NO_OBJECT.match(cause):
            cause, _, name = cause.partition(". Got value: ")
            return f"{path}: cannot import {name or owner}: {cause}"
        if missing := _REQUIRED.match(cause):
            owner = found[1] if (found := _OF_CLASS.match(given or "")) else owner
            return f"{path}: {missing[1]} is missing" + (f": {takes(owner)}" if owner else "")
        if unknown := _UNKNOWN.search(cause):
            name = unknown[1] or unknown[2] or unknown[3]
            if get_close_matches(name.partition(".")[0], ["init_args"]):
                return f"unknown key {path}.{name.partition('.')[0]}: did you mean init_args?"
            key = ".".join(filter(None, [path, name]))
            return f"unknown key {key}" + (f": {takes(owner)}" if owner else "")
        if missing := _NO_CLASS.search(cause):
            if expected:  # a class would have done, too
                continue
            named = next((name for name in missing.groups() if name is not None), given)
            return no_class(owner, path, named or "''")
        return ": ".join(filter(None, [path, cause]))  # a class's own words
    if path == "trainer.precision":  # Lightning has more
        return f"{path}: needs one of {', '.join(PRECISIONS)}, got {given}"
    if not expected:
        return path
    got = expected[0][3] or given or "''"
    types = list(dict.fromkeys(_readable(found[1] or found[2]) for found in expected))
    if "float" in types and got.lower().strip(".+-") in ("nan", "inf", "infinity"):
        types = ["a finite number"]
    return f"{path}: needs {' or '.join(types + ['null'] * nullable)}, got {got}"


def _readable(name: str) -> str:
    """The name of a type, for those who write YAML."""
    return _TYPES.get(name, f"one of {name[8:-1]}" if name.startswith("Literal[") else name)


def of_trainer(message: str, config: Namespace) -> str:
    """What a Trainer that could not be made says, with the option that it says it of before it."""
    if _OPTION.match(message):
        return message
    words = re.findall(r"\w+", message)
    values = {value: key for key, value in vars(config).items() if isinstance(value, str)}
    named = [word for word in words if word in config] or [values[word] for word in words if word in values]
    return f"trainer{'.' * bool(named)}{next(iter(named), '')}: {message}"


class Maker:
    """Makes the objects of a configuration; their own errors say where in it they are.

    The command line is kept out of it: a model keeps it with its optimizer, and models are copied and pickled.

    Args:
        config: of the subcommand, without the options that others decide.
    """

    def __init__(self, config: Namespace) -> None:
        self.config = config

    def __call__(self, made: type, *args: Any, **options: Any) -> Any:
        try:
            return made(*args, **options)
        except Exception as error:
            locate(error, made, options, self.config)
            raise


def locate(error: Exception, made: type, given: dict[str, Any], config: Namespace) -> None:
    """Put before a class's own words where in the configuration it, or the option that they begin with, is.

    The class's name stands for the place if there are several that it can have been made from.

    Args:
        error: raised while an object of the configuration was made; changed in place.
        made: the class of that object.
        given: its arguments, by name.
        config: of the subcommand.
    """
    message = type(error).__name__ if not error.args else error.args[0] if len(error.args) == 1 else None
    if not isinstance(message, str) or _OPTION.match(message):  # one within it has been located already
        return
    if issubclass(made, Optimizer) and (words := _INVALID.match(message)):
        name = _OPTIONS.get(words[1], words[1])
        message = f"{name} must be {_RANGES.get(name, 'a finite number of at least 0')}, got {words[2]}"
    found = [(path, options) for path, name, options in _places(config, "") if _made(made, given, name, options)]
    if not found:
        return
    path, options = found[0] if len(found) == 1 else (made.__name__, given)
    option = _BEGINS.match(message)
    error.args = (f"{path}.{message}" if option and option[1] in options else f"{path}: {message}",)
    if isinstance(error, ImportError):  # shows this, not its arguments
        error.msg = error.args[0]


def _made(made: type, given: dict[str, Any], name: str | None, options: dict[str, Any]) -> bool:
    """Whether an object of this class, with these arguments, can be the one of a class path and options."""
    same = find(name) is made if name else given.keys() == options.keys()
    plain = {key: value for key, value in options.items() if "Namespace(" not in repr(value)}  # no objects by now
    return same and all(_plain(given.get(key)) == _plain(value) for key, value in plain.items())


def _plain(value: Any) -> Any:
    """What is compared: lists and tuples are alike, and so are all nan."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _places(config: Any, path: str) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Path, class path and options of all objects of a configuration; none where the class is not to be chosen."""
    if isinstance(config, list):
        for item in config:
            several = len(config) > 1 and isinstance(item, Namespace) and "class_path" in item
            yield from _places(item, f"{path} ({item.class_path.rsplit('.', 1)[-1]})" if several else path)
    elif isinstance(config, Namespace):
        options, name = config, config.get("class_path")
        if name:
            options = config.get("init_args", Namespace())
        named = {key.removeprefix(_HIDDEN): value for key, value in vars(options).items()}
        if path and (name or named):
            yield path, name, named
        for key, value in named.items():
            yield from _places(value, f"{path}.{key}".lstrip("."))
