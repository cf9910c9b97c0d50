"""Text to token ids and back, by a SentencePiece model file (a LLaMA `tokenizer.model` works as it is)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from megastruct.errors import Problem, UserError

_TRAIN_ONE = "a SentencePiece model file, for example a LLaMA tokenizer.model or what tools/train_tokenizer.py writes"


class Tokenizer:
    """A SentencePiece model.

    Attributes:
        path: absolute path of the model file.
        vocab_size: number of ids; all ids are in [0, vocab_size).
        eod_id: the end-of-document id (the model's `</s>`); it follows every document and never occurs inside one.
        fingerprint: sha256 of the file in hex.

    Raises:
        UserError: the file is missing, is not a SentencePiece model, or defines no end-of-sentence id.
    """

    def __init__(self, path: str | Path, where: str = "") -> None:
        """`where` names the key or option that `path` came from in error messages."""
        self.path = Path(path).absolute()
        self._where = where
        model = self._read()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise self._error("is not a SentencePiece model") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.eod_id: int = self._processor.eos_id()
        if self.eod_id < 0:
            raise self._error("has no end-of-sentence id (</s>), which marks the end of a document")
        self.fingerprint: str = hashlib.sha256(model).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [num_tokens]; no begin- or end-of-document id is added."""
        if not texts:
            return []
        # One thread: every process that encodes is one of many on its machine (data-parallel ranks, pool workers).
        return self._processor.encode(list(texts), out_type="numpy", num_threads=1)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, and every document ends with `eod_id`; int32 [num_tokens + 1]."""
        return [np.append(ids, np.int32(self.eod_id)) for ids in self.encode(texts)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` [num_tokens]; ids of control tokens such as `eod_id` give no text."""
        return self._processor.decode(np.asarray(ids).tolist())

    def __reduce__(self):  # worker processes load the file themselves
        return (Tokenizer, (self.path, self._where))

    def _read(self) -> bytes:
        if not self.path.is_file():
            raise self._error("does not exist" if not self.path.exists() else "is not a file")
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from None
        if not model:  # the library takes zero bytes for a model without pieces
            raise self._error("is empty (0 bytes)")
        return model

    def _error(self, what: str) -> UserError:
        if self._where:
            return UserError(Problem(self._where, f"{self.path} {what}", f"give {_TRAIN_ONE}"))
        return UserError(Problem(str(self.path), what, f"give {_TRAIN_ONE}"))
