"""The keys and values of the tokens that a decoder has read.

A row's token at position p is in slot p, so rows of unequal length begin together and end apart; what stands in a slot
beyond a row's length is never read. Only key/value heads are kept: a model with grouped heads needs less memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megastruct.config.model import ModelConfig


class KeyValueCache:
    """Room for `num_slots` tokens of `batch` rows.

    Attributes:
        keys: [num_layers, b, kv_heads, num_slots, dh]; rotated.
        values: the same shape.
    """

    def __init__(
        self, model: ModelConfig, batch: int, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (model.num_layers, batch, model.kv_heads, num_slots, model.attention_head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    @property
    def num_slots(self) -> int:
        """Tokens of a row for which there is room."""
        return self.keys.shape[3]

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def write_prompt(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Fill the first s slots with keys and values [s, b, kv_heads, dh]."""
        for cache, new in ((self.keys, keys), (self.values, values)):
            cache[layer, :, :, : len(new)] = new.permute(1, 2, 0, 3)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
