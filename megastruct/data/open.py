"""The one way in: everything that can be wrong with the data is found here, before a model is built."""

from __future__ import annotations

from collections.abc import Callable

from megastruct.data.options import DataOptions
from megastruct.data.protocols import TrainingData
from megastruct.data.text.open import open_text
from megastruct.data.tokens.open import open_tokens

# All kinds of training data, by `data.kind`.
KINDS: dict[str, Callable[[DataOptions], TrainingData]] = {"tokens": open_tokens, "text": open_text}


def open_data(options: DataOptions) -> TrainingData:
    """Find and check the data of a run.

    Raises:
        UserError: anything is missing, damaged or does not fit, with all problems that one look can find.
    """
    return KINDS[options.data.kind](options)
