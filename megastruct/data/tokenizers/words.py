"""SentencePiece word by word, with a cache of words: the same ids in less time.

Most words of a text have occurred before. BPE merges produce only pieces of the vocabulary, so a text may be cut
between two characters that are adjacent in no piece: its ids are the ids of its parts, concatenated. Where a text is
cut depends on the model:

- A model that takes text unchanged and falls back to bytes (LLaMA's): before every run of spaces and before every line
  feed, tab and carriage return. See `PlainWords`.
- A model that normalises text: at single spaces between visible ASCII characters. No normaliser of SentencePiece
  changes such a space, or its neighbours because of it. See `Words`.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import sentencepiece

SPACE = "\u2581"  # how SentencePiece writes a space
_BETWEEN_ASCII_WORDS = re.compile(r"(?<=[!-~]) (?=[!-~])")
_NORMALISED_BY_ANY = (
    "\ufb01 \uff21e\u0301  \u00bd\u2026\u00a0\t\u3000 \u200bA\r\n\0B"  # every normaliser changes some of it
)
_MAX_WORDS = 1 << 18  # about 40 MB
MAX_WORD_CHARACTERS = 32
_CHARACTERS_AT_ONCE = (
    4096  # short texts are encoded together; more words would leave the CPU's cache before their lookup
)
_WORDS_AT_ONCE = 512  # the library's time grows faster than the length of a text
_MARK = "\0"


def keeps_words_apart(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether no piece spans two words."""
    # A user-defined symbol may contain an ordinary space.
    return not any(SPACE in piece.lstrip(SPACE) or " " in piece for piece in _pieces(processor))


def _pieces(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    return processor.id_to_piece(list(range(processor.vocab_size())))


def _is_word_by_word(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether this is a BPE model in which the ids of a text are the concatenated ids of its words."""
    if not keeps_words_apart(processor) or processor.encode("ab cd") != processor.encode("ab") + processor.encode("cd"):
        return False
    if processor.piece_to_id(SPACE) == processor.unk_id():  # adjacent unknown characters become one id
        return False
    # The scores of a BPE model are the ranks of its merges. Those of a unigram model are logarithms, whose sums over a
    # text are rounded differently from sums over its words.
    scores = processor.get_score(list(range(processor.vocab_size())))
    return all(score == int(score) for score in scores) and min(scores) < -1


def words_of(processor: sentencepiece.SentencePieceProcessor) -> Words | None:
    """A cache of the words of this model; None if the ids of a text are not those of its words."""
    if not _is_word_by_word(processor):
        return None
    plain = processor.normalize(_NORMALISED_BY_ANY) == SPACE + _NORMALISED_BY_ANY.replace(" ", SPACE)
    return PlainWords(processor) if plain and _MARK in _standing_alone(processor, _MARK) else Words(processor)


class WordCache(ABC):
    """A cache of ids by word, which is cleared when it is full. Several threads may use it at once."""

    def __init__(self) -> None:
        self._ids: dict[str, bytes] = {}  # int32, concatenated
        self._lock = threading.Lock()  # several threads may share one tokenizer

    def __len__(self) -> int:
        return len(self._ids)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [num_tokens]; the same as without the cache."""
        ids: list[np.ndarray] = []
        start = num_characters = 0
        for end, text in enumerate(texts, 1):
            num_characters += len(text)
            if num_characters >= _CHARACTERS_AT_ONCE or end == len(texts):
                with self._lock:
                    ids += self._encode(texts[start:end])
                start, num_characters = end, 0
        return ids

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        cut = [self._cut(text) for text in texts]
        unseen = list(set[str]().union(*(words for words in cut if words)).difference(self._ids))
        for start in range(0, len(unseen), _WORDS_AT_ONCE):
            some = unseen[start : start + _WORDS_AT_ONCE]
            self._ids.update(zip(some, self._encode_words(some), strict=True))
        ids = [
            self._encode_whole(text) if words is None else self._joined(words)
            for text, words in zip(texts, cut, strict=True)
        ]
        if len(self._ids) > _MAX_WORDS:
            self._ids.clear()
        else:
            for word in [word for word in unseen if len(word) > MAX_WORD_CHARACTERS]:
                del self._ids[word]
        return ids

    def _joined(self, words: list[str]) -> np.ndarray:
        return np.frombuffer(bytearray().join(map(self._ids.__getitem__, words)), np.int32)

    @abstractmethod
    def _cut(self, text: str) -> list[str] | None:
        """The words of a text; None if the text must, or should, be encoded as a whole."""

    @abstractmethod
    def _encode_words(self, words: list[str]) -> list[bytes]:
        """The ids of each word, int32."""

    @abstractmethod
    def _encode_whole(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [num_tokens]."""


class Words(WordCache):
    """Words of a SentencePiece model that normalises text."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        super().__init__()
        self._processor = processor

    def _cut(self, text: str) -> list[str] | None:
        return _BETWEEN_ASCII_WORDS.split(text)

    def _encode_words(self, words: list[str]) -> list[bytes]:
        return [np.array(self._processor.encode(word), np.int32).tobytes() for word in words]

    def _encode_whole(self, text: str) -> np.ndarray:
        return self._processor.encode(text, out_type="numpy")


class PlainWords(Words):
    """Words of a model that puts a space before a text and leaves its characters unchanged.

    A word begins after a space, or at a character that is in no longer piece. Of several spaces before a word, all but
    the first belong to the word, because there are pieces of several spaces; they are written as `SPACE`.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        super().__init__(processor)
        self._first = _standing_alone(processor, "\n\t\r")
        self._mark_id = processor.encode(_MARK)[-1]

    def _cut(self, text: str) -> list[str] | None:
        if not text or _MARK in text:  # SentencePiece puts no space before an empty text
            return None
        if text[0] == " ":
            text = SPACE + text[1:]
        if "  " in text:
            text = text.replace("  ", " " + SPACE)
        if SPACE in text:
            text = text.replace(SPACE + " ", SPACE + SPACE)
        for character in self._first:
            text = text.replace(character, " " + character)
        words = text.split(" ")
        # In Chinese, base64 or tables of numbers, words are long and hardly recur.
        return words if len(words) * MAX_WORD_CHARACTERS > len(text) else None

    def _encode_words(self, words: list[str]) -> list[bytes]:
        """Encode the words as one text with a mark between them, which is faster than many texts."""
        parts = [word if word[:1] in self._first else " " + word for word in words]
        ids = self._processor.encode(_MARK + _MARK.join(parts) + _MARK, out_type="numpy")
        marks = (ids.itemsize * np.flatnonzero(ids == self._mark_id)).tolist()
        content = ids.tobytes()
        return [content[mark + ids.itemsize : next_mark] for mark, next_mark in pairwise(marks)]


def _standing_alone(processor: sentencepiece.SentencePieceProcessor, characters: str) -> tuple[str, ...]:
    """Those of `characters` that are in no longer piece and known, so that they have the same ids in every text."""
    shared = set("".join(piece for piece in _pieces(processor) if len(piece) > 1))
    return tuple(
        character
        for character in characters
        if character not in shared and processor.unk_id() not in processor.encode(character)
    )
