"""Values by the types of their keys: what was typed without quotes becomes what the key in the schema asks for.

A key for text takes the characters as they are, whatever else YAML would make of them; a key for numbers takes 6e-4,
1e9 and 25_500_000_000. What does not fit stays text, and the schema refuses it.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megastruct.config.schema import Config
from megastruct.config.section import MAX_INTEGER
from megastruct.config.yaml_text import NULLS, Plain, YAMLSyntaxError, parse_yaml
from megastruct.optimizers import OPTIMIZERS
from megastruct.structures import known_sizes

_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_SEQUENCES = (list, tuple)
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]{1,4})?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|nan)", re.IGNORECASE)


def typed_values(values: dict[str, Any]) -> dict[str, Any]:
    """The sections and keys of a config as YAML gave them, each with the type that its key asks for."""
    return {
        section: {key: typed(value, annotation_of(section, key)) for key, value in keys.items()}
        if isinstance(keys, dict)
        else ({} if keys in NULLS and isinstance(keys, Plain) else keys)  # `ffn:` with nothing below it
        for section, keys in values.items()
    }


def typed(value: Any, annotation: Any) -> Any:
    """`value` from YAML with a type of `annotation`, or as it is where none of them fits."""
    kinds = list(_kinds(annotation))
    if isinstance(value, Plain):
        return _from_text(value, kinds)
    if isinstance(value, list):
        items = _items_of(value, kinds)
        return [typed(item, items) for item in value]
    if isinstance(value, dict):
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        fields = model.model_fields if model else {}
        values_of = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
        return {key: typed(item, fields[key].annotation if key in fields else values_of) for key, item in value.items()}
    return value


def annotation_of(section: str, key: str) -> Any:
    """The type of a key; Any if there is no such key."""
    fields = fields_of(section)
    if key in fields:
        return fields[key].annotation
    if section == "ffn" and key in known_sizes():
        return int | None
    if section == "optimizer":
        kinds = [optimizer.keys[key].kind for optimizer in OPTIMIZERS.values() if key in optimizer.keys]
        return kinds[0] | None if kinds else Any
    return Any


def section_class(section: str) -> type[BaseModel]:
    """The class of a section; if there is no such section, BaseModel itself, which has no keys."""
    field = Config.model_fields.get(section)
    found = field.annotation if field else None
    return found if isinstance(found, type) and issubclass(found, BaseModel) else BaseModel


def fields_of(section: str) -> dict[str, FieldInfo]:
    """The fields of a section by their names in YAML."""
    return {field.alias or name: field for name, field in section_class(section).model_fields.items()}


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types between which an annotation leaves the choice; a Literal counts as the type of its values."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _kinds(option)
    elif origin is Literal:
        yield from {type(value) for value in get_args(annotation)}
    else:
        yield annotation


def _from_text(text: Plain, kinds: list[Any]) -> Any:
    if Any in kinds:  # a key that does not exist, or one of any type
        kinds = [type(None), bool, int, float, str]
    if text == "" or (type(None) in kinds and text in NULLS):
        return None
    if text.startswith("{") and any(get_origin(kind) is dict or _is_section(kind) for kind in kinds):  # in an override
        values = _parsed(text)
        if isinstance(values, dict):
            return typed(values, Union[tuple(kinds)])  # noqa: UP007, the kinds are known at run time only
    if text.startswith("[") and any(get_origin(kind) in _SEQUENCES for kind in kinds):
        items = _list(text)
        # A pattern of file names may begin with a bracket too: [ab]*.parquet, or [ab] alone.
        if items is not None and (str not in kinds or len(items) != 1 or any(isinstance(item, dict) for item in items)):
            of_items = _items_of(items, kinds)
            return [typed(item, of_items) for item in items]
    if bool in kinds and text.lower() in _TRUTH:
        return _TRUTH[text.lower()]
    if int in kinds and (whole := _integer(text)) is not None:
        return whole
    if float in kinds and _NUMBER.fullmatch(text):
        return float(text.replace("_", ""))
    if float in kinds and _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return str(text)


def _items_of(values: list[Any], kinds: list[Any]) -> Any:
    """The type of the items of a list, of those that `kinds` allow: sections, or plain values."""
    of_items = [get_args(kind)[0] for kind in kinds if get_origin(kind) in _SEQUENCES]
    has_sections = any(isinstance(value, dict) for value in values)
    return next((kind for kind in of_items if _is_section(kind) == has_sections), next(iter(of_items), Any))


def _is_section(annotation: Any) -> bool:
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in _kinds(annotation))


def _integer(text: str) -> int | None:
    """The integer that `text` writes, also as 1e9 or 25.5e9; None if it writes none."""
    if not _NUMBER.fullmatch(text) or len(text) > 50:
        return None
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    number = Decimal(text.replace("_", ""))
    return int(number) if abs(number) <= MAX_INTEGER and number == number.to_integral_value() else None


def _list(text: str) -> list[Any] | None:
    value = _parsed(text)
    return value if isinstance(value, list) else None


def _parsed(text: str) -> Any:
    try:
        return parse_yaml(text)
    except YAMLSyntaxError:
        return None
