"""Random seeds derived from names.

A seed is a hash of the names of what it is for (`"weights", "blocks.3.mlp.fc1.weight"`), never a position in a global
random stream. So a weight, a shuffle or a coin toss is the same on every rank, whatever was drawn before it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


Names = tuple[str | int, ...]


def derive_seed(*names: str | int) -> int:
    """A 64-bit seed from a path of names: equal paths give equal seeds, different paths unrelated ones."""
    # repr keeps ("a", 1) apart from ("a", "1"), the separator keeps ("ab", "c") apart from ("a", "bc").
    text = "\x1f".join(repr(name) for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def named_generator(*names: str | int) -> torch.Generator:
    """A CPU generator at the start of the stream named by `names`.

    Weights are drawn on the CPU for every device, because the random streams of different GPUs differ.
    """
    import torch  # here, so that config checks and data tools need not load it

    return torch.Generator().manual_seed(derive_seed(*names))


def draw_normal(shape: tuple[int, ...], std: float, names: Names) -> Tensor:
    """A float32 CPU tensor of `shape`, drawn from N(0, std^2) with the stream named by `names`."""
    import torch

    return torch.empty(shape, device="cpu").normal_(std=std, generator=named_generator(*names))
