"""The seams of the data room: what can have more than one implementation, and what each must do.

    Storage         finds shards and opens their bytes: local files, the hub   registry: sources/storages.py
    DocumentFormat  bytes of a shard -> documents: parquet, JSON lines         registry: sources/formats.py
    Tokenizer       documents -> token ids: SentencePiece                      registry: tokenizers/open.py
    TrainingData    micro-batches for a rank: token shards, text shards        registry: open.py

A new implementation is a class with these methods, which need not inherit from anything, and one entry in the registry.
Storages, formats and tokenizers also run in worker processes, which import the package alone: an entry that is made
elsewhere works with data.num_workers=0. A mistake of the user's is a `UserError`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
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
    """What tells whether a file is still the one that was found."""

    num_bytes: int
    version: str  # another one whenever the file was written


class Storage(Protocol):
    """Where the bytes of shards are. Its shards have addresses that begin with the scheme it is registered by.

    Attributes:
        request_bytes: fewer bytes than this are not worth a request of their own.
    """

    @property
    def request_bytes(self) -> int: ...

    def find(self, search: Search) -> list[TextShard] | None:
        """The shards that `search.path` stands for, sorted by name; None if it is no path of this storage.

        Which of all files are shards, `search.text_names` says.

        Raises:
            UserError: there is no shard, or the storage cannot be reached; with `search.where`.
        """
        ...

    def open(self, shard: TextShard) -> io.RawIOBase | io.BufferedIOBase:
        """The bytes of a shard, seekable: each read is a request for just these bytes.

        Raises whatever the storage raises; see `may_pass` and `refusal`.
        """
        ...

    def state(self, shard: TextShard) -> FileState:
        """What the file is now. Raises FileNotFoundError if it is gone."""
        ...

    def commit_of(self, shard: TextShard) -> str | None:
        """The commit that the shard is read at, for the record of a run; None where there are no commits."""
        ...

    def may_pass(self, shard: TextShard, error: Exception) -> bool:
        """Whether what failed may work a little later: it is about the way, and not about the file or the program."""
        ...

    def refusal(self, shard: TextShard, error: Exception) -> Problem | None:
        """The message for an error by which the storage says no; None: the file itself is damaged or gone."""
        ...


class DocumentFormat(Protocol):
    """How documents are written in a file.

    Attributes:
        endings: of the names of its files, for example (".parquet",).
        damage: what reading a damaged file can raise beside OSError and EOFError. Any other exception is a bug.
    """

    @property
    def endings(self) -> tuple[str, ...]: ...

    @property
    def damage(self) -> tuple[type[Exception], ...]: ...

    def check(self, shard: TextShard, text_column: str) -> Problem | None:
        """What is wrong with a shard as far as its first bytes (or its footer) tell, before training starts.

        Raises what the storage or a damaged file raises.
        """
        ...

    def num_documents(self, shard: TextShard) -> int | None:
        """Documents in the shard, broken ones too; None where only reading all of it would tell. Raises as `check`."""
        ...

    def documents(self, shard: TextShard, text_column: str, start: int) -> Iterator[list[Document]]:
        """Documents from index `start` on, in order, in lists of at least one, which together fit into memory.

        Indices grow with the place in the file and depend on the file alone. Broken documents are among them.

        Raises:
            UserError: there is no such column.
            Whatever the storage or a damaged file raises, behind the documents before it.
        """
        ...


class Tokenizer(Protocol):
    """Text to token ids and back. It is pickled for worker processes, which load the file at `path` again.

    Attributes:
        path: absolute path of the file that it was read from.
        content: the bytes of that file.
        file_name: of copies of it: the name tells `open_tokenizer` which kind of tokenizer it is.
        fingerprint: sha256 of `content` in hex.
        vocab_size: number of ids; all ids are in [0, vocab_size).
        eod_id: the end-of-document id; it follows every document and no text becomes it.
    """

    @property
    def path(self) -> Path: ...

    @property
    def content(self) -> bytes: ...

    @property
    def file_name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod_id(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [num_tokens], without begin- or end-of-document ids, each as if it were alone.

        Several threads may call it at once.
        """
        ...

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, and every document ends with `eod_id`; int32 [num_tokens + 1]."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` [num_tokens]; control tokens such as `eod_id` give no text."""
        ...


class MicroBatches(Protocol):
    """The endless micro-batches of one data-parallel rank."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch:
        """The next micro-batch. Raises UserError if the data is damaged or out of reach, and again when asked again."""
        ...

    def cursor(self) -> np.ndarray:
        """Where reading goes on: int64 of the data's `cursor_shape`, rows of -1 for what other ranks read.

        The largest values of all ranks make one of them. A pure function of the number of steps that were read,
        once merged: the same on every layout.

        Raises:
            RuntimeError: the current step has micro-batches left.
        """
        ...


class TrainingData(Protocol):
    """Data that is found, checked and ready to be read.

    Which samples a step reads depends on the seed and the step alone, not on the number of ranks or workers.

    Attributes:
        tokenizer: that made, or makes, the tokens.
        cursor_shape: of a reader's cursor, (streams, columns).
        validation_is_costly: whether `validation_batches` may have to read much of the data at its first call.
    """

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def cursor_shape(self) -> tuple[int, int]: ...

    @property
    def validation_is_costly(self) -> bool: ...

    def skipped_documents(self, cursor: np.ndarray) -> int:
        """Broken documents passed over so far, by the merged cursor of all ranks (int64 `cursor_shape`)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values for the record of a run: numbers, texts, None. A run goes on only where all are the same."""
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
        """Rank `dp_rank`'s micro-batches from global sample `start_sample` on, where the merged `cursor` was taken.

        Raises:
            UserError: the cursor belongs to other data.
            ValueError: the sizes do not divide, or the cursor is not a merged one.
        """
        ...

    def validation_batches(self, num_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """Rank `dp_rank`'s part of the first `num_samples` rows of the packed held-out documents.

        Raises:
            UserError: there are fewer rows.
            ValueError: num_samples does not divide by micro_batch_size * dp_size.
        """
        ...
