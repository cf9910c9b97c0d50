"""Which documents are held out: a pure function of the content, so that all readers and tools agree."""

from __future__ import annotations

import hashlib


def is_validation(content: bytes, validation_fraction: float) -> bool:
    """Whether a document with this UTF-8 text is held out; true for about `validation_fraction` of all documents.

    Copies of a document are always in the same split.
    """
    position = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
    return position < validation_fraction * 2**64
