"""What a tokenizer.json and the files beside it say: the vocabulary, special tokens, and the ends of a document."""

from __future__ import annotations

import json
import re
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

from megastruct.data.tokenizers.options import TokenizerOptions, option_name, read_json, setting
from megastruct.errors import Problem, UserError

FILE_NAME = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
# What models without any config call the token between documents.
_KNOWN_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # <|im_start|>, <tool_call>, [INST]
_DOWNLOAD_AGAIN = "download the folder again"


class AddedToken(NamedTuple):
    """A token that is found in the text itself, before the tokenizer's model sees the rest."""

    text: str
    id: int
    is_special: bool


class TokenizerJson:
    """A parsed tokenizer.json.

    Attributes:
        values: its contents.
        added: its added tokens by their text.
        vocabulary: the ids of all tokens by their text, added tokens included.
        unknown: the text of the token for what is in no other token; None if there is none.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no tokenizer.json.
    """

    def __init__(self, content: bytes) -> None:
        self.values: dict[str, Any] = json.loads(content)
        model = self.values["model"]
        words = model["vocab"]
        base = {row[0]: id_ for id_, row in enumerate(words)} if isinstance(words, list) else dict(words)
        self.added = {
            token["content"]: AddedToken(token["content"], int(token["id"]), bool(token["special"]))
            for token in self.values.get("added_tokens") or []
        }
        self.vocabulary: dict[str, int] = base | {token.text: token.id for token in self.added.values()}
        index = model.get("unk_id")
        self.unknown: str | None = words[index][0] if index is not None else model.get("unk_token")

    @property
    def control(self) -> set[str]:
        """Added tokens that are written nowhere: those that are special."""
        return {token.text for token in self.added.values() if token.is_special}

    @property
    def markup(self) -> set[str]:
        """Added tokens that stand for no text of a document: special ones, and those that are written as markup.

        The others, such as the runs of spaces of GPT-NeoX or words that a user added, are words like any other.
        """
        return self.control | {text for text in self.added if _MARKUP.fullmatch(text)}

    def first_token(self) -> str | None:
        """The token that the post-processor puts before every text."""
        for step in _steps(self.values.get("post_processor"), "processors"):
            if step.get("type") == "TemplateProcessing":
                first = step["single"][0]
                return first["SpecialToken"]["id"] if "SpecialToken" in first else None
        return None

    def changed(self, hidden: Set[str], first: str | None) -> dict[str, Any]:
        """The contents with `hidden` as the only special tokens, and `first` before every text, if it is not None.

        Truncation, padding and dropout, which would change the ids of a text, are off.
        """
        added = [token | {"special": token["content"] in hidden} for token in self.values.get("added_tokens") or []]
        model = self.values["model"]
        model = model | {"dropout": None} if "dropout" in model else model
        off = {"truncation": None, "padding": None}
        return self.values | off | {"added_tokens": added, "model": model, "post_processor": self._before(first)}

    def _before(self, first: str | None) -> dict[str, Any] | None:
        if first is None:
            return None
        before = {"SpecialToken": {"id": first, "type_id": 0}}
        one, two = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
        known = {first: {"id": first, "ids": [self.vocabulary[first]], "tokens": [first]}}
        single, pair = [before, one], [before, one, two]
        return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


def renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The contents with other texts for some tokens."""
    model = values["model"]
    words = model["vocab"]
    if isinstance(words, list):
        words = [[names.get(row[0], row[0]), *row[1:]] for row in words]
    else:
        words = {names.get(word, word): id_ for word, id_ in words.items()}
    added = [token | {"content": names.get(token["content"], token["content"])} for token in values["added_tokens"]]
    return values | {"model": model | {"vocab": words}, "added_tokens": added}


def chosen_ends(found: TokenizerJson, path: Path, options: TokenizerOptions, where: str) -> TokenizerOptions:
    """`options` with both tokens around a document, as texts of added tokens; no beginning is an empty string.

    Raises:
        UserError: a token does not exist, or the token that ends a document cannot be told.
    """
    eod = options.eod_token if options.eod_token is not None else _eod(found, path.parent)
    example = _example(found)
    choose = f"name one of its added tokens, for example {setting('eod_token', where, example)}"
    if not example:
        choose = f"add a special token to {path} with the library tokenizers, and name it"
    if eod is None:
        what = f"cannot be told from {path} and the files beside it: no {_CONFIG} names an eos_token"
        raise UserError(Problem(option_name("eod_token", where), what, choose))
    _check(found, path, "eod_token", eod, where, choose)
    bos = options.bos_token if options.bos_token is not None else _bos(found, path.parent)
    if bos:
        nothing = setting("bos_token", where, "''")
        _check(found, path, "bos_token", bos, where, f"name one of its added tokens, or {nothing} for none")
    return TokenizerOptions(eod, bos, bool(options.special_tokens_in_text))


def _check(found: TokenizerJson, path: Path, key: str, token: str, where: str, suggestion: str) -> None:
    if token not in found.added:
        kind = "an ordinary word" if token in found.vocabulary else "no token"
        raise UserError(Problem(option_name(key, where), f"{token!r} is {kind} of {path}", suggestion))


def _example(found: TokenizerJson) -> str:
    """An added token that may end documents; not the one that stands for unknown text."""
    tokens = sorted(found.added.values(), key=lambda token: (not token.is_special, token.id))
    return next((f"'{token.text}'" for token in tokens if token.text != found.unknown), "")


def _eod(found: TokenizerJson, folder: Path) -> str | None:
    for name in (_CONFIG, "special_tokens_map.json"):
        if token := _text(read_json(folder / name, _DOWNLOAD_AGAIN).get("eos_token")):
            return token
    by_id = {token.id: token.text for token in found.added.values()}
    for name in ("generation_config.json", "config.json"):
        id_ = read_json(folder / name, _DOWNLOAD_AGAIN).get("eos_token_id")
        ids = id_ if isinstance(id_, list) else [id_]
        if len(ids) == 1 and ids[0] in by_id:
            return by_id[ids[0]]
    known = [text for text in _KNOWN_EOD if text in found.added]
    return known[0] if len(known) == 1 else None


def _bos(found: TokenizerJson, folder: Path) -> str:
    """What transformers puts before a text."""
    config = read_json(folder / _CONFIG, _DOWNLOAD_AGAIN)
    add = config.get("add_bos_token")
    if add is None:
        return found.first_token() or ""
    return _text(config.get("bos_token")) or "" if add else ""


def _text(token: Any) -> str | None:
    """A token in a config: its text, or an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the single step that it is."""
    if step is None:
        return []
    return step[key] if step.get("type") == "Sequence" else [step]


def pre_tokenizers(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The steps that divide a text into words."""
    return _steps(values.get("pre_tokenizer"), "pretokenizers")
