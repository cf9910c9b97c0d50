"""Reads YAML files and `section.key=value` overrides into a Config, or raises one UserError with all mistakes.

A file may begin with `include: [other.yaml, ...]`, with paths relative to the file itself. Later files override earlier
ones, and the file's own keys override all of them. A path below `configs/` without a file there names a config of the
package. Only plain YAML is read (no object tags).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megastruct.config.checks import cross_field_problems
from megastruct.config.schema import Config
from megastruct.errors import Problem, UserError
from megastruct.paths import expanded_at

_PACKAGE = Path(__file__).resolve().parents[1]
# The folder that holds this project's `configs/`: the package where it is installed, the checkout otherwise.
_HOME = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 6e-4 as a number (YAML 1.1 requires 6.0e-4) and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a plain word", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read, merge and check a config.

    Raises UserError with all problems: with files, keys, types, ranges and combinations.
    """
    values = _read_with_includes(_locate(Path(), path), ())
    problems: list[Problem] = []
    for override in overrides:
        problems += _apply_override(values, override)
    config, more = _validated(values)
    problems += more
    if config is not None:
        faulty = {problem.where for problem in problems}
        problems += [problem for problem in cross_field_problems(config) if not _speaks_of(problem, faulty)]
    if problems or config is None:
        noun = "problem" if len(problems) == 1 else "problems"
        raise UserError(problems, headline=f"{path}: {len(problems)} {noun}")
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML, which `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_with_includes(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in parents:
        raise UserError(Problem(str(path), "includes itself", "remove it from `include`"))
    values = _read_yaml(path)
    includes = values.pop("include", [])
    if isinstance(includes, str):
        includes = [includes]
    if not isinstance(includes, list) or not all(isinstance(item, str) for item in includes):
        raise UserError(Problem(f"{path}: include", f"{includes!r}", "a list of paths relative to this file"))
    merged: dict[str, Any] = {}
    for item in includes:
        _merge(merged, _read_with_includes(_locate(path.parent, item), (*parents, path.resolve())))
    _merge(merged, values)
    return merged


def _locate(folder: Path, name: str | Path) -> Path:
    """The path of `name` in `folder`, or in the package if `name` is below `configs/` and not in `folder`."""
    path = folder / expanded_at(str(name), str(name))
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if Path(name).parts[:1] == ("configs",) and (_HOME / name).is_file():
            return _HOME / name
    except OSError:  # the file exists but cannot be read: reading it will report that
        pass
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        names = [str(other) for other in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        if path.parts[:1] == ("configs",):
            names += [str(other.relative_to(_HOME)) for other in sorted((_HOME / path.parent).glob("*.yaml"))]
        close = difflib.get_close_matches(str(path), names, n=1, cutoff=0.3)
        raise UserError(Problem(str(path), error.strerror or str(error), close[0] if close else "")) from None
    except UnicodeDecodeError:
        raise UserError(Problem(str(path), "not a UTF-8 text file", "a YAML file")) from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(Problem(where, f"not valid YAML: {getattr(error, 'problem', error)}")) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(Problem(str(path), f"a {type(values).__name__}", "sections with keys, as in configs/run/"))
    return values


def _merge(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def _apply_override(values: dict[str, Any], override: str) -> list[Problem]:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys) or len(keys) != 2:
        return [Problem(override, "is not a valid override", "section.key=value, for example training.num_steps=100")]
    try:
        value = yaml.load(text, _Loader) if text else None
    except yaml.YAMLError:
        return [Problem(path, f"{text!r} is not a valid value", f"{path}='...' in quotes")]
    section = values.setdefault(keys[0], {})
    if not isinstance(section, dict):
        return [Problem(keys[0], f"{section!r} is not a section", f"remove it from the file to set {path}")]
    section[keys[1]] = value
    return []


def _validated(values: dict[str, Any]) -> tuple[Config | None, list[Problem]]:
    """Check the keys, then once more without the faulty ones, so that the remaining checks can run as well."""
    problems: list[Problem] = []
    faulty: set[tuple[int | str, ...]] = set()
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


def _stand_in(values: dict[str, Any], path: tuple[int | str, ...]) -> None:
    if len(path) == 2 and str(path[1]) in _known_keys(path[:1]):
        field = _section(path[:1]).model_fields[str(path[1])]
        if field.is_required():
            values.setdefault(str(path[0]), {})[path[1]] = _STAND_INS.get(str(path[1]), _STAND_IN_SIZE)


def _explain(item: Any) -> Problem:
    where = ".".join(str(key) for key in item["loc"] if not _is_union_tag(key))
    if len(item["loc"]) > 2:  # inside a list of sources, which an override cannot address
        wrong = {
            "extra_forbidden": "unknown key",
            "missing": "missing",
            "model_type": f"{item['input']!r} is not a section",
        }
        found = wrong.get(item["type"], f"{item['input']!r}: {item['msg'][0].lower() + item['msg'][1:]}")
        field = _section(item["loc"][:1]).model_fields.get(str(item["loc"][1]))
        example = field.examples[0] if field and field.examples else "[{path: FOLDER, weight: 1}, ...]"
        return Problem(where, found, f"{'.'.join(map(str, item['loc'][:2]))}={example}")
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        prefix = ".".join(str(key) for key in item["loc"][:-1])
        suggestion = ".".join(filter(None, [prefix, close[0]])) if close else f"one of {', '.join(known)}"
        return Problem(where, "unknown key", suggestion)
    if item["type"] == "missing":
        return Problem(where, "missing", f"{where}=..." if "." in where else f"a section `{where}:`")
    message = item["msg"][0].lower() + item["msg"][1:]
    found = "a section" if isinstance(item["input"], Mapping) else repr(item["input"])
    return Problem(where, f"{found}: {message}", _value_that_is_right(item))


def _value_that_is_right(item: Any) -> str:
    """An override with a valid value: the word that was meant, else the key's default, else the bound that was
    exceeded.

    Empty if there is none of them.
    """
    path = tuple(item["loc"])
    if len(path) != 2:
        return ""
    field, bounds = _section(path[:1]).model_fields.get(str(path[1])), item.get("ctx", {})
    words = [word for word in get_args(field.annotation) if isinstance(word, str)] if field else []
    meant = [bounds["meant"]] if "meant" in bounds else difflib.get_close_matches(str(item["input"]), words, n=1)
    default = None if field is None or field.is_required() else field.default
    values = (*meant, default, bounds.get("ge"), bounds.get("le"))
    value = next((v for v in values if isinstance(v, bool | int | float | str)), None)
    if value is None:
        return f"{path[0]}.{path[1]}={field.examples[0]}" if field and field.examples else ""
    return f"{path[0]}.{path[1]}={yaml.safe_dump(value).split()[0]}"


def _speaks_of(problem: Problem, keys: set[str]) -> bool:
    # A problem names another key of its own section by the last word only.
    words = keys | {word for key in keys if "_" in (word := key.rpartition(".")[2])}
    return any(word in str(problem) for word in words if "." in word or "_" in word)


def _is_union_tag(key: int | str) -> bool:
    return isinstance(key, str) and not key.isidentifier()


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    return [field.alias or name for name, field in _section(path).model_fields.items()]


def _section(path: tuple[int | str, ...]) -> type[BaseModel]:
    """The class of the section at `path`; if there is no such section, BaseModel itself, which has no keys."""
    model: type[BaseModel] = Config
    for key in path:
        field = model.model_fields.get(str(key))
        annotation = field.annotation if field else None
        if not isinstance(annotation, type) or not issubclass(annotation, BaseModel):
            return BaseModel
        model = annotation
    return model


def _without(values: dict[str, Any], paths: Iterable[tuple[int | str, ...]]) -> dict[str, Any]:
    copy: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for path in paths:
        if len(path) == 1:
            copy.pop(str(path[0]), None)
        elif isinstance(copy.get(str(path[0])), dict):
            copy[str(path[0])].pop(path[1], None)
    return copy
