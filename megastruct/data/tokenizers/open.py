"""All kinds of tokenizers; which one a file is, the ending of its name says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megastruct.data.protocols import Tokenizer
from megastruct.data.tokenizers.sentence_piece import SentencePieceTokenizer

# Of all endings that fit, the longest counts: a SentencePiece model may have any name.
TOKENIZERS: dict[str, Callable[[str | Path, str], Tokenizer]] = {"": SentencePieceTokenizer}


def open_tokenizer(path: str | Path, where: str = "") -> Tokenizer:
    """The tokenizer in the file at `path`; `where` names the key or option that the path came from in messages.

    Raises:
        UserError: the file is missing, is no such tokenizer, or defines no end-of-document id.
    """
    ending = max((ending for ending in TOKENIZERS if str(path).endswith(ending)), key=len)
    return TOKENIZERS[ending](path, where)
