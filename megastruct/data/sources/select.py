"""Which files of a place are read: the text shards of one configuration and one split. Everything else is named."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from megastruct.data.sources.choice import ALL_SPLITS, Choice, how_to_choose
from megastruct.data.sources.data_files import DataFiles, Splits
from megastruct.data.sources.formats import all_endings, format_of_name
from megastruct.data.sources.notes import counted, is_hidden, named, not_read
from megastruct.errors import Problem, UserError

# Files about the data whose endings are those of text. `datasets` passes over the first five, too.
_ABOUT_THE_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "dummy_data.zip")
_NOTES = ("readme", "license", "licence", "copying", "notice", "citation", "changelog", "authors", "requirements")
_MOST_LISTED = 200


class Selection:
    """The text shards among the files of a place.

    Attributes:
        names: of the shards that are read, sorted.
        notes: a line for each kind of files that are not read, with their number and the first names.
        config, split: what was chosen, by the user or because there is only one; None if nothing is known of them.
    """

    def __init__(
        self,
        names: Sequence[str],
        what: str,
        where: str,
        choice: Choice,
        read: Callable[[str], bytes] | None = None,
        is_explicit: bool = False,
    ) -> None:
        """
        Args:
            names: of all files, relative to the place.
            what: the place, for messages.
            where: the option or the config key of the place, for messages.
            choice: the choice of the user.
            read: reads a small file of the place; without it, the dataset card is not known.
            is_explicit: whether the user gave the files themselves, so that no split needs to be chosen.

        Raises:
            UserError: there is no text shard, the choice does not exist, or it is missing where there are several.
        """
        self.notes: list[str] = []
        self.config, self.split = choice.config, choice.split
        self._what, self._where, self._choice = what, where, choice
        is_meant = is_explicit and len(names) == 1  # then it is read, whatever its name is
        shown = [name for name in names if is_explicit or not is_hidden(name)]
        hidden = [name for name in names if not is_explicit and is_hidden(name) and format_of_name(name)]
        included = [name for name in shown if _is_included(name, choice.include)]
        about = {name for name in included if not is_meant and _is_about_the_data(name, shown)}
        shards = sorted(name for name in included if format_of_name(name) and name not in about)
        if not shards:
            among = f"its {len(names)} files" if included == shown else f"the {len(included)} that match {choice}"
            found = f"{what} has no text shard among {among}{named(included or shown)}"
            raise UserError(Problem(where, found, f"give files that end with {', '.join(all_endings())}"))
        files = DataFiles(shards, read, [name for name in names if "/" not in name])
        self.names = self._chosen(files, shards, is_explicit)
        self.notes += not_read("hidden", hidden)
        self.notes += not_read("not included", sorted(set(shown) - set(included)))
        self.notes += not_read("no text in a known format", sorted(set(included) - set(shards)))
        self.notes += not_read("of another configuration or split", sorted(set(shards) - set(self.names)))

    def _chosen(self, files: DataFiles, shards: list[str], is_explicit: bool) -> list[str]:
        try:
            if self._choice.config or not (is_explicit or self._choice.include):
                self.config = self._chosen_config(files)
            if is_explicit and not self._choice:
                return shards
            splits = files.splits_of(self.config) if self.config else files.splits()
        except ValueError as error:  # the card is not as `datasets` defines it
            found = f"the dataset card of {self._what} is not valid: {str(error).strip().splitlines()[0]}"
            raise UserError(Problem(self._where, found, "give the files by a pattern")) from None
        splits = {split: names for split, names in splits.items() if names}
        return self._of_split(splits, shards)

    def _chosen_config(self, files: DataFiles) -> str | None:
        configs, wanted = files.configs, self._choice.config
        if wanted is None and len(configs) > 1:
            listed = [name + " (its default)" * (name == files.default_config) for name in configs]
            found = f"{self._what} has {len(configs)} configurations, of which one must be chosen: {_list(listed)}"
            suggestion = how_to_choose(self._where, config=files.default_config or configs[0])
            raise UserError(Problem(self._where, found, suggestion))
        if wanted is None or wanted in configs:
            return wanted or next(iter(configs), None)
        if not configs:
            found = f"{self._what} has no configurations, so {wanted} is none of them"
            raise UserError(Problem(self._where, found, "leave it out, or give the folder that is meant"))
        found = f"{self._what} has no configuration {wanted}; it has: {_list(configs)}"
        close = difflib.get_close_matches(wanted, configs, n=1, cutoff=0.3)
        raise UserError(Problem(self._where, found, how_to_choose(self._where, config=(close or configs)[0])))

    def _of_split(self, splits: Splits, shards: list[str]) -> list[str]:
        in_splits = {name for names in splits.values() for name in names}
        rest = [] if self.config else [name for name in shards if name not in in_splits]
        wanted = self._choice.split
        if wanted == ALL_SPLITS:
            return sorted(in_splits | set(rest))
        listed = [f"{split} ({counted(len(names), 'file')})" for split, names in splits.items()]
        listed += [f"{counted(len(rest), 'file')} of no split{named(rest)}"] if rest else []
        place = f"{self._what}, configuration {self.config}," if self.config else self._what
        if not splits:
            raise UserError(Problem(self._where, f"{place} has no text shards", "choose another configuration"))
        if wanted is None and len(listed) > 1:
            found = f"{place} has several splits, of which one must be chosen: {_list(listed)}"
            raise UserError(Problem(self._where, found, self._splits_to_choose(splits)))
        if wanted is not None and wanted not in splits:
            found = f"{place} has no split {wanted}; it has: {_list(listed)}"
            raise UserError(Problem(self._where, found, how_to_choose(self._where, split=next(iter(splits)))))
        self.split = wanted or (next(iter(splits)) if self.config or in_splits != set(shards) else None)
        return sorted(splits[wanted or next(iter(splits))])

    def _splits_to_choose(self, splits: Splits) -> str:
        train = "train" if "train" in splits else next(iter(splits))
        suggestion = how_to_choose(self._where, split=train)
        can_choose = self._where.startswith(("--input", "data.path"))
        return f"{suggestion}, or {how_to_choose(self._where, split=ALL_SPLITS)}" if can_choose else suggestion


def _is_included(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern + "*" * pattern.endswith("/")) for pattern in patterns)


def _is_about_the_data(name: str, names: Sequence[str]) -> bool:
    """Whether a file describes the data: cards and licences, and what `save_to_disk` and `map` put beside shards."""
    path = PurePosixPath(name.lower())
    if path.name in _ABOUT_THE_DATA or (path.suffix in (".txt", ".md") and path.name.split(".")[0] in _NOTES):
        return True
    if path.name == "state.json" or (path.suffix == ".arrow" and path.name.startswith("cache-")):
        folder = name.rpartition("/")[0]
        beside = {other.rpartition("/")[2] for other in names if other.rpartition("/")[0] == folder}
        return "state.json" in beside and any(other.endswith(".arrow") for other in beside)
    return False


def _list(values: Sequence[str]) -> str:
    more = [f"and {len(values) - _MOST_LISTED} more"] if len(values) > _MOST_LISTED else []
    return ", ".join([*values[:_MOST_LISTED], *more])
