"""What a model is evaluated on: named streams of tokens, from token shards or from text.

Every document ends with the end-of-document token, so text and the token shards made of it give the same stream.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megastruct.checkpoint.agreement import rank_in
from megastruct.data.cache import FOLDER_NAME
from megastruct.data.kept import tokenised
from megastruct.data.mixture import source_names
from megastruct.data.options import DataOptions
from megastruct.data.sources.check import TEXT_COLUMNS, check_shards
from megastruct.data.sources.place import Place
from megastruct.data.sources.reading import read_patiently
from megastruct.data.sources.shards import MANIFEST_NAME, TextShard
from megastruct.data.split import is_validation
from megastruct.data.text.held_out import held_out_tokens
from megastruct.data.text.open import open_corpus
from megastruct.data.text.stream import TextSource
from megastruct.data.tokens.data import shard_rows
from megastruct.data.tokens.manifest import SPLITS, check_files, load_manifest
from megastruct.data.tokens.megatron import Pair, find_pairs, open_pairs
from megastruct.data.tokens.rows import TokenRows
from megastruct.errors import Problem, Problems, UserError
from megastruct.inference.load import Loaded
from megastruct.paths import expanded_at
from megastruct.run.run_folder import read_description

OVERALL = "overall"  # the name under which reports give all sources together
Split = Literal["train", "validation", "all"]


@dataclass(frozen=True)
class Source:
    """A stream of tokens, which `begin` starts to read; it ends after `max_tokens`, if that is set."""

    name: str
    path: str
    begin: Callable[[], Iterator[np.ndarray]]
    max_tokens: int | None = None

    def chunks(self) -> Iterator[np.ndarray]:
        """The tokens up to `max_tokens`, in arrays int64 [n].

        Raises:
            UserError: a file is damaged or cannot be reached.
        """
        missing = self.max_tokens
        for chunk in self.begin():
            yield chunk[:missing]
            if missing is not None:
                missing -= min(missing, len(chunk))
                if not missing:
                    return


@dataclass(frozen=True)
class Selection:
    """Which part of the data is read.

    Attributes:
        split: None: what token shards hold out, and all of a text.
        max_tokens: of each source; None: all.
        text_column: None: the run's.
    """

    split: Split | None = None
    max_tokens: int | None = None
    text_column: str | None = None


class Sources:
    """Finds and checks data for the model of one run."""

    def __init__(self, run: Path, loaded: Loaded, selection: Selection) -> None:
        self._run, self._selection = run, selection
        self._tokenizer, self._config = loaded.tokenizer, loaded.config
        # Of token shards, the record of the run has what the config does not.
        recorded: dict[str, Any] = read_description(run)
        self._commits = recorded.get("hub_commits", ())
        self._fraction = float(recorded.get("validation_fraction", loaded.config.data.validation_fraction))
        column = recorded.get("text_column", loaded.config.data.text_column)
        self._column = column if isinstance(column, str) else None  # a list, if the sources have different ones

    def given(self, data: Sequence[str]) -> list[Source]:
        """The sources of `--data`: each a PATH or NAME=PATH of token shards or text.

        Raises:
            UserError: with all paths that are missing, damaged or tokenised otherwise, and names that are given twice.
        """
        named = [(name, expanded_at(path, "--data")) for name, path in map(_name_and_path, data)]
        shorts = source_names([path for _, path in named])
        names = [given or short for (given, _), short in zip(named, shorts, strict=True)]
        problems = Problems(
            Problem("--data", f"two sources have the name {name}", "give each a name of its own: NAME=PATH")
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        )
        if OVERALL in names:
            taken = f"a source has the name {OVERALL}, which is that of all sources together"
            problems.append(Problem("--data", taken, "give it another name: NAME=PATH"))
        found = [
            problems.collect(partial(self._open, name, path)) for name, (_, path) in zip(names, named, strict=True)
        ]
        problems.raise_if_any()
        return [source for source in found if source]

    def own(self) -> list[Source]:
        """The data that the run was validated on: the held-out documents of each of its sources.

        Searching a text for them may take long, so only as many tokens are read as the run's own validation takes, or
        `max_tokens`.

        Raises:
            UserError: data is missing or damaged, or the run has no held-out text.
        """
        paths, problems = [path for path, _ in self._config.data.sources], Problems()
        open_source: Callable[[int, str, str], Source] = lambda _, name, path: self._token_shards(name, path)  # noqa: E731
        if self._config.data.kind == "text":
            open_source = self._held_out if self._selection.split in (None, "validation") else self._trained_on
        found = [
            problems.collect(partial(open_source, index, name, path))
            for index, (name, path) in enumerate(zip(source_names(paths), paths, strict=True))
        ]
        if problems:
            headline = f"the validation data of {self._run} cannot be used; --data PATH evaluates on other data"
            raise UserError(problems, headline=headline)
        return [source for source in found if source]

    def _open(self, name: str, path: str) -> Source:
        is_tokens = (Path(path) / MANIFEST_NAME).is_file() or bool(find_pairs(path))
        return self._token_shards(name, path) if is_tokens else self._text(name, path)

    def _token_shards(self, name: str, path: str) -> Source:
        folder = Path(path).absolute()
        if not (folder / MANIFEST_NAME).is_file():
            if pairs := find_pairs(path):
                return self._megatron(name, path, pairs)
            what = f"has no {MANIFEST_NAME}" if folder.is_dir() else "does not exist"
            raise UserError(Problem("data.path", f"{folder} {what}", "--data with the folder of token shards"))
        manifest, problems = load_manifest(folder), Problems()
        problems.collect(partial(check_files, folder, manifest))
        theirs, ours = manifest.settings.tokenizer, self._tokenizer
        if theirs.fingerprint != ours.fingerprint:
            found = (
                f"was made with another tokenizer ({theirs.vocab_size:,} ids, sha256 {theirs.fingerprint[:12]}...) "
                f"than the model's ({ours.vocab_size:,} ids, sha256 {ours.fingerprint[:12]}...)"
            )
            suggestion = f"give the text instead, or make the folder with tools/prepare_data.py --tokenizer {ours.path}"
            problems.append(Problem(str(folder), found, suggestion))
        problems.raise_if_any()
        sizes = self._config.training.seq_length, self._config.model.vocab_size
        train, validation = (shard_rows(folder, manifest, split, *sizes) for split in SPLITS)
        return self._of_rows(name, path, train, validation)

    def _megatron(self, name: str, path: str, pairs: Sequence[Pair]) -> Source:
        files = open_pairs(pairs, self._tokenizer, self._fraction, "data.tokenizer")
        rows = files.rows(self._config.training.seq_length, self._config.model.vocab_size)
        return self._of_rows(name, path, *rows)

    def _of_rows(self, name: str, path: str, train: TokenRows, validation: TokenRows) -> Source:
        split = self._selection.split or "validation"
        chosen = [rows for own, rows in zip(SPLITS, (train, validation), strict=True) if split in (own, "all")]
        return Source(
            name, path, lambda: chain.from_iterable(rows.chunks() for rows in chosen), self._selection.max_tokens
        )

    def _text(self, name: str, path: str) -> Source:
        # The run's column if the text has it: the text may be another corpus than the run's.
        columns: tuple[str, ...] = (self._column, *TEXT_COLUMNS) if self._column else TEXT_COLUMNS
        if self._selection.text_column:
            columns = (self._selection.text_column,)
        patience_seconds = self._config.data.patience_seconds
        text = Place(path, "--data", text_columns=columns).find(patience_seconds)
        check_shards(text.shards, patience_seconds)
        if rank_in() == 0:
            for note in text.notes:
                print(f"{path}: {note}", file=sys.stderr)
        return Source(name, path, partial(self._text_chunks, path, text.shards), self._selection.max_tokens)

    def _trained_on(self, index: int, name: str, path: str) -> Source:
        """All of the text of a source of the run, or what is not held out of it."""
        corpus = open_corpus(self._options(), index)
        shards = [*corpus.shards, *(corpus.held_out_shards if self._selection.split == "all" else ())]
        return Source(name, path, partial(self._text_chunks, path, shards), self._selection.max_tokens)

    def _text_chunks(self, path: str, shards: Sequence[TextShard]) -> Iterator[np.ndarray]:
        split, patience_seconds = self._selection.split or "all", self._config.data.patience_seconds
        is_wanted = lambda document: (  # noqa: E731
            split == "all" or is_validation(document.content, self._fraction) == (split == "validation")
        )
        num_skipped = 0
        for shard in shards:
            for documents in read_patiently(shard, shard.text_column, patience_seconds=patience_seconds):
                kept, reasons = tokenised(self._tokenizer, documents, is_wanted)
                num_skipped += sum(reason is not None for reason in reasons)
                for _, tokens in kept:
                    yield tokens.astype(np.int64)
        if num_skipped and rank_in() == 0:
            print(f"{path}: {num_skipped:,} documents without text were left out", file=sys.stderr)

    def _options(self) -> DataOptions:
        return DataOptions.of(self._config, self._run / FOLDER_NAME, self._commits, self._column)

    def _held_out(self, index: int, name: str, path: str) -> Source:
        options, num_samples = self._options(), self._config.evaluation.num_samples
        num_tokens = int(options.mixture.consumed(num_samples)[index]) * options.seq_length + 1
        if self._selection.max_tokens:
            num_tokens = self._selection.max_tokens
        elif not num_samples:
            raise UserError(Problem("evaluation.num_samples", "0: the run has no validation", "--max-tokens 1000000"))
        corpus = open_corpus(options, index)
        source = TextSource(
            shards=corpus.shards,
            tokenizer=self._tokenizer,
            validation_fraction=0.0 if corpus.held_out else self._fraction,
            seed=options.seed,
            num_streams=1,
            patience_seconds=self._config.data.patience_seconds,
            held_out_shards=corpus.held_out_shards,
        )

        def begin() -> Iterator[np.ndarray]:
            yield held_out_tokens(source, num_tokens, options.cache_folder).astype(np.int64)

        return Source(name, path, begin)


def _name_and_path(word: str) -> tuple[str, str]:
    match = re.match(r"([\w.-]+)=(.+)$", word)
    return (match[1], match[2]) if match and not Path(word).exists() else ("", word)
