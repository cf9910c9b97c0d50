"""Checks the values of a config: keys, types and ranges by the schema, then the keys against each other."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from megastruct.config.checks import cross_field_problems
from megastruct.config.model import MAX_LAYERS
from megastruct.config.schema import Config
from megastruct.config.section import MAX_TENSOR_SIZE
from megastruct.config.typed import annotation_of, fields_of, typed_values
from megastruct.config.yaml_text import mistake_in
from megastruct.errors import Problem

Location = tuple[int | str, ...]
_LONGEST_VALUE = 80  # characters of a value that a message repeats


def validate(values: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """The config with these values, as YAML gave them, and all their problems; None if the keys are not valid."""
    config, problems = _validated(typed_values(values))
    if config is not None:
        faulty = {problem.where for problem in problems}
        problems += [problem for problem in cross_field_problems(config) if not _speaks_of(problem, faulty)]
    return config, problems


def _validated(values: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """Check the keys, then once more without the faulty ones, so that the remaining checks can run as well."""
    problems: list[Problem] = []
    faulty: set[Location] = set()
    for _ in range(2):
        try:
            return Config.model_validate(values), problems
        except ValidationError as error:
            # A required key that was faulty in the first round is missing in the second; it is reported once.
            errors = [item for item in error.errors() if item["loc"] not in faulty]
            problems += [_explain(item) for item in errors]
            faulty |= {item["loc"] for item in errors} | {item["loc"][:2] for item in errors}
            values = _without(values, [item["loc"] for item in errors])
            for item in errors:
                _stand_in(values, item["loc"][:2])  # nested keys were removed together with this one
    return None, problems


# A required key that is missing or of the wrong type gets a harmless value, so that the other checks can run.
_STAND_INS: dict[str, Any] = {"kind": "tokens", "name": "run", "path": "-", "learning_rate": 1.0}
_STAND_IN_SIZE = 5040  # a multiple of most small sizes, so that few checks fail because of it


def _stand_in(values: dict[str, Any], path: Location) -> None:
    if len(path) == 2 and str(path[1]) in _known_keys(path[:1]):
        field = fields_of(str(path[0]))[str(path[1])]
        if field.is_required():
            values.setdefault(str(path[0]), {})[path[1]] = _STAND_INS.get(str(path[1]), _STAND_IN_SIZE)


def _explain(item: Any) -> Problem:
    where = ".".join(str(key) for key in item["loc"] if not _is_union_tag(key))
    message = item["msg"][0].lower() + item["msg"][1:]
    if item["type"] == "literal_error":  # in the words of YAML
        message = message.replace("False", "false").replace("True", "true")
    if isinstance(item["input"], str) and (mistake := mistake_in(item["input"])):
        message = f"not valid YAML: {mistake}"
    if len(item["loc"]) > 2:  # inside a list of sources, which an override cannot address
        wrong = {
            "extra_forbidden": "unknown key",
            "missing": "missing",
            "model_type": f"{_shown(item['input'])} is not a section",
        }
        found = wrong.get(item["type"], f"{_shown(item['input'])}: {message}")
        return Problem(where, found, f"{'.'.join(map(str, item['loc'][:2]))}={_example(item['loc'])}")
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        prefix = ".".join(str(key) for key in item["loc"][:-1])
        suggestion = ".".join(filter(None, [prefix, close[0]])) if close else f"one of {', '.join(known)}"
        return Problem(where, "unknown key", suggestion)
    if item["type"] == "missing":
        return Problem(where, "missing", f"{where}=..." if "." in where else f"a section `{where}:`")
    if (most := item.get("ctx", {}).get("le")) in (MAX_TENSOR_SIZE, MAX_LAYERS):
        found = f"{_shown(item['input'])} is more than any machine can hold (at most {most})"
        return Problem(where, found, "a size such as those in configs/model/")
    found = "a section" if isinstance(item["input"], Mapping) else _shown(item["input"])
    return Problem(where, f"{found}: {message}", _value_that_is_right(item))


def _example(path: Location) -> str:
    """A valid value of the key at `path` or around it."""
    field = fields_of(str(path[0])).get(str(path[1]))
    return field.examples[0] if field and field.examples else "[{path: FOLDER, weight: 1}, ...]"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _value_that_is_right(item: Any) -> str:
    """An override with a valid value: the word that was meant, else the key's default, else the bound that was
    exceeded; and one that leaves the key out, if that is possible.

    Empty if there is none of them.
    """
    path = tuple(item["loc"])
    if len(path) != 2:
        return ""
    section, key = map(str, path)
    field, bounds = fields_of(section).get(key), item.get("ctx", {})
    choices = _words(annotation_of(section, key))
    meant = [bounds["meant"]] if "meant" in bounds else difflib.get_close_matches(str(item["input"]), choices, n=1)
    default = None if field is None or field.default is PydanticUndefined else field.default
    values = (*meant, default, *(field.examples or () if field else ()), bounds.get("ge"), bounds.get("le"))
    value = next((v for v in values if isinstance(v, bool | int | float | str)), None)
    words = [] if value is None else [str(value).lower() if isinstance(value, bool) else str(value)]
    if type(None) in get_args(annotation_of(section, key)):
        words.append("null")
    return ", or ".join(f"{section}.{key}={word}" for word in words)


def _words(annotation: Any) -> list[str]:
    """The words between which a key's type leaves the choice."""
    if get_origin(annotation) is Literal:
        return [word if isinstance(word, str) else str(word).lower() for word in get_args(annotation)]
    return [word for option in get_args(annotation) for word in _words(option)]


def _speaks_of(problem: Problem, keys: set[str]) -> bool:
    # A problem names another key of its own section by the last word only.
    words = keys | {word for key in keys if "_" in (word := key.rpartition(".")[2])}
    return any(word in str(problem) for word in words if "." in word or "_" in word)


def _is_union_tag(key: int | str) -> bool:
    return isinstance(key, str) and not key.isidentifier()


def _known_keys(path: Location) -> list[str]:
    return list(fields_of(str(path[0])) if path else Config.model_fields)


def _without(values: dict[str, Any], paths: Iterable[Location]) -> dict[str, Any]:
    copy: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for path in paths:
        if len(path) == 1:
            copy.pop(str(path[0]), None)
        elif isinstance(copy.get(str(path[0])), dict):
            copy[str(path[0])].pop(path[1], None)
    return copy
