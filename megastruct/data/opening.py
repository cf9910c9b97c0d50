"""Helpers for opening any kind of data."""

from __future__ import annotations

from megastruct.errors import Problem, UserError


def check_vocab_size(of_tokenizer: int, of_model: int) -> None:
    """Raise UserError if the model has fewer ids than the tokenizer."""
    if of_model < of_tokenizer:
        found = f"{of_model} is less than the {of_tokenizer} ids of the tokenizer"
        raise UserError(Problem("model.vocab_size", found, f"model.vocab_size={of_tokenizer} or more"))
