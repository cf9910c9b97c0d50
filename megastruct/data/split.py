"""Which documents are held out: a pure function of a document's content, so all readers and tools agree."""

from __future__ import annotations

import hashlib


def is_validation(content: bytes, validation_fraction: float) -> bool:
    """Whether a document (its text in UTF-8) is held out of training; true for about `validation_fraction` of them.

    Copies of a document fall on the same side, wherever they lie.
    """
    position = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
    return position < validation_fraction * 2**64
