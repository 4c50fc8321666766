"""Reading YAML files and `key=value` arguments against a typed schema.

The text is parsed to YAML nodes, not to values, because a node knows its line and how it was written:
`7e-6` is a number here (YAML 1.1 reads it as text), a key given twice is seen, and every error names
its place.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from evolve.files import Place
from evolve.remote import RemotePath, holds_secret

_INT = re.compile(r"[-+]?[0-9][0-9_]*\Z")
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Complaint:
    """One thing wrong with a configuration."""

    what: str
    where: str
    """File and line, or the argument."""
    mend: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.mend}"


@dataclass(frozen=True)
class Setting:
    """One value of one layer. A list is one value."""

    key: str
    value: Any
    place: str


class _Wrong(Exception):
    """A value that does not fit its key: what was found, what is needed."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(what)
        self.what, self.mend = what, mend


class Reader:
    """Reads layers of settings for one schema and collects what is wrong with them."""

    def __init__(self, schema: type) -> None:
        self.schema = schema
        self.complaints: list[Complaint] = []
        self._known = list(_keys(schema))

    def file(self, path: Place) -> list[Setting]:
        """The settings of a YAML file; what is wrong with it goes to `complaints`."""
        name = _display(path)
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{name}:{mark.line + 1}" if mark else name
            self._complain(str(error.problem or error.context), where, "mend the YAML")
            return []
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self._complain(f"cannot be read: {error}", name, "give a YAML file")
            return []
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            self._complain("is not a mapping of keys", f"{name}:1", "write `key: value` lines")
            return []
        return list(self._mapping(node, self.schema, "", name))

    def arguments(self, arguments: Sequence[str]) -> list[Setting]:
        """The settings of `key=value` arguments, in order."""
        settings: list[Setting] = []
        for argument in arguments:
            key, _, text = argument.partition("=")
            place = f"command line: {key}=..." if holds_secret(text) else f"command line: {argument}"
            kind = self._kind(key, place)
            if kind is None:
                continue
            try:
                node = yaml.compose(text, Loader=yaml.SafeLoader)
            except yaml.YAMLError:
                node = yaml.ScalarNode("tag:yaml.org,2002:str", text)
            if node is None:
                node = yaml.ScalarNode("tag:yaml.org,2002:null", "")
            settings.extend(self._settings(node, kind, key, place))
        seen: dict[str, str] = {}
        for setting in settings:
            if setting.key in seen:
                self._complain(f"{setting.key} is given twice", setting.place, f"see {seen[setting.key]}")
            seen[setting.key] = setting.place
        return settings

    def _kind(self, key: str, place: str) -> Any:
        """The type a dotted key has in the schema; None, and a complaint, where there is no such key."""
        kind: Any = self.schema
        parts = key.split(".")
        for depth, part in enumerate(parts):
            kind = _strip(kind)
            prefix = ".".join(parts[:depth])
            if dataclasses.is_dataclass(kind):
                hints = _hints(kind)
                if part not in hints:
                    self._unknown(key, part, prefix, hints, place)
                    return None
                kind = hints[part]
            elif typing.get_origin(kind) is list and dataclasses.is_dataclass(typing.get_args(kind)[0]):
                if not part.isdecimal() or int(part) < 1 or depth == len(parts) - 1:
                    mend = f"write {prefix}.K.NAME=value with K from 1, e.g. {prefix}.3.rollouts=64"
                    self._complain(f"{key} is no key", place, mend)
                    return None
                kind = typing.get_args(kind)[0]
            else:
                self._complain(f"{key} is no key: {prefix} has none below it", place, f"set {prefix} itself")
                return None
        return kind

    def _mapping(self, node: yaml.MappingNode, schema: Any, prefix: str, file: str) -> Iterator[Setting]:
        hints = _hints(schema)
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            name, line = str(key_node.value), key_node.start_mark.line + 1
            # A mapping given on the command line has that as its place, not a line of it.
            place = file if file.startswith("command line") else f"{file}:{line}"
            key = f"{prefix}.{name}" if prefix else name
            if name in seen:
                self._complain(f"{key} is given twice", place, f"first in line {seen[name]}; keep one")
            elif name not in hints:
                self._unknown(key, name, prefix, hints, place)
            else:
                yield from self._settings(value_node, hints[name], key, place)
            seen[name] = line

    def _settings(self, node: yaml.Node, kind: Any, key: str, place: str) -> Iterator[Setting]:
        plain = _strip(kind)
        if dataclasses.is_dataclass(plain):
            if isinstance(node, yaml.MappingNode):
                file = place if place.startswith("command line") else place.rpartition(":")[0]
                yield from self._mapping(node, plain, key, file)
            else:
                names = ", ".join(_hints(plain))
                self._complain(f"{key} is a group of keys, not a value", place, f"its keys: {names}")
            return
        try:
            yield Setting(key, self._value(node, kind, key, place), place)
        except _Wrong as wrong:
            self._complain(f"{key}: {wrong.what}", place, wrong.mend)

    def _value(self, node: yaml.Node, kind: Any, key: str, place: str) -> Any:
        plain = _strip(kind)
        if typing.get_origin(plain) is list:
            return self._list(node, kind, key, place)
        if not isinstance(node, yaml.ScalarNode):
            raise _Wrong("is a list or a mapping", f"it needs {_describe(kind)}")
        text, is_text = str(node.value), node.style in ("'", '"', "|", ">")
        if node.tag.endswith(":null") and not is_text:
            if plain is kind:
                raise _Wrong("may not be null", f"it needs {_describe(kind)}")
            return None
        if "${" in text:
            return text  # an interpolation; OmegaConf resolves and checks it
        return _scalar(text, is_text, plain)

    def _list(self, node: yaml.Node, kind: Any, key: str, place: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null") and _strip(kind) is not kind:
            return None
        if not isinstance(node, yaml.SequenceNode):
            raise _Wrong(f"{node.value!r} is not a list", f"it needs {_describe(kind)}, e.g. [64, 128]")
        item = build = typing.get_args(_strip(kind))[0]
        if not dataclasses.is_dataclass(item):
            return [self._value(child, item, key, place) for child in node.value]
        rows = []
        file = place if place.startswith("command line") else place.rpartition(":")[0]
        for number, child in enumerate(node.value, start=1):
            if not isinstance(child, yaml.MappingNode):
                raise _Wrong(f"entry {number} is not a mapping", "write `- key: value` entries")
            settings = self._mapping(child, item, f"{key}.{number}", file)
            rows.append(build(**{s.key.rpartition(".")[2]: s.value for s in settings}))
        return rows

    def _unknown(self, key: str, name: str, prefix: str, hints: dict[str, Any], place: str) -> None:
        sibling = difflib.get_close_matches(name, hints, n=1, cutoff=0.7)
        last = key.rpartition(".")[2]
        same_name = [known for known in self._known if known.rpartition(".")[2] == last]
        if same_name:
            nearest = max(same_name, key=lambda known: difflib.SequenceMatcher(None, key, known).ratio())
        elif sibling:
            nearest = f"{prefix}.{sibling[0]}" if prefix else sibling[0]
        else:
            nearest = difflib.get_close_matches(key, self._known, n=1, cutoff=0.0)[0]
        self._complain(f"unknown key {key}", place, f"did you mean {nearest}?")

    def _complain(self, what: str, where: str, mend: str) -> None:
        self.complaints.append(Complaint(what, where, mend))


def _scalar(text: str, is_text: bool, kind: Any) -> Any:
    """Convert a scalar as it was written to one type of the schema."""
    wrong = _Wrong(f"{text!r} is not {_describe(kind)}", f"give {_describe(kind)}")
    if isinstance(kind, type) and issubclass(kind, Enum):
        if text not in kind.__members__:
            close = difflib.get_close_matches(text, kind.__members__, n=1, cutoff=0.5)
            if close:
                raise _Wrong(f"{text!r} is not {_describe(kind)}", f"did you mean {close[0]}?")
            raise wrong
        return kind[text]
    if kind is str:
        return text
    if is_text:
        raise _Wrong(f"{text!r} is quoted and so is text", f"give {_describe(kind)} without quotes")
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise wrong
        return text.lower() == "true"
    if kind is int:
        if not _INT.match(text):
            raise wrong
        return int(text)
    try:
        number = float(text)
    except ValueError:
        raise wrong from None
    if not math.isfinite(number):
        raise wrong
    return number


def _describe(kind: Any) -> str:
    optional, plain = _strip(kind) is not kind, _strip(kind)
    if typing.get_origin(plain) is list:
        item = typing.get_args(plain)[0]
        words = "a list of rounds" if dataclasses.is_dataclass(item) else "a list of whole numbers"
    elif isinstance(plain, type) and issubclass(plain, Enum):
        words = "one of " + ", ".join(plain.__members__)
    else:
        words = _NAMES[plain]
    return f"{words} or null" if optional else words


def _strip(kind: Any) -> Any:
    """`X` of `X | None`; any other type as it is."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(kind) if a is not type(None))
    return kind


def _hints(schema: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema)}


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema that has a value of its own."""
    for name, kind in _hints(schema).items():
        key, plain = f"{prefix}{name}", _strip(kind)
        if dataclasses.is_dataclass(plain):
            yield from _keys(plain, key + ".")
        else:
            yield key


def _display(path: Place) -> str:
    """The path as a user would type it: relative to the working directory where it lies below."""
    if isinstance(path, RemotePath):
        return str(path)
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
