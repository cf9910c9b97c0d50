"""The interfaces of the data package: what can have several implementations, and what each must do.

    Storage         finds shards and opens their bytes: local, hub, fsspec     registry: sources/storages.py
    DocumentFormat  bytes of a shard -> documents: parquet, JSON lines         registry: sources/formats.py
    Tokenizer       documents -> token ids: SentencePiece, tokenizer.json      registry: tokenizers/open.py
    TrainingData    micro-batches for a rank: token shards, text shards        registry: open.py

A new implementation is a class with these methods, which need not inherit from anything, and one entry in the registry.
Storages, formats and tokenizers also run in worker processes, which import the package alone: an entry that is made
elsewhere works with data.num_workers=0. A mistake of the user's is a `UserError`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # worker processes need no torch, which takes seconds to load
    from megastruct.data.batch import Batch
    from megastruct.data.sources.documents import Document
    from megastruct.data.sources.find import Search
    from megastruct.data.sources.shards import TextShard
    from megastruct.errors import Problem


class FileState(NamedTuple):
    """Tells whether a file is still the one that was found."""

    num_bytes: int
    version: str  # changes whenever the file is written


class Storage(Protocol):
    """A place that holds shards. The addresses of its shards begin with the scheme under which it is registered.

    Attributes:
        request_bytes: smallest size of a read that is worth a request of its own.
    """

    @property
    def request_bytes(self) -> int:
        """See the class."""
        ...

    def find(self, search: Search) -> list[TextShard] | None:
        """The shards that `search.path` stands for, sorted by name; None if the path does not belong to this storage.

        Use `search.text_names` to select the shards among all files: it chooses the configuration and the split.

        Raises:
            UserError: there is no shard, or the storage cannot be reached. The message names `search.where`.
        """
        ...

    def open(self, shard: TextShard) -> io.RawIOBase | io.BufferedIOBase:
        """A seekable file of the shard's bytes; each read requests only the bytes that it returns.

        Raises:
            Exception: any error of the storage; `may_pass` and `refusal` classify it.
        """
        ...

    def state(self, shard: TextShard) -> FileState:
        """The current state of the file.

        Raises:
            FileNotFoundError: the file is gone.
        """
        ...

    def commit_of(self, shard: TextShard) -> str | None:
        """The commit at which the shard is read, for the record of a run; None if the storage has no commits."""
        ...

    def may_pass(self, shard: TextShard, error: Exception) -> bool:
        """Whether a retry may succeed: the connection failed, not the file or the program."""
        ...

    def refusal(self, shard: TextShard, error: Exception) -> Problem | None:
        """The message for an error by which the storage refuses access; None if the file itself is damaged or gone."""
        ...


class DocumentFormat(Protocol):
    """A file format of text shards.

    Attributes:
        endings: endings of file names, for example (".parquet",).
        damage: exceptions other than OSError and EOFError that a damaged file can raise. Any other exception is a bug.
    """

    @property
    def endings(self) -> tuple[str, ...]:
        """See the class."""
        ...

    @property
    def damage(self) -> tuple[type[Exception], ...]:
        """See the class."""
        ...

    def check(self, shard: TextShard, text_column: str) -> Problem | None:
        """The problem with a shard as far as its first bytes or its footer show it; None if there is none.

        Raises:
            Exception: any error of the storage, or one of `damage`.
        """
        ...

    def num_documents(self, shard: TextShard) -> int | None:
        """Number of documents in the shard, including broken ones; None if counting needs all of the file.

        Raises:
            Exception: any error of the storage, or one of `damage`.
        """
        ...

    def documents(self, shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
        """Documents from index `start` on, in order, in non-empty lists that are each small enough for memory.

        Indices increase through the file and depend on the file alone. Broken documents are included.

        Raises:
            UserError: there is no such column.
            Exception: any error of the storage, or one of `damage`, after the documents before it.
        """
        ...


class Tokenizer(Protocol):
    """Converts text to token ids and back. When it is unpickled in a worker process, it loads `path` again.

    Attributes:
        path: absolute path of the tokenizer's file.
        file_name: name for copies of the file, from which `open_tokenizer` recognises the kind of tokenizer.
        files: contents of all files of a copy, by name; `file_name` is one of them.
        fingerprint: a hash in hex of everything that the ids of a document depend on.
        vocab_size: number of ids; all ids are in [0, vocab_size).
        eod_id: the end-of-document id. It follows every document, and no text is encoded as this id.
        bos_id: the id before every document; None: there is none.
    """

    @property
    def path(self) -> Path:
        """See the class."""
        ...

    @property
    def file_name(self) -> str:
        """See the class."""
        ...

    @property
    def files(self) -> Mapping[str, bytes]:
        """See the class."""
        ...

    @property
    def fingerprint(self) -> str:
        """See the class."""
        ...

    @property
    def vocab_size(self) -> int:
        """See the class."""
        ...

    @property
    def eod_id(self) -> int:
        """See the class."""
        ...

    @property
    def bos_id(self) -> int | None:
        """See the class."""
        ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [num_tokens], without begin- or end-of-document ids, each as if it were alone.

        Several threads may call this method at once.
        """
        ...

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Like `encode`, with `bos_id` before every document, if there is one, and `eod_id` after it."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` [num_tokens]; control tokens such as `eod_id` produce no text."""
        ...

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes in UTF-8 of the text of `ids` [num_tokens]. Of a character that is cut off, those that are there."""
        ...

    def pieces(self) -> Mapping[str, int]:
        """The ids of all tokens by the text that the tokenizer's file has for them."""
        ...


class MicroBatches(Protocol):
    """The endless micro-batches of one data-parallel rank."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            UserError: the data is damaged or cannot be reached. Every later call raises the error again.
        """
        ...

    def cursor(self) -> np.ndarray:
        """Where reading goes on: int64 of the data's `cursor_shape`, rows of -1 for what other ranks read.

        The largest values of all ranks make one of them. A pure function of the number of steps that were read,
        once merged: the same on every layout.

        Raises:
            RuntimeError: micro-batches of the current step are left.
        """
        ...


class TrainingData(Protocol):
    """Data that has been found and checked and is ready to be read.

    The samples of a step depend on the seed and the step alone, not on the number of ranks or workers.

    Attributes:
        tokenizer: the tokenizer of the tokens.
        cursor_shape: shape of a reader's cursor, (streams, columns).
        validation_is_costly: whether the first call of `validation_batches` may have to read much of the data.
    """

    @property
    def tokenizer(self) -> Tokenizer:
        """See the class."""
        ...

    @property
    def cursor_shape(self) -> tuple[int, int]:
        """See the class."""
        ...

    @property
    def validation_is_costly(self) -> bool:
        """See the class."""
        ...

    def skipped_documents(self, cursor: np.ndarray) -> int:
        """Number of broken documents skipped up to the merged cursor of all ranks (int64 `cursor_shape`)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values (numbers, strings, None) for the record of a run. A run resumes only if all are unchanged."""
        ...

    def train_reader(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cursor: np.ndarray | None = None,
        start_sample: int = 0,
    ) -> MicroBatches:
        """Micro-batches of rank `dp_rank` from global sample `start_sample` on, where the merged `cursor` was taken.

        Raises:
            UserError: the cursor belongs to other data.
            ValueError: the sizes do not divide evenly, or the cursor is not merged.
        """
        ...

    def validation_batches(self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """The share of rank `dp_rank` in the first `num_samples` rows of the packed held-out documents.

        Raises:
            UserError: the held-out documents fill fewer rows.
            ValueError: num_samples does not divide by micro_batch_size * dp_size.
        """
        ...

    def validation_sources(
        self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> dict[str, np.ndarray]:
        """For each source by its name, which rows of `validation_batches` come from it.

        Returns:
            bool [micro-batches of this rank, micro_batch_size] each; every row is from one source.

        Raises:
            ValueError: num_samples does not divide by micro_batch_size * dp_size.
        """
        ...
