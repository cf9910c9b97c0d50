"""YAML as text: scalars without quotes keep the characters that were typed, mappings keep the lines of their keys.

YAML 1.1 reads 2024-01-01 as a date, 010 as eight, `on` as true and 1e-4 as text. What a value means is decided later,
by the type of its key (`typed.py`). Only plain YAML is read (no object tags).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

NULLS = ("", "~", "null", "Null", "NULL")  # what leaves a value out, without quotes


class Plain(str):
    """A scalar that was written without quotes."""


class Mapping(dict[str, Any]):
    """A mapping, and the line of every key, counted from 1."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}


class _Loader(yaml.SafeLoader):
    """Makes `Plain` and `Mapping`, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                problem = f"key {key_node.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_lined_mapping(self, node: yaml.MappingNode) -> Iterator[Mapping]:
        mapping = Mapping()
        yield mapping
        mapping.update({str(key): value for key, value in self.construct_mapping(node).items()})
        mapping.lines = {key_node.value: key_node.start_mark.line + 1 for key_node, _ in node.value}

    def construct_text(self, node: yaml.ScalarNode) -> str:
        return Plain(node.value) if node.style is None else str(node.value)


for _tag in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_text)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_lined_mapping)


class YAMLSyntaxError(ValueError):
    """Text that is no YAML. `line` counts from 1; None if it is not known."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str) -> Any:
    """The document in `text`: `Plain` and other strings, lists and `Mapping`s. Raises YAMLSyntaxError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        raise YAMLSyntaxError(
            f"the character {chr(error.character)!r} is not allowed", text.count("\n", 0, error.position) + 1
        ) from None
    except yaml.MarkedYAMLError as error:
        begun = error.context_mark
        began = f" {error.context}, which begins in line {begun.line + 1}" if error.context and begun else ""
        mark = error.problem_mark or begun
        raise YAMLSyntaxError(f"{error.problem}{began}", mark.line + 1 if mark else None) from None
    except RecursionError:
        raise YAMLSyntaxError("it is nested too deeply", None) from None


def mistake_in(text: str) -> str:
    """What keeps a text in brackets from being a list or a mapping; empty if it is one, or has no brackets."""
    try:
        if text[:1] in ("{", "["):
            parse_yaml(text)
    except YAMLSyntaxError as error:
        return str(error)
    return ""
