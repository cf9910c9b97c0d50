"""The configurations and splits of a place, as `datasets` finds them by the dataset card and the names of files.

`datasets` resolves its patterns through a file system. It gets one that consists of a list of names, so that local
folders, the hub and object stores are all listed once, by their storages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import yaml

CARD_NAMES = ("README.md", ".huggingface.yaml")  # the second completes the first
_SAVED_SPLITS = "dataset_dict.json"  # of `DatasetDict.save_to_disk`
_PROTOCOL = "megastruct-names"
_SPLIT_WORDS = ("train", "val", "dev", "test", "eval", "-of-")  # one is in every name that a split is found by

Splits = dict[str, list[str]]  # the names of the files of each split


class DataFiles:
    """The data files of a place.

    Attributes:
        configs: the names of the configurations that the card lists.
        default_config: the configuration that the card marks as the default.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], bytes] | None, cards: Sequence[str]) -> None:
        """`names`: of the text shards; `read`: reads one of the small files `cards` that lie in the place."""
        self._names, self._read, self._cards = names, read, cards

    @property
    def configs(self) -> list[str]:
        """See the class."""
        return list(self._configs)

    @property
    def default_config(self) -> str | None:
        """See the class."""
        return next((name for name, keys in self._configs.items() if name == "default" or keys.get("default")), None)

    def splits_of(self, config: str) -> Splits:
        """The splits of a configuration of the card.

        Raises:
            ValueError: the card describes them otherwise than `datasets` allows.
        """
        from datasets.data_files import sanitize_patterns

        keys = self._configs[config]
        folder, given = str(keys.get("data_dir") or "").strip("/"), keys.get("data_files")
        if given is None:
            return self._resolved(folder, None)
        patterns = sanitize_patterns(given) if isinstance(given, str | list | dict) else {}
        if not patterns or not all(isinstance(pattern, str) for own in patterns.values() for pattern in own):
            raise ValueError(f"data_files of the configuration {config} is {given!r}")
        return self._resolved(folder, patterns)

    def splits(self) -> Splits:
        """The splits that the names of files and folders tell; a place without any is a single split, `train`."""
        if saved := self._saved_splits():
            return self._resolved("", {split: [f"{split}/**"] for split in saved})
        if not any(word in name.lower() for word in _SPLIT_WORDS for name in self._names):
            return {"train": list(self._names)}  # without `datasets`, which takes seconds to import
        return self._resolved("", None)

    def _saved_splits(self) -> list[str]:
        if self._read is None or _SAVED_SPLITS not in self._cards:
            return []
        try:
            splits = yaml.safe_load(self._read(_SAVED_SPLITS))["splits"]
        except (yaml.YAMLError, KeyError, TypeError):
            return []
        return [str(split) for split in splits]

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        """The keys of each configuration in the card.

        Raises:
            ValueError: it describes them otherwise than `datasets` allows.
        """
        entries: Any = None
        for card in CARD_NAMES:
            if self._read is not None and card in self._cards:
                text = self._read(card).decode("utf-8", "replace")
                entries = _front_matter(text, whole=card.endswith(".yaml")).get("configs") or entries
        if not isinstance(entries, list):
            return {}
        nameless = [keys for keys in entries if not isinstance(keys, dict) or "config_name" not in keys]
        if nameless:
            raise ValueError(f"a configuration without config_name: {nameless[0]!r}")
        return {str(keys["config_name"]): keys for keys in entries}

    def _resolved(self, folder: str, patterns: dict[str, list[str]] | None) -> Splits:
        """The names that match `patterns` below `folder`; without patterns, by the default ones of `datasets`."""
        from datasets import DownloadConfig
        from datasets.data_files import get_data_patterns, resolve_pattern

        _register()
        entries = {name: {"name": name, "size": 0, "type": "file"} for name in self._names}
        download = DownloadConfig(storage_options={_PROTOCOL: {"entries": entries}})
        base = f"{_PROTOCOL}://{folder}"
        splits: Splits = {}
        try:
            for split, own in (patterns or get_data_patterns(base, download_config=download)).items():
                for pattern in own:
                    with contextlib.suppress(FileNotFoundError):  # it matches no text shard
                        found = resolve_pattern(pattern, base, download_config=download)
                        splits.setdefault(str(split), []).extend(path.partition("://")[2] for path in found)
        except FileNotFoundError:
            pass
        return {split: sorted(set(names)) for split, names in splits.items()}


def _front_matter(text: str, whole: bool) -> dict[str, Any]:
    """The YAML between the lines `---` at the head of a card, or the `whole` text; empty if there is none.

    Raises:
        ValueError: it lists configurations, but is not valid.
    """
    lines = text.lstrip("\ufeff \t\r\n").splitlines()
    if not whole:
        if not lines or lines[0] != "---" or "---" not in lines[1:]:
            return {}
        lines = lines[1 : lines.index("---", 1)]
    try:
        values = yaml.safe_load("\n".join(lines))
    except yaml.YAMLError as error:
        if any(line.startswith("configs:") for line in lines):
            raise ValueError(" ".join(str(error).split())) from None
        return {}  # lines of a page
    return values if isinstance(values, dict) else {}


def _register() -> None:
    """Make the file system of names known to fsspec."""
    import fsspec
    from fsspec.spec import AbstractFileSystem

    if _PROTOCOL in fsspec.registry:
        return

    class Names(AbstractFileSystem):
        """Files without contents; folders are not listed."""

        protocol = _PROTOCOL
        cachable = False

        def __init__(self, entries: dict[str, dict[str, Any]], **options: Any) -> None:
            super().__init__(**options)
            self._entries = entries

        def find(self, path: str, maxdepth: int | None = None, withdirs: bool = False, **options: Any) -> Any:
            """The files below `path`, by their names."""
            inside = {name: entry for name, entry in self._entries.items() if name.startswith(path)}
            return inside if options.get("detail") else list(inside)

        def info(self, path: str, **options: Any) -> dict[str, Any]:
            """The entry of a file.

            Raises:
                FileNotFoundError: there is none.
            """
            if path not in self._entries:
                raise FileNotFoundError(path)
            return self._entries[path]

    fsspec.register_implementation(_PROTOCOL, Names)
