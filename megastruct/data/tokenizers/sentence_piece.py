"""Tokenizers from SentencePiece model files (a LLaMA `tokenizer.model` works unchanged)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece

from megastruct.data.tokenizers.file import Ends, FileTokenizer
from megastruct.data.tokenizers.options import TokenizerOptions, option_name, setting
from megastruct.data.tokenizers.words import keeps_words_apart, words_of
from megastruct.errors import Problem, UserError

_PART_CHARACTERS = 1 << 16  # longer texts are encoded in parts, because memory and time grow faster than the length
_MAX_PART_CHARACTERS = 1 << 20  # even if there is no good place to cut
_TEXTS_AT_ONCE = 64
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")


class SentencePieceTokenizer(FileTokenizer):
    """A SentencePiece model; see `Tokenizer` in protocols.py. Its `</s>` is the end-of-document token unless told.

    Attributes:
        processor: the processor of the SentencePiece library. It never makes a control symbol of text.

    Raises:
        UserError: the file is missing, is not a SentencePiece model, or has no such control symbols.
    """

    file_name = "tokenizer.model"
    _suggestion = "a SentencePiece model: a LLaMA tokenizer.model, or what tools/train_tokenizer.py writes"

    def _load(self) -> int:
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(self._content)
        except RuntimeError:
            raise self._error("is not a SentencePiece model", self._advice()) from None
        self._after_cut = self._form_after_cut()
        self._words = words_of(self.processor)
        return self.processor.vocab_size()

    def _ends(self, options: TokenizerOptions) -> Ends:
        if options.special_tokens_in_text:
            name = option_name("special_tokens_in_text", self._where)
            found = "asked for, but SentencePiece makes no control symbol of text"
            raise UserError(Problem(name, found, f"leave it out, or give a tokenizer.json for {self.path}"))
        eod_id = self.processor.eos_id() if options.eod_token is None else self._control("eod_token", options.eod_token)
        if eod_id < 0:
            found = "has no end-of-sentence id (</s>), which marks the end of a document"
            names = self._controls()
            raise self._error(found, setting("eod_token", self._where, f"'{names[0]}'") if names else None)
        bos_id = self._control("bos_token", options.bos_token) if options.bos_token else None
        pieces = self.processor.id_to_piece([eod_id, *([] if bos_id is None else [bos_id])])
        kept = TokenizerOptions(pieces[0], "".join(pieces[1:]), False)
        return Ends(eod_id, bos_id, kept, eod_id == self.processor.eos_id() and bos_id is None)

    def _control(self, key: str, piece: str) -> int:
        """The id of a control symbol that the user named."""
        found = self.processor.piece_to_id(piece)
        if not self.processor.is_control(found):
            names = ", ".join(self._controls()) or "none"
            raise UserError(
                Problem(
                    option_name(key, self._where),
                    f"{piece!r} is no control symbol of {self.path}",
                    f"one of its control symbols: {names}",
                )
            )
        return found

    def _controls(self) -> list[str]:
        processor = self.processor
        return [processor.id_to_piece(id_) for id_ in range(processor.vocab_size()) if processor.is_control(id_)]

    def _advice(self) -> str | None:
        """Llama 3's own tokenizer.model has another format."""
        is_tiktoken = re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", self._content.split(b"\n", 1)[0].strip())
        return "give the tokenizer.json of the same model, because this is a file of tiktoken" if is_tiktoken else None

    def pieces(self) -> dict[str, int]:
        """As in `Tokenizer`."""
        pieces = self.processor.id_to_piece(list(range(self.vocab_size)))
        return {piece: index for index, piece in enumerate(pieces)}

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

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` [num_tokens]; control tokens such as `eod_id` produce no text."""
        return self.processor.decode(np.asarray(ids).tolist())

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
