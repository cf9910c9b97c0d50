"""Helpers for opening any kind of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megastruct.errors import Problem, UserError

T = TypeVar("T")


def collect(problems: list[Problem], build: Callable[[], T]) -> T | None:
    """What `build` returns, or None with its problems added to `problems`."""
    try:
        return build()
    except UserError as error:
        problems += [Problem("", error.headline)] if error.headline else []
        problems += error.problems
        return None


def check_vocab_size(of_tokenizer: int, of_model: int) -> None:
    """Raise UserError if the model has fewer ids than the tokenizer."""
    if of_model < of_tokenizer:
        found = f"{of_model} is less than the {of_tokenizer} ids of the tokenizer"
        raise UserError(Problem("model.vocab_size", found, f"model.vocab_size={of_tokenizer} or more"))
