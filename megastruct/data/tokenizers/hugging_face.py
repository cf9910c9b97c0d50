"""Tokenizers from a tokenizer.json of Hugging Face's library tokenizers (Llama 3, GPT-NeoX, Qwen, GPT-2 and others).

The ids of a text are those of transformers with `add_special_tokens=False, split_special_tokens=True`. Added tokens
that are written as markup (`<tool_call>`) but not marked as special are text here, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers

from megastruct.data.tokenizers.byte_level_words import byte_level_words_of
from megastruct.data.tokenizers.file import Ends, FileTokenizer
from megastruct.data.tokenizers.options import TokenizerOptions, option_name
from megastruct.data.tokenizers.tokenizer_json import FILE_NAME, TokenizerJson, chosen_ends, renamed
from megastruct.errors import Problem, UserError

_TEXTS_AT_ONCE = 64
# Every byte that UTF-8 has, and characters that no vocabulary has: known only where all bytes are tokens.
_RARE_TEXT = "".join(map(chr, [*range(0x800), *range(0x800, 0xD800, 0x1000), *range(0xE000, 0x110000, 0x8765)]))


class HuggingFaceTokenizer(FileTokenizer):
    """A tokenizer.json; see `Tokenizer` in protocols.py.

    Attributes:
        json: the parsed file.
        hidden: texts of the added tokens that are made of no text.

    Raises:
        UserError: the file is missing, is no tokenizer.json, or its end-of-document token cannot be told.
    """

    file_name = FILE_NAME
    _suggestion = "a tokenizer.json, as tokenizers and transformers write it"

    def _load(self) -> int:
        # One thread, because many processes encode on the same machine (data-parallel ranks, pool workers).
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            self.json = TokenizerJson(self._content)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise self._error(f"is no tokenizer.json ({reason})") from None
        return max(self.json.vocabulary.values(), default=-1) + 1

    def _ends(self, options: TokenizerOptions) -> Ends:
        chosen = chosen_ends(self.json, self.path, options, self._where)
        ends = {chosen.eod_token or "", *([chosen.bos_token] if chosen.bos_token else [])}
        self._control = self.json.control | ends
        self.hidden = {chosen.eod_token or ""} if chosen.special_tokens_in_text else self.json.markup | ends
        self._library = self._open_library()
        self._refuse_special_tokens_of_text(chosen)
        ids = self.json.vocabulary
        self._is_silent = np.zeros(self.vocab_size, bool)
        self._is_silent[[ids[token] for token in self._control]] = True
        self._words = byte_level_words_of(self.json, self.hidden, self._encode)
        self._lengths = self._byte_lengths()
        return Ends(ids[chosen.eod_token or ""], ids[chosen.bos_token] if chosen.bos_token else None, chosen, False)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [num_tokens]; no begin- or end-of-document id is added."""
        return self._encode(texts) if self._words is None else self._words.encode(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` [num_tokens]; special tokens such as `eod_id` produce no text."""
        known = self._known(ids)
        return self._library.decode(known[~self._is_silent[known]].tolist(), skip_special_tokens=False)

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """As in `Tokenizer`."""
        return super().num_bytes(ids) if self._lengths is None else int(self._lengths[self._known(ids)].sum())

    def _known(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those of `ids` that are tokens: a model may have more words than its tokenizer."""
        found = np.asarray(ids, np.int64)
        return found[found < self.vocab_size]

    def pieces(self) -> dict[str, int]:
        """As in `Tokenizer`."""
        return self.json.vocabulary

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [ids for start in range(0, len(texts), _TEXTS_AT_ONCE) for ids in self._encode_some(texts, start)]

    def _encode_some(self, texts: Sequence[str], start: int) -> Iterator[np.ndarray]:
        batch = list(texts[start : start + _TEXTS_AT_ONCE])
        for encoding in self._library.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array(encoding.ids, np.int32)

    def _open_library(self) -> tokenizers.Tokenizer:
        """The library's tokenizer. Special tokens have other names in it, so that no model makes them of text."""
        values = self.json.changed(self.hidden, first=None)
        digest = hashlib.sha256(self._content).hexdigest()
        unheard = (self._control & self.hidden) - {self.json.unknown}
        names = {token: f"\ufdd0{digest}-{self.json.vocabulary[token]}" for token in unheard}
        try:
            opened = tokenizers.Tokenizer.from_str(json.dumps(renamed(values, names)))
        except Exception as error:  # the library raises nothing more specific
            raise self._error(f"is no tokenizer.json that the library tokenizers reads ({error})") from None
        opened.encode_special_tokens = True
        return opened

    def _refuse_special_tokens_of_text(self, chosen: TokenizerOptions) -> None:
        for key in ("eod_token", "bos_token"):
            token = getattr(chosen, key)
            if token and token == self.json.unknown and self.json.vocabulary[token] in self._encode([_RARE_TEXT])[0]:
                found = f"{token!r} is what {self.path} makes of unknown characters in a text"
                raise UserError(Problem(option_name(key, self._where), found, "name another special token"))
        tokens = sorted(self.hidden - {self.json.unknown})
        hidden = {self.json.vocabulary[token] for token in tokens}
        for token, ids in zip(tokens, self._encode(tokens), strict=True):
            if hidden & set(ids.tolist()):
                key = "bos_token" if token == chosen.bos_token else "eod_token"
                found = f"{self.path} makes the special token {token!r} of ordinary text"
                raise UserError(Problem(option_name(key, self._where), found, "name another special token"))

    def _byte_lengths(self) -> np.ndarray | None:
        """Bytes of each token's text, int64 [vocab_size]; None if the text of a token depends on those around it."""
        if (self.json.values.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        lengths = np.zeros(self.vocab_size, np.int64)
        for text, id_ in self.json.vocabulary.items():  # a character of an ordinary token stands for a byte
            lengths[id_] = len(text.encode()) if text in self.json.added else len(text)
        lengths[self._is_silent] = 0
        return lengths
