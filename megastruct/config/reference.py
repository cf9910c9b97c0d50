"""The reference of all keys, made from the schema and the registries: a table, a list for the terminal, a JSON schema.

`tools/write_reference.py` writes docs/config.md and configs/schema.json with it.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megastruct.config.schema import Config
from megastruct.config.section import MAX_INTEGER, MAX_SECONDS, MAX_TENSOR_SIZE
from megastruct.config.typed import fields_of, section_class
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.optimizers import OPTIMIZERS
from megastruct.structures import STRUCTURES, known_sizes

REQUIRED, LEFT_OUT = "required", "left out"
_UNITS = {"_steps": "steps", "_tokens": "tokens", "_seconds": "seconds", "_tflops": "TFLOP/s", "_samples": "sequences"}
_TYPES = {"string": "text", "boolean": "true or false", "number": "number", "integer": "integer", "object": "mapping"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_OUT_OF_SIGHT = (MAX_INTEGER, MAX_TENSOR_SIZE, MAX_SECONDS)  # bounds that no sensible value comes near
# As YAML 1.2 reads them, which editors follow, 25_500_000_000 is text.
_GROUPED_DIGITS = "^[0-9][0-9_]*$"
_PAGES = {  # where a section is explained
    "model": "[structures.md](structures.md#choosing-sizes)",
    "ffn": "[structures.md](structures.md)",
    "guided": "[guided.md](guided.md)",
    "data": "[data.md](data.md)",
    "parallel": "[tensor_parallelism.md](tensor_parallelism.md) and [many_machines.md](many_machines.md)",
    "evaluation": "[runs.md](runs.md)",
    "logging": "[runs.md](runs.md#metrics)",
    "checkpoint": "[runs.md](runs.md#resuming)",
    "reliability": "[reliability.md](reliability.md)",
    "profiling": "[performance.md](performance.md#traces-of-a-run)",
}


@dataclass(frozen=True)
class Key:
    """One key as the reference shows it."""

    name: str
    type: str
    default: str
    unit: str
    meaning: str


def json_schema() -> dict[str, Any]:
    """A JSON schema (draft 7) of one config file.

    No key is required, because a config may be divided over files that include each other.
    """
    schema = Config.model_json_schema()
    sections = {name: ref["$ref"].rpartition("/")[2] for name, ref in _sections(schema)}
    definitions = schema["$defs"]
    definitions[sections["ffn"]]["properties"] |= _structure_sizes()
    definitions[sections["optimizer"]]["properties"] |= _optimizer_keys()
    for name in sections.values():
        definitions[name].pop("required", None)
        definitions[name]["additionalProperties"] = False
    include = {
        "description": "configs that this file builds on, with paths relative to it; later ones override earlier ones",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    result = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "megastruct config",
        "description": _first_paragraph(Config),
        "type": "object",
        "properties": {"include": include} | {name: {"$ref": f"#/$defs/{sections[name]}"} for name in sections},
        "additionalProperties": False,
        "$defs": definitions,
    }
    return _for_editors(result)


def keys(section: str, schema: dict[str, Any] | None = None) -> list[Key]:
    """The keys of a section, in the order of the schema, `json_schema()` unless it is given."""
    schema = schema or json_schema()
    definition = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]
    fields = fields_of(section)
    return [
        Key(
            name=f"{section}.{name}",
            type=_type_words(value, schema["$defs"]),
            default=REQUIRED if name in fields and fields[name].is_required() else _word(value.get("default")),
            unit=value.get("unit") or _unit_of_name(name),
            meaning=value.get("description", ""),
        )
        for name, value in definition["properties"].items()
    ]


def tables() -> str:
    """The sections of docs/config.md, each with a table of its keys."""
    schema = json_schema()
    return "\n".join(line for section in Config.model_fields for line in _table(section, keys(section, schema)))


def listing(wanted: str = "") -> str:
    """The keys of all sections, of one section, or one key `section.key`, as text for a terminal.

    Raises UserError if there is no such section or key.
    """
    schema = json_schema()
    every = {section: keys(section, schema) for section in Config.model_fields}
    names = [*every, *(key.name for section in every.values() for key in section)]
    if wanted and wanted not in names:
        close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
        found = f"there is no section or key {wanted!r}"
        raise UserError(Problem("--keys", found, f"--keys {close[0]}" if close else f"one of {', '.join(every)}"))
    lines: list[str] = []
    for section, found_keys in every.items():
        chosen = [key for key in found_keys if wanted in ("", section, key.name)]
        if chosen:
            lines += [f"{section}: {_first_paragraph(section_class(section))}", *map(_listed, chosen), ""]
    return "\n".join(lines).rstrip()


class PrintKeys(argparse.Action):
    """The option `--keys [SECTION]`, which prints the keys of configs and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        """Raises SystemExit with 0, or with 2 if there is no such section."""
        with user_errors_exit():
            print(listing(args[1] or ""))
        sys.exit(0)


def _sections(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in Config.model_fields:
        value = schema["properties"][name]
        yield name, value if "$ref" in value else value["allOf"][0]


def _structure_sizes() -> dict[str, Any]:
    bounds = {"type": "integer", "minimum": 1, "maximum": MAX_TENSOR_SIZE}
    sizes: dict[str, Any] = {}
    for key, text in known_sizes().items():
        users = ", ".join(name for name, structure in STRUCTURES.items() if key in structure.numbers.sizes)
        hint = "tools/plan.py --ffn-share suggests sizes for a share of the dense network's weights"
        description = f"{text}; required by {users}, refused by the others. {hint}"
        sizes[key] = {"anyOf": [bounds, {"type": "null"}], "description": description}
    return sizes


def _optimizer_keys() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, optimizer in OPTIMIZERS.items():
        for key, record in optimizer.keys.items():
            kind = {bool: "boolean", int: "integer", float: "number", str: "string"}[record.kind]
            bounds = {"minimum": record.at_least, "exclusiveMinimum": record.above, "exclusiveMaximum": record.below}
            value: dict[str, Any] = {"type": kind} | {
                word: bound for word, bound in bounds.items() if bound is not None
            }
            value |= {"enum": [*record.choices]} if record.choices else {}
            anyof = [value, {"type": "null"}]
            description = f"with optimizer.kind={name}: {record.description}"
            result.setdefault(key, {"anyOf": anyof, "default": record.default, "description": description})
    return result


def _for_editors(value: Any) -> Any:
    """Without the titles that pydantic adds, and with integers as YAML 1.2 reads them."""
    if isinstance(value, list):
        return [_for_editors(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: _for_editors(item) for key, item in value.items() if not (key == "title" and "properties" not in item)}
    if kept.get("type") == "integer":
        kept |= {"type": ["integer", "string"], "pattern": _GROUPED_DIGITS}
    return kept


def _type_words(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    options = [option for option in value.get("anyOf") or value.get("oneOf") or [] if option != {"type": "null"}]
    if options:
        return " or ".join(_type_words(option, definitions) for option in options)
    if "enum" in value or "const" in value:
        words = value.get("enum", [value.get("const")])
        return " or ".join(str(word).lower() if isinstance(word, bool) else str(word) for word in words)
    if "$ref" in value:
        properties = definitions[value["$ref"].rpartition("/")[2]]["properties"]
        return f"{{{', '.join(properties)}}}"
    kind = value.get("type", "")
    if kind == "array":
        return f"list of {_type_words(value['items'], definitions)}"
    bounds = [
        f"{sign} {bound:g}"
        for word, sign in _BOUNDS.items()
        if (bound := value.get(word)) is not None and bound not in _OUT_OF_SIGHT
    ]
    return " ".join([_TYPES.get(kind[0] if isinstance(kind, list) else kind, ""), " and ".join(bounds)]).rstrip()


def _word(default: Any) -> str:
    if default is None:
        return LEFT_OUT
    if isinstance(default, bool | str):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _unit_of_name(name: str) -> str:
    return next((unit for ending, unit in _UNITS.items() if name.endswith(ending)), "")


def _first_paragraph(model: type) -> str:
    return " ".join((inspect.getdoc(model) or "").partition("\n\n")[0].split())


def _table(section: str, found: list[Key]) -> list[str]:
    text = _first_paragraph(section_class(section))
    page = f" See {_PAGES[section]}." if section in _PAGES else ""
    rows = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for key in found:
        cells = (f"`{key.name}`", key.type, key.default, key.unit, key.meaning)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return [f"### {section}", "", *textwrap.wrap(text + page, 120, break_on_hyphens=False), "", *rows, ""]


def _listed(key: Key) -> str:
    unit = f", in {key.unit}" if key.unit else ""
    default = key.default if key.default in (REQUIRED, LEFT_OUT) else f"default {key.default}"
    meaning = textwrap.fill(key.meaning, 96, initial_indent="      ", subsequent_indent="      ")
    return f"  {key.name}: {key.type}{unit}; {default}\n{meaning}"
