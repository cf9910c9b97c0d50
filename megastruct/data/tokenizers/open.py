"""The registry of kinds of tokenizers. The ending of a file's name decides its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megastruct.data.protocols import Tokenizer
from megastruct.data.tokenizers.sentence_piece import SentencePieceTokenizer

# The longest ending that fits counts. A SentencePiece model may have any name.
TOKENIZERS: dict[str, Callable[[str | Path, str], Tokenizer]] = {"": SentencePieceTokenizer}


def open_tokenizer(path: str | Path, where: str = "") -> Tokenizer:
    """The tokenizer in the file at `path`. `where` is the config key or option of the path, for messages.

    Raises:
        UserError: the file is missing, is not a tokenizer of its kind, or defines no end-of-document id.
    """
    ending = max((ending for ending in TOKENIZERS if str(path).endswith(ending)), key=len)
    return TOKENIZERS[ending](path, where)
