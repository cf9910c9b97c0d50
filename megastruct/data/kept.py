"""The documents of a read that have tokens. One place decides which are skipped, in preparation and in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megastruct.data.protocols import Tokenizer
from megastruct.data.sources.documents import Document

NO_TOKENS = "no_tokens"  # the reason for which documents are skipped that the tokenizer's normaliser empties


def tokenised(
    tokenizer: Tokenizer, documents: Sequence[Document], is_wanted: Callable[[Document], bool] = lambda _: True
) -> tuple[list[tuple[Document, np.ndarray]], list[str | None]]:
    """The documents to keep with their ids, and for each of `documents` why it is skipped.

    A normaliser can make nothing of a document that is not white space, such as a zero-width space. It would be
    trained on as a lone end-of-document id, so it is skipped, as an empty one is.

    Args:
        is_wanted: documents for which it is false are neither kept nor skipped.

    Returns:
        (document, ids int32 [num_tokens] with the end-of-document id) of each that is kept; and for each document the
        reason why it is skipped, or None.
    """
    reasons: list[str | None] = [document.broken for document in documents]
    wanted = [i for i, document in enumerate(documents) if not document.broken and is_wanted(document)]
    kept = []
    # An empty text shows which ids every document gets: an end, and with some tokenizers a beginning.
    *tokens, of_nothing = tokenizer.encode_documents([*(documents[i].text for i in wanted), ""])
    for i, ids in zip(wanted, tokens, strict=True):
        if len(ids) > len(of_nothing):
            kept.append((documents[i], ids))
        else:
            reasons[i] = NO_TOKENS
    return kept, reasons
