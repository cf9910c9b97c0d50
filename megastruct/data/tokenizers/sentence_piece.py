"""Tokenizers from SentencePiece model files (a LLaMA `tokenizer.model` works unchanged)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from megastruct.data.tokenizers.words import keeps_words_apart, words_of
from megastruct.errors import Problem, UserError

_PART_CHARACTERS = 1 << 16  # longer texts are encoded in parts, because memory and time grow faster than the length
_MAX_PART_CHARACTERS = 1 << 20  # even if there is no good place to cut
_TEXTS_AT_ONCE = 64
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_TRAIN_ONE = "a SentencePiece model file, for example a LLaMA tokenizer.model or what tools/train_tokenizer.py writes"


class SentencePieceTokenizer:
    """A SentencePiece model; see `Tokenizer` in protocols.py. Its `</s>` is the end-of-document id.

    Attributes:
        processor: the processor of the SentencePiece library.

    Raises:
        UserError: the file is missing, is not a SentencePiece model, or defines no end-of-sentence id.
    """

    file_name = "tokenizer.model"

    def __init__(self, path: str | Path, where: str = "") -> None:
        """`where`: the config key or option of `path`, for messages."""
        self.path = Path(path).absolute()
        self._where = where
        self.content = self._read()
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(self.content)
        except RuntimeError:
            raise self._error("is not a SentencePiece model") from None
        self.vocab_size: int = self.processor.vocab_size()
        self.eod_id: int = self.processor.eos_id()
        if self.eod_id < 0:
            raise self._error("has no end-of-sentence id (</s>), which marks the end of a document")
        self.fingerprint: str = hashlib.sha256(self.content).hexdigest()
        self._after_cut = self._form_after_cut()
        self._words = words_of(self.processor)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [num_tokens]; no begin- or end-of-document id is added.

        A text of more than 65,536 characters is cut between words and encoded in parts. With a BPE model whose pieces
        do not span words, such as LLaMA's, this changes no id. A unigram model may choose another division of a word
        where two divisions are equally likely to within rounding. If a million characters contain no place between
        words, the text is cut anywhere, which may add a space.
        """
        if not texts:
            return []
        ids: list[np.ndarray] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = texts[start : start + _TEXTS_AT_ONCE]
            if max(map(len, batch)) <= _PART_CHARACTERS:
                ids += self._encode(batch)
            else:
                ids += map(self._encode_parts, batch)
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Like `encode`, with `eod_id` after every document; int32 [num_tokens + 1]."""
        return [np.append(ids, np.int32(self.eod_id)) for ids in self.encode(texts)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` [num_tokens]; control tokens such as `eod_id` produce no text."""
        return self.processor.decode(np.asarray(ids).tolist())

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes load the file themselves
        return (_load_same, (self.path, self._where, self.fingerprint))

    def _encode_parts(self, text: str) -> np.ndarray:
        parts = self._parts(text)
        return np.concatenate([self._encode([part])[0] for part in parts])

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._words is not None:
            return self._words.encode(texts)
        # One thread, because many processes encode on the same machine (data-parallel ranks, pool workers).
        return self.processor.encode(list(texts), out_type="numpy", num_threads=1)

    def _parts(self, text: str) -> Iterator[str]:
        start, prefix = 0, ""
        while len(text) - start > _PART_CHARACTERS:
            last = start + _MAX_PART_CHARACTERS
            words = self._after_cut is not None
            place = _BETWEEN_WORDS.search(text, start + _PART_CHARACTERS, last) if words else None
            if place is None and len(text) <= last:
                break
            yield prefix + text[start : place.start() if place else last]
            start, prefix = (place.end(), self._after_cut or "") if place else (last, "")
        yield prefix + text[start:]

    def _form_after_cut(self) -> str | None:
        """What a part must begin with, in place of the space at which the text was cut, to keep the ids unchanged.

        None if nothing keeps them. The ids of a BPE model are kept; those of a unigram model are kept except for words
        with two equally likely divisions.
        """
        processor = self.processor
        if not keeps_words_apart(processor):
            return None
        whole = processor.encode("ab cd")
        forms = [form for form in ("", " ") if processor.encode("ab") + processor.encode(form + "cd") == whole]
        return forms[0] if forms else None

    def _read(self) -> bytes:
        if not self.path.is_file():
            raise self._error("does not exist" if not self.path.exists() else "is not a file")
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from None
        if not model:  # the library accepts zero bytes as a model without pieces
            raise self._error("is empty (0 bytes)")
        return model

    def _error(self, what: str) -> UserError:
        if self._where:
            return UserError(Problem(self._where, f"{self.path} {what}", f"give {_TRAIN_ONE}"))
        return UserError(Problem(str(self.path), what, f"give {_TRAIN_ONE}"))


@lru_cache(maxsize=1)  # a worker process gets the same tokenizer with every shard
def _load_same(path: Path, where: str, fingerprint: str) -> SentencePieceTokenizer:
    """The tokenizer that was pickled.

    Raises:
        UserError: the file at `path` has been replaced since, or can no longer be read.
    """
    tokenizer = SentencePieceTokenizer(path, where)
    if tokenizer.fingerprint != fingerprint:
        found = f"{path} was replaced by another model while this run was using it"
        raise UserError(
            Problem(where or str(path), found, "restore the original file, or start again with a new output")
        )
    return tokenizer
