"""Places of text: their shards, the column that holds the text, and what the user is told about them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from megastruct.data.cache import cached_json, key_of
from megastruct.data.mixture import source_names
from megastruct.data.sources.check import TEXT_COLUMNS, choose_text_column, problem_of
from megastruct.data.sources.choice import EVERYTHING, Choice
from megastruct.data.sources.find import find_shards
from megastruct.data.sources.formats import all_endings
from megastruct.data.sources.notes import counted, named
from megastruct.data.sources.patience import DEFAULT_PATIENCE_SECONDS
from megastruct.data.sources.shards import TextShard
from megastruct.data.sources.storages import storage_of
from megastruct.errors import Problem, Problems, UserError

_TABLES = (".parquet", ".pq", ".arrow", ".feather")


@dataclass(frozen=True)
class Place:
    """Where text lies, and which part of it is meant.

    Attributes:
        path: folder, glob, file or Hugging Face name.
        where: config key or option of the path, for messages.
        choice: of a configuration, a split, or files.
        text_columns: names of columns; the first that is there holds the text.
        commit: of a dataset on the hub, used if the cache has none.
    """

    path: str
    where: str
    choice: Choice = EVERYTHING
    text_columns: tuple[str, ...] = TEXT_COLUMNS
    commit: str | None = None

    def find(self, patience_seconds: float = DEFAULT_PATIENCE_SECONDS, cache_folder: Path | None = None) -> FoundText:
        """Find the shards, and the column if it is not given. `check_shards` then checks all of them.

        The commit of a dataset, its files and the column are stored in `cache_folder`.

        Raises:
            UserError: see `find_shards`.
        """
        notes: list[str] = []
        shards = find_shards(self.path, self.where, patience_seconds, cache_folder, self.commit, self.choice, notes)
        key = key_of([(shard.uri, shard.num_bytes) for shard in shards], self.text_columns)
        column, left_out = cached_json(
            cache_folder, f"column-{key}", lambda: _column_and_metadata(shards, self.text_columns, patience_seconds)
        )
        if left_out:
            notes.append(f"not read, no column {column!r}: {counted(len(left_out), 'file')}{named(left_out)}")
        own = [replace(shard, text_column=column) for shard in shards if shard.name not in set(left_out)]
        return FoundText(self, own, column, notes)


@dataclass(frozen=True)
class FoundText:
    """The text of a place.

    Attributes:
        place: where it was found.
        shards: sorted by name, with their column.
        text_column: the column of all shards.
        notes: lines about what was chosen, and about files that are not read.
    """

    place: Place
    shards: list[TextShard]
    text_column: str
    notes: list[str]

    @property
    def commit(self) -> str | None:
        """The commit at which the text is read; None if it is not on the hub."""
        return storage_of(self.shards[0]).commit_of(self.shards[0])

    def lines(self) -> list[str]:
        """What is read, and what is not, for the user."""
        endings = Counter(_ending(shard.name) for shard in self.shards)
        by_ending = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common())
        num_bytes = format_bytes(sum(shard.num_bytes for shard in self.shards))
        at = f" at commit {self.commit}" if self.commit else ""
        column = "" if all(".txt" in ending or ".text" in ending for ending in endings) else self.text_column
        what = f"reading {self.place.path}{at}: {counted(len(self.shards), 'shard')} ({by_ending}), {num_bytes}"
        what += f", text column {column!r}" if column else ""
        chosen = [note for note in self.notes if not note.startswith("not read")]
        return [", ".join([what, *chosen]), *(f"  {note}" for note in self.notes if note not in chosen)]


def joined(found: Sequence[FoundText]) -> list[TextShard]:
    """The shards of several places as those of one, in the order of the places; their names are made different.

    Raises:
        UserError: a file is in two places.
    """
    if len(found) == 1:
        return found[0].shards
    problems, first_place = Problems(), dict[str, Place]()
    for text in found:
        repeated = [
            shard for shard in text.shards if first_place.setdefault(_file(shard), text.place) is not text.place
        ]
        if repeated:
            other = first_place[_file(repeated[0])].path
            what = f"{text.place.path} and {other} both hold {repeated[0].uri}"
            what += f" and {len(repeated) - 1:,} more files" if len(repeated) > 1 else ""
            problems.append(Problem(text.place.where, f"{what}, which would be read twice", "give one of them only"))
    problems.raise_if_any()
    names = source_names([text.place.path for text in found])
    return [
        replace(shard, name=f"{name}/{shard.name}")
        for name, text in zip(names, found, strict=True)
        for shard in text.shards
    ]


@dataclass(frozen=True)
class Corpus:
    """The text of one or more places, and the split of them that is held out, if one was chosen.

    Attributes:
        train: what is trained on, by place.
        held_out: the held-out split, by place; empty if none was chosen.
        shards: all shards of `train`, in order.
        held_out_shards: all shards of `held_out`.
    """

    train: list[FoundText]
    held_out: list[FoundText]
    shards: list[TextShard]
    held_out_shards: list[TextShard]

    def lines(self) -> list[str]:
        """What is read, and what is not, for the user."""
        held_out = [line for text in self.held_out for line in text.lines()[:1]]
        return [*(line for text in self.train for line in text.lines()), *(f"held out: {line}" for line in held_out)]


def find_corpus(
    places: Sequence[Place],
    validation_split: str | None,
    patience_seconds: float = DEFAULT_PATIENCE_SECONDS,
    cache_folder: Path | None = None,
) -> Corpus:
    """Find the text of `places`, and their split `validation_split` at the same commits.

    Raises:
        UserError: with everything that is not found; or a file is in two places, or in both splits.
    """
    problems = Problems()
    train = [problems.collect(partial(place.find, patience_seconds, cache_folder)) for place in places]
    problems.raise_if_any()
    found, held_out = [text for text in train if text], []
    if validation_split:
        for text in found:
            choice = replace(text.place.choice, split=validation_split)
            place = replace(text.place, choice=choice, commit=text.commit, text_columns=(text.text_column,))
            held_out.append(problems.collect(partial(place.find, patience_seconds, cache_folder)))
        problems.raise_if_any()
    own = [text for text in held_out if text]
    shards, held_out_shards = joined(found), joined(own) if own else []
    files = {_file(shard) for shard in shards} if held_out_shards else set()
    common = [shard for shard in held_out_shards if _file(shard) in files]
    if common:
        what = f"{len(common):,} files are trained on and held out, such as {common[0].uri}"
        suggestion = "choose two splits that have no file in common"
        raise UserError(Problem(places[0].where, what, suggestion))
    return Corpus(found, own, shards, held_out_shards)


def _file(shard: TextShard) -> str:
    """Which file a shard is, however it is reached: by a link, or by a path with `..`."""
    return os.path.realpath(shard.uri) if shard.is_local else shard.uri


def format_bytes(num_bytes: int) -> str:
    """A number of bytes with a unit, with three digits: 12.3 MB."""
    value, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}" if value < 999.5 else f"{value:,.0f} {units[0]}"


def _column_and_metadata(
    shards: Sequence[TextShard], text_columns: tuple[str, ...], patience_seconds: float
) -> tuple[str, list[str]]:
    """The text column, and the names of .json files that lie beside tables and hold no such column: metadata."""
    has_tables = any(_ending(shard.name) in _TABLES for shard in shards)
    aside = [shard for shard in shards if has_tables and _ending(shard.name) == ".json"]
    certain = [shard for shard in shards if shard not in aside]
    column = choose_text_column(certain, text_columns, patience_seconds)
    return column, [shard.name for shard in aside if problem_of(shard, column, patience_seconds)]


def _ending(name: str) -> str:
    """The ending of a shard's name that decides its format, in lower case, for example .jsonl.gz."""
    lower = name.lower()
    known = [ending for ending in all_endings() if lower.endswith(ending)]
    return max(known, key=len, default=PurePosixPath(lower).suffix)
