"""Suggestions of a config's problems are tried out before they are shown.

A suggestion names alternatives; an alternative may hold an override. Such an override stays only if the problem is gone
with it and no other appears. If that needs further overrides, they are added: `ffn.structure=lowrank ffn.rank=32`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from megastruct.config.sources import override_value
from megastruct.config.validate import validate
from megastruct.errors import Problem

OVERRIDE = re.compile(r"\b[a-z]+\.[a-z]\w*=(?!\.\.\.|[\[{])[^\s,()]+")
_MOST_OVERRIDES = 5


def with_working_suggestions(values: dict[str, Any], problems: Sequence[Problem]) -> list[Problem]:
    """The problems of `values`, as YAML gave them, with only those overrides that solve them."""
    known = {problem.where for problem in problems}
    return [replace(problem, suggestion=_working(values, problem, known)) for problem in problems]


def with_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of the values in which each `section.key=value` is set."""
    changed = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for override in overrides:
        path, _, text = override.partition("=")
        section, _, key = path.partition(".")
        if not isinstance(changed.setdefault(section, {}), dict):
            changed[section] = {}
        changed[section][key] = override_value(text)
    return changed


def _working(values: dict[str, Any], problem: Problem, known: set[str]) -> str:
    alternatives = []
    for alternative in problem.suggestion.split(", or "):
        found = OVERRIDE.search(alternative)
        if found is None:
            alternatives.append(alternative)
        elif overrides := _completed(values, problem, found[0], known):
            alternatives.append(alternative.replace(found[0], " ".join(overrides)))
    return ", or ".join(alternatives)


def _completed(values: dict[str, Any], problem: Problem, override: str, known: set[str]) -> list[str]:
    """`override`, and what else must be set so that no new problem appears; empty if that does not succeed."""
    overrides = [override]
    while len(overrides) <= _MOST_OVERRIDES:
        _, problems = validate(with_overrides(values, overrides))
        new = [other for other in problems if other.where not in known]
        if any(other.where == problem.where for other in problems):
            return []
        if not new:
            return overrides
        taken = {key.partition("=")[0] for key in overrides}
        further = [more for more in OVERRIDE.findall(new[0].suggestion) if more.partition("=")[0] not in taken]
        if not further:
            return []
        overrides.append(further[0])
    return []
