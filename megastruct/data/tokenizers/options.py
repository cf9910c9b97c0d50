"""What a user may choose of a tokenizer: the tokens around a document, and what text may become.

The choice is kept beside every copy of a tokenizer, so that a copy is opened as the original was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megastruct.errors import Problem, UserError

OPTIONS_FILE = "tokenizer_options.json"


@dataclass(frozen=True)
class TokenizerOptions:
    """None leaves a choice to the options beside the tokenizer's file, and else to the tokenizer itself.

    Attributes:
        eod_token: the token that ends a document.
        bos_token: the token that begins a document; an empty string: none does.
        special_tokens_in_text: whether text that reads as a special token becomes that token. The end-of-document token
            is never made of text.
    """

    eod_token: str | None = None
    bos_token: str | None = None
    special_tokens_in_text: bool | None = None

    def over(self, others: TokenizerOptions) -> TokenizerOptions:
        """These options, and where they are None those of `others`."""
        return TokenizerOptions(
            self.eod_token if self.eod_token is not None else others.eod_token,
            self.bos_token if self.bos_token is not None else others.bos_token,
            self.special_tokens_in_text if self.special_tokens_in_text is not None else others.special_tokens_in_text,
        )

    def to_json(self) -> bytes:
        """The contents of `OPTIONS_FILE`."""
        return json.dumps(vars(self), indent=1, ensure_ascii=False).encode() + b"\n"


def options_beside(file: Path) -> TokenizerOptions:
    """The options that were kept beside a copy of a tokenizer; all None if there are none.

    Raises:
        UserError: the options cannot be read.
    """
    path = file.with_name(OPTIONS_FILE)
    values = read_json(path, "restore the file, or remove it to choose again")
    try:
        return TokenizerOptions(**values)
    except TypeError as error:
        raise UserError(Problem(str(path), f"does not hold the options of a tokenizer ({error})")) from None


def read_json(path: Path, suggestion: str) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file.

    Raises:
        UserError: the file cannot be read, or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        reason = f"it holds a {type(values).__name__}"
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error)
    raise UserError(Problem(str(path), f"cannot be read as a JSON object: {reason}", suggestion))


def option_name(key: str, where: str) -> str:
    """What a user calls an option: a command's option if `where` is one, and else the key of the config."""
    return f"--{key.replace('_', '-')}" if where.startswith("--") else f"data.{key}"


def setting(key: str, where: str, value: str) -> str:
    """How a user sets an option, ready to be copied."""
    return f"{option_name(key, where)}{' ' if where.startswith('--') else '='}{value}"
