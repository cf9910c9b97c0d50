r"""A tokenizer.json of byte-level BPE word by word, with a cache of words: the same ids in less time.

These tokenizers divide a text into words by a regular expression, and encode every word alone. A text may therefore be
cut wherever the expression ends a word whatever else the text holds. For the expressions below these places are

    "a b"     before a space that is followed by a visible character: in no word does a space stand behind another
              character, except behind white space
    "a\nb"    after a single line feed between visible characters

Unicode's NFC joins no characters across such places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
from typing_extensions import override

from megastruct.data.tokenizers.tokenizer_json import TokenizerJson, pre_tokenizers
from megastruct.data.tokenizers.words import MAX_WORD_CHARACTERS, WordCache

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT-2's and GPT-NeoX's expression is part of the pre-tokenizer ByteLevel.
_EXPRESSIONS = {
    "Llama 3": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "Qwen": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
}
_ALONE = "\0"  # in place of the space before a word that has none
_LINE_FEED = re.compile(r"\n(?=\S)(?<=\S\n)")
_SPACE = re.compile(r" (?=\S)")
_SPACE_ALONE = re.compile(rf"(?<=\S) (?=\S)| (?={_ALONE})")


def byte_level_words_of(
    found: TokenizerJson, hidden: Set[str], encode: Callable[[Sequence[str]], list[np.ndarray]]
) -> ByteLevelWords | None:
    """A cache of the words of this tokenizer; None if its texts cannot be cut at these places."""
    if not (_divides_as_known(found) and _is_plain(found.values.get("normalizer"))):
        return None
    if found.added.keys() - hidden:
        words = [token for token in found.values["added_tokens"] if token["content"] not in hidden]
        if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in words):
            return None
        if not all(re.fullmatch(r" +|\S+", token["content"]) for token in words):
            return None
        # A run of spaces may be a token, and a word that is a token divides the white space before it.
        return ByteLevelWords(encode, _SPACE_ALONE)
    return ByteLevelWords(encode, _SPACE)


def _divides_as_known(found: TokenizerJson) -> bool:
    steps = pre_tokenizers(found.values)
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return False
    *splits, last = steps
    if not splits:
        return bool(last.get("use_regex", True))
    (split, *more) = splits
    return (
        not more
        and not last.get("use_regex", True)
        and split.get("type") == "Split"
        and split["pattern"].get("Regex") in _EXPRESSIONS.values()
        and split["behavior"] == "Isolated"
        and not split["invert"]
    )


def _is_plain(normalizer: dict[str, Any] | None) -> bool:
    return normalizer is None or normalizer.get("type") == "NFC"


class ByteLevelWords(WordCache):
    """Words with the space before them, which is left out; `_ALONE` stands before a word that has no space."""

    def __init__(self, encode: Callable[[Sequence[str]], list[np.ndarray]], space: re.Pattern[str]) -> None:
        super().__init__()
        self._encode_texts, self._space = encode, space

    @override
    def _cut(self, text: str) -> list[str] | None:
        if _ALONE in text:
            return None
        words = self._space.split(_ALONE + _LINE_FEED.sub(f"\n {_ALONE}", text))
        # In Chinese, base64 or tables of numbers, words are long and hardly recur.
        return words if len(words) * MAX_WORD_CHARACTERS > len(text) else None

    @override
    def _encode_words(self, words: list[str]) -> list[bytes]:
        texts = [word[1:] if word[0] == _ALONE else f" {word}" for word in words]
        return [ids.tobytes() for ids in self._encode_texts(texts)]

    @override
    def _encode_whole(self, text: str) -> np.ndarray:
        return self._encode_texts([text])[0]
