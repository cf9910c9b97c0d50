"""SentencePiece word by word, with a memory for words: the same ids in less than half the time.

Most words of a text were seen before. In a BPE model of which no piece spans two words, the merges of a word depend on
the word alone, so that the ids of a text are those of its words, one after the other. What counts as a word here is
what lies between single spaces. If the model normalises text, only those spaces count that have a visible ASCII
character on either side: no normaliser of SentencePiece changes these, or its neighbours because of them.
"""

from __future__ import annotations

import re
from itertools import chain

import numpy as np
import sentencepiece

SPACE = "\u2581"  # as SentencePiece writes it
_BETWEEN_WORDS = re.compile(f"(?<=[^ {SPACE}]) (?=[^ {SPACE}])")
_BETWEEN_ASCII_WORDS = re.compile(r"(?<=[!-~]) (?=[!-~])")
_NORMALISED_BY_ANY = "\ufb01 \uff21e\u0301  \u00bd\u2026\u00a0\t\u3000 \u200bA"  # each normaliser changes some of it
_MAX_WORDS = 1 << 17  # about 50 MB
_MAX_WORD_CHARACTERS = 32


def keeps_words_apart(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether no piece spans two words."""
    pieces = (processor.id_to_piece(id_) for id_ in range(processor.vocab_size()))
    # A symbol that a user defined may have a space as it is written in text.
    return not any(SPACE in piece.lstrip(SPACE) or " " in piece for piece in pieces)


def is_word_by_word(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the ids of a text are those of its words: a BPE model that keeps words apart and begins each alike."""
    if not keeps_words_apart(processor) or processor.encode("ab cd") != processor.encode("ab") + processor.encode("cd"):
        return False
    # The scores of a BPE model are the ranks of its merges; those of a unigram model are logarithms, of which sums over
    # a text round otherwise than sums over its words.
    scores = [processor.get_score(id_) for id_ in range(processor.vocab_size())]
    return all(score == int(score) for score in scores) and min(scores) < -1


class Words(dict[str, tuple[int, ...]]):
    """Ids by word; forgets all when it is full."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor
        self._identity = processor.normalize(_NORMALISED_BY_ANY) == SPACE + _NORMALISED_BY_ANY.replace(" ", SPACE)
        self._between_words = _BETWEEN_WORDS if self._identity else _BETWEEN_ASCII_WORDS

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [num_tokens], the same as the processor's."""
        if self._identity and "  " not in text and SPACE not in text and text[:1] != " " and text[-1:] != " ":
            words = text.split(" ")  # the same, faster
        else:
            words = self._between_words.split(text)
        return np.fromiter(chain.from_iterable(map(self.__getitem__, words)), np.int32)

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._processor.encode(word))
        if len(word) <= _MAX_WORD_CHARACTERS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids
