"""The registry of kinds of tokenizers. The ending of a file's name decides its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megastruct.data.protocols import Tokenizer
from megastruct.data.tokenizers.hugging_face import HuggingFaceTokenizer
from megastruct.data.tokenizers.options import TokenizerOptions
from megastruct.data.tokenizers.sentence_piece import SentencePieceTokenizer
from megastruct.errors import Problem, UserError

Opener = Callable[[Path, str, TokenizerOptions], Tokenizer]

# The longest ending that fits counts. A SentencePiece model may have any name.
TOKENIZERS: dict[str, Opener] = {
    "": SentencePieceTokenizer,
    ".json": HuggingFaceTokenizer,
}
_OF_SLOW_ONES = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "*.tiktoken")


def open_tokenizer(path: str | Path, where: str = "", options: TokenizerOptions | None = None) -> Tokenizer:
    """The tokenizer in the file at `path`. Of a folder, its tokenizer.json is taken, or else its tokenizer.model.

    `where` is the config key or option of the path, for messages. `options`: see `TokenizerOptions`.

    Raises:
        UserError: the file is missing, is not a tokenizer of its kind, or its end-of-document token is not known.
    """
    file = Path(path)
    if file.is_dir():
        file = _file_in(file, where)
    ending = max((ending for ending in TOKENIZERS if file.name.endswith(ending)), key=len)
    return TOKENIZERS[ending](file, where, options or TokenizerOptions())


def _file_in(folder: Path, where: str) -> Path:
    names = [HuggingFaceTokenizer.file_name, *(f"tokenizer{ending or '.model'}" for ending in TOKENIZERS)]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = f"has no {HuggingFaceTokenizer.file_name} and no {SentencePieceTokenizer.file_name}"
    suggestion = "give the file of a tokenizer, or a folder that has one"
    if slow := sorted(file.name for pattern in _OF_SLOW_ONES for file in folder.glob(pattern)):
        found += f", only {', '.join(slow)}"
        suggestion = f"convert it, then give {folder}-fast: {conversion(folder)}"
    if where:
        raise UserError(Problem(where, f"{folder} {found}", suggestion))
    raise UserError(Problem(str(folder), found, suggestion))


def conversion(folder: Path) -> str:
    """A command that writes the tokenizer.json of a folder of transformers into another folder."""
    code = f"from transformers import AutoTokenizer as T; T.from_pretrained({str(folder)!r}).save_pretrained"
    return f'python -c "{code}({str(folder) + "-fast"!r})"'
