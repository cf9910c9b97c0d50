"""Token embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from megastruct.parallel.seeds import Names, draw_normal
from megastruct.structures.linear import SeededLayer
from megastruct.structures.product import linear


class Embedding(SeededLayer):
    """Embedding with weight [vocab, h]. Ids are batch first, [b, s], activations sequence first, [s, b, h]."""

    def __init__(self, vocab_size: int, hidden_size: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids int64 [b, s] to [s, b, h] in the dtype of the weight."""
        return F.embedding(ids.t(), self.weight)

    def project(self, x: Tensor) -> Tensor:
        """The tied output head: x [s, b, h] -> logits [s, b, vocab]."""
        return linear(x, self.weight)

    @override
    @torch.no_grad()
    def init_weights(self, names: Names) -> None:
        self.weight.copy_(draw_normal(tuple(self.weight.shape), self.init_std, (*names, "weight")))
