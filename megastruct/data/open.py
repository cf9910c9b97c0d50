"""Open the data of a run. All checks of the data happen here, before a model is built."""

from __future__ import annotations

from collections.abc import Callable

from megastruct.data.options import DataOptions
from megastruct.data.protocols import TrainingData
from megastruct.data.text.open import open_text
from megastruct.data.tokens.open import open_tokens

# The registry of kinds of training data, by `data.kind`.
KINDS: dict[str, Callable[[DataOptions], TrainingData]] = {"tokens": open_tokens, "text": open_text}


def open_data(options: DataOptions) -> TrainingData:
    """Find and check the data of a run.

    Raises:
        UserError: data is missing, damaged or does not fit the config; all problems are reported at once.
    """
    return KINDS[options.data.kind](options)
