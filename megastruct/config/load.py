"""Reads YAML files and `section.key=value` overrides into a Config, or raises one UserError with all mistakes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml

from megastruct.config.schema import Config
from megastruct.config.sources import Sources, read_sources
from megastruct.config.suggestions import with_working_suggestions
from megastruct.config.validate import validate
from megastruct.errors import Problem, UserError


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read, merge and check a config.

    Raises UserError with all problems: with files, keys, types, ranges and combinations.
    """
    sources, problems = read_sources(path, overrides)
    config, more = validate(sources.values)
    problems += with_working_suggestions(sources.values, more)
    if problems or config is None:
        noun = "problem" if len(problems) == 1 else "problems"
        located = [_located(problem, sources) for problem in problems]
        raise UserError(located, headline=f"{path}: {len(problems)} {noun}")
    return config


@contextmanager
def places_in_errors(path: str | Path, overrides: Iterable[str] = ()) -> Iterator[None]:
    """Add to problems with keys that are found inside of this context where a config has set them.

    Raises UserError with these problems.
    """
    try:
        yield
    except UserError as error:
        sources, _ = read_sources(path, overrides)
        located = [_located(problem, sources) for problem in error.problems]
        raise UserError(located, error.headline, error.on_all_ranks) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML, which `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def _located(problem: Problem, sources: Sources) -> Problem:
    """The problem with the places of the keys that it names; the key at fault comes first and needs no name."""
    if problem.places:
        return problem
    named = dict.fromkeys([problem.where, *re.findall(r"\b[a-z]+\.[a-z]\w*", f"{problem.where} {problem.found}")])
    places = [
        place if key == problem.where or place.startswith("the override") else f"{place} ({key})"
        for key in named
        if not problem.where.startswith(f"{key}.") and (place := sources.place(key))
    ]
    parts = tuple(_located(part, sources) for part in problem.parts)
    return replace(problem, places=tuple(dict.fromkeys(places)), parts=parts)
