"""The sources of a config's values: YAML files with their includes, then overrides; and where each value was set.

A file may have a key `include: [other.yaml, ...]`, with paths relative to the file itself. Later files override earlier
ones, and the file's own keys override all of them. A path below `configs/` without a file there names a config of the
package.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megastruct.config.yaml_text import NULLS, Mapping, Plain, YAMLSyntaxError, parse_yaml
from megastruct.errors import Problem, UserError
from megastruct.paths import expanded_at

_PACKAGE = Path(__file__).resolve().parents[1]
# The folder that holds this project's `configs/`: the package where it is installed, the checkout otherwise.
_HOME = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent


@dataclass
class Sources:
    """Merged values by section and key, as YAML gave them, and the place of each: `FILE:LINE`, or the override.

    `places` is keyed by the dotted path of a section, of a key, or of something inside a value.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def merge(self, mapping: Mapping, file: str) -> None:
        """Let the values of a file override those that are here."""
        _merge(self.values, mapping)
        self.places |= _places(mapping, file)

    def place(self, path: str) -> str:
        """Where the value at a dotted path was set; "" if it has not been."""
        while path not in self.places and path.count(".") > 1:  # what is inside a value was set with it
            path = path.rpartition(".")[0]
        return self.places.get(path, "")


def read_sources(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Sources, list[Problem]]:
    """What a config file, its includes and overrides say, and the problems of overrides that are none.

    Raises UserError if a file cannot be read or is not YAML.
    """
    sources = _read(_locate(Path(), path), (), "")
    problems = [problem for override in overrides if (problem := _override(sources, override))]
    return sources, problems


def _read(path: Path, parents: tuple[Path, ...], included_at: str) -> Sources:
    if path.resolve() in parents:
        raise UserError(_at(Problem(str(path), "includes itself", "remove it from `include`"), included_at))
    mapping, file = _read_yaml(path, included_at), os.path.normpath(path)
    line = f"{file}:{mapping.lines.get('include', 1)}"
    includes = mapping.pop("include", [])
    if isinstance(includes, str):
        includes = [includes]
    if not isinstance(includes, list) or not all(isinstance(item, str) for item in includes):
        raise UserError(_at(Problem("include", f"{includes!r}", "a list of paths relative to this file"), line))
    sources = Sources()
    for item in filter(None, includes):
        included = _read(_locate(path.parent, str(item)), (*parents, path.resolve()), line)
        _merge(sources.values, included.values)
        sources.places |= included.places
    sources.merge(mapping, file)
    return sources


def _at(problem: Problem, place: str) -> Problem:
    return replace(problem, places=(place,)) if place else problem


def _locate(folder: Path, name: str | Path) -> Path:
    """The path of `name` in `folder`, or in the package if `name` is below `configs/` and not in `folder`."""
    path = folder / expanded_at(str(name), str(name))
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if Path(name).parts[:1] == ("configs",) and (_HOME / name).is_file():
            return _HOME / name
    except (OSError, ValueError):  # it cannot be read: reading it will report that
        pass
    return path


def _read_yaml(path: Path, included_at: str) -> Mapping:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        names = [str(other) for other in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        if path.parts[:1] == ("configs",):
            names += [str(other.relative_to(_HOME)) for other in sorted((_HOME / path.parent).glob("*.yaml"))]
        close = difflib.get_close_matches(str(path), names, n=1, cutoff=0.3)
        problem = Problem(str(path), error.strerror or str(error), close[0] if close else "")
        raise UserError(_at(problem, included_at)) from None
    except UnicodeDecodeError:
        raise UserError(_at(Problem(str(path), "not a UTF-8 text file", "a YAML file"), included_at)) from None
    except ValueError as error:  # a name with a null character
        raise UserError(_at(Problem(repr(str(path)), str(error)), included_at)) from None
    try:
        values = parse_yaml(text)
    except YAMLSyntaxError as error:
        where = f"{os.path.normpath(path)}:{error.line}" if error.line else str(path)
        raise UserError(_at(Problem(where, f"not valid YAML: {error}"), included_at)) from None
    if values is None or (isinstance(values, Plain) and not values):
        return Mapping()
    if not isinstance(values, Mapping):
        kind = "a list" if isinstance(values, list) else "a text"
        raise UserError(_at(Problem(str(path), kind, "sections with keys, as in configs/run/"), included_at))
    return values


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge(target[key], value)
        elif isinstance(target.get(key), dict) and isinstance(value, Plain) and not value:
            pass  # a section with nothing below it
        else:
            target[key] = value


def _places(value: Any, file: str, prefix: str = "", depth: int = 4) -> dict[str, str]:
    """The places of everything in a mapping, and of mappings in lists in it; at most `depth` levels down."""
    places: dict[str, str] = {}
    inner: Iterator[tuple[str, Any]] = iter(())
    if isinstance(value, Mapping):
        places = {f"{prefix}{key}": f"{file}:{line}" for key, line in value.lines.items() if key in value}
        inner = iter(value.items())
    elif isinstance(value, list):
        inner = ((str(index), item) for index, item in enumerate(value))
    if depth:
        for key, item in inner:
            places |= _places(item, file, f"{prefix}{key}.", depth - 1)
    return places


def _override(sources: Sources, override: str) -> Problem | None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys) or len(keys) != 2:
        return Problem(override, "is not a valid override", "section.key=value, for example training.num_steps=100")
    section = sources.values.setdefault(keys[0], {})
    if isinstance(section, Plain) and section in NULLS:
        section = sources.values[keys[0]] = {}
    if not isinstance(section, dict):
        found, place = f"{section!r} is not a section", sources.places.get(keys[0], "")
        return _at(Problem(keys[0], found, f"remove it from the file to set {path}"), place)
    section[keys[1]] = override_value(text)
    sources.places = {key: at for key, at in sources.places.items() if not f"{key}.".startswith(f"{path}.")}
    sources.places[path] = f"the override {override if len(override) <= 120 else f'{override[:120]}...'}"
    sources.places.setdefault(keys[0], sources.places[path])
    return None


def override_value(text: str) -> str:
    """The value of an override: what was typed, in quotes or without them."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            quoted = parse_yaml(text)
        except YAMLSyntaxError:
            return Plain(text)
        return quoted if type(quoted) is str else Plain(text)
    return Plain(text)
