"""Next-token cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megastruct.config.schema import Config
from megastruct.layers.vocabulary import vocab_parallel_cross_entropy
from megastruct.parallel.groups import TensorGroup


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over b x s tokens: logits [s, b, v] of any float dtype, labels int64 [b, s] -> float32 scalar.

    Every row is full, so the mean of micro-batch means is the mean over all tokens.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), labels.t().reshape(-1))


def make_loss(config: Config, tp: TensorGroup) -> Callable[[Tensor, Tensor], Tensor]:
    """The function (logits [s, b, v/tp], labels int64 [b, s]) -> loss, compiled if the config asks for it."""
    if tp.size > 1:
        return partial(vocab_parallel_cross_entropy, vocab_size=config.model.vocab_size, tp=tp)
    return torch.compile(cross_entropy) if config.training.compile else cross_entropy
