"""The loss of a model on streams of tokens: every token counts once, on any number of ranks.

    tokens   | t0 | t1 .......... ts | ts+1 ..... t2s | ... | rest, padded |
    row 0     eod -> t0
    row 1           t0 .. ts-1 -> t1 .. ts
    row 2                      ts .. t2s-1 -> ts+1 .. t2s              as the rows of validation during training

The first token, which no row of training has as a label, is predicted from the end-of-document token, as the first
token of any later document is. Padding has no label. Batches are dealt to the ranks in turn and have the same rows for
any number of ranks; their sums are added exactly, so the result does not depend on the number of ranks.
Shapes: s = seq_length, b = rows of a batch, v = vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from megastruct.checkpoint.agreement import gather, rank_in, size_of, together
from megastruct.data import Tokenizer
from megastruct.errors import Problem, UserError
from megastruct.evaluation.sources import Source
from megastruct.inference.load import Loaded
from megastruct.metrics.perplexity import perplexity

NO_LABEL = -100


@dataclass(frozen=True)
class Score:
    """The loss on a stream of tokens.

    Attributes:
        num_tokens: the tokens, end-of-document tokens included.
        num_bytes: of the text of the tokens in UTF-8; end-of-document tokens have none.
        sums: of the tokens' losses in nats, one for each batch, in any order.
    """

    num_tokens: int
    num_bytes: int
    sums: list[float]

    @property
    def total(self) -> float:
        """The sum over all tokens in nats, rounded once."""
        return math.fsum(self.sums) if all(map(math.isfinite, self.sums)) else sum(self.sums)

    @property
    def loss(self) -> float:
        """The mean over tokens in nats."""
        return self.total / self.num_tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """The bits of all tokens for each byte of their text; None if they have no text."""
        return self.total / math.log(2) / self.num_bytes if self.num_bytes else None


def sum_of(scores: Iterable[Score]) -> Score:
    """The score of several streams together."""
    scores = list(scores)
    return Score(
        num_tokens=sum(score.num_tokens for score in scores),
        num_bytes=sum(score.num_bytes for score in scores),
        sums=[value for score in scores for value in score.sums],
    )


def evaluate(loaded: Loaded, source: Source, batch_size: int) -> Score:
    """The score of the model on one source, equal on all ranks. Collective, if torch.distributed is in use.

    Raises:
        UserError: on all ranks: a file cannot be read, or there are no tokens.
    """
    own = together(lambda: _own_share(loaded, source, batch_size))
    if not own.num_tokens:
        found = "has no tokens to evaluate on"
        raise UserError(Problem(source.path, found, "other data, or another --split"), on_all_ranks=True)
    parts = gather((own.num_bytes, own.sums))
    sums = [value for _, values in parts for value in values]
    return Score(own.num_tokens, sum(num_bytes for num_bytes, _ in parts), sums)


def _own_share(loaded: Loaded, source: Source, batch_size: int) -> Score:
    """All tokens of the source, but only this rank's batches and the bytes of this rank's documents."""
    device = next(loaded.model.parameters()).device
    texts = _TextBytes(loaded.tokenizer)
    sums, num_tokens = [], 0
    with tqdm(
        unit="token", unit_scale=True, desc=source.name, disable=not sys.stderr.isatty() or rank_in() > 0
    ) as progress:

        def read() -> Iterator[np.ndarray]:
            nonlocal num_tokens
            for chunk in source.chunks():
                texts.add(chunk)
                num_tokens += len(chunk)
                yield chunk

        rows = _rows(read(), loaded.tokenizer.eod_id, loaded.config.training.seq_length)
        for index, batch in enumerate(_batches(rows, batch_size)):
            if index % size_of() == rank_in():
                ids, labels = (torch.from_numpy(part).to(device) for part in batch)
                sums.append(_sum_of_losses(loaded.model, ids, labels))
            progress.update(int((batch[1] != NO_LABEL).sum()))
    return Score(num_tokens, texts.finish(), sums)


@torch.no_grad()
def _sum_of_losses(model: nn.Module, ids: Tensor, labels: Tensor) -> float:
    """The sum in float64 of the float32 losses of all labels; ids and labels int64 [b, s]."""
    logits = model(ids)  # [s, b, v]
    # Row by row, because logits in float32 take much memory.
    losses = [
        F.cross_entropy(logits[:, row].float(), labels[row], ignore_index=NO_LABEL, reduction="none")
        for row in range(len(labels))
    ]
    return float(torch.stack(losses).double().sum())


def _rows(chunks: Iterator[np.ndarray], eod_id: int, seq_length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels), int64 [s] each; labels of padding are NO_LABEL."""
    waiting = np.array([eod_id], dtype=np.int64)  # begins with the token before the next label
    length = 1  # labels of the next row: the first one has only the first token
    for chunk in chunks:
        waiting = np.concatenate([waiting, chunk])
        start = 0
        while len(waiting) - start > length:
            yield _padded(waiting[start : start + length + 1], seq_length)
            start, length = start + length, seq_length
        waiting = waiting[start:]
    if len(waiting) > 1:
        yield _padded(waiting, seq_length)


def _padded(tokens: np.ndarray, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    ids, labels = np.zeros(seq_length, dtype=np.int64), np.full(seq_length, NO_LABEL, dtype=np.int64)
    ids[: len(tokens) - 1], labels[: len(tokens) - 1] = tokens[:-1], tokens[1:]
    return ids, labels


def _batches(rows: Iterator[tuple[np.ndarray, np.ndarray]], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels), int64 [b, s] each; the last batch may have fewer rows."""
    while batch := list(islice(rows, batch_size)):
        ids, labels = zip(*batch, strict=True)
        yield np.stack(ids), np.stack(labels)


class _TextBytes:
    """Counts the bytes of the documents of a stream. Every rank decodes its share of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._open: list[np.ndarray] = []  # the pieces of the document that has not ended yet
        self._num_documents = self._num_bytes = 0

    def add(self, tokens: np.ndarray) -> None:
        """The next tokens of the stream, int64 [n]."""
        start = 0
        for end in (np.flatnonzero(tokens == self._tokenizer.eod_id) + 1).tolist():
            self._open.append(tokens[start:end])
            self._close()
            start = end
        self._open.append(tokens[start:])

    def finish(self) -> int:
        """The bytes of this rank's documents. Of a character that is cut off, the bytes that are there count."""
        self._close()
        return self._num_bytes

    def _close(self) -> None:
        if self._num_documents % size_of() == rank_in():
            self._num_bytes += self._tokenizer.num_bytes(np.concatenate(self._open)) if self._open else 0
        self._num_documents += 1
        self._open = []
