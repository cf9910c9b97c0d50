"""Next-token cross-entropy, and the z-loss that may be trained with it.

The z-loss keeps the normaliser of the softmax, log(sum exp(logits)), near 0. It is in the gradient of the training loss
only: the value of the loss stays cross-entropy, which can be compared between runs with and without it.
Source: Chowdhery et al. 2022 (arXiv 2204.02311), section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megastruct.config.schema import Config
from megastruct.layers.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_cross_entropy_and_z
from megastruct.parallel.groups import TensorGroup

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over b x s tokens: logits [s, b, v] of any float dtype, labels int64 [b, s] -> float32 scalar.

    Every row is full, so the mean of micro-batch means is the mean over all tokens.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), labels.t().reshape(-1))


def cross_entropy_and_z(logits: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """`cross_entropy`, and z = z_loss x the mean of log(sum exp(logits))^2, both float32 scalars.

    The gradient of the first is that of their sum, and the second has none.
    """
    z = z_loss * logits.float().logsumexp(-1).square().mean()
    return cross_entropy(logits, labels) + (z - z.detach()), z.detach()


def make_loss(config: Config, tp: TensorGroup, note_z: Callable[[Tensor], None] | None = None) -> Loss:
    """The function (logits [s, b, v/tp], labels int64 [b, s]) -> loss, compiled if the config asks for it.

    With `training.z_loss` the gradient is that of the loss and the z term together, and `note_z` is given the z term
    of every call.
    """
    training, vocab_size = config.training, config.model.vocab_size
    if not training.z_loss:
        if tp.size > 1:
            return partial(vocab_parallel_cross_entropy, vocab_size=vocab_size, tp=tp)
        return torch.compile(cross_entropy) if training.compile else cross_entropy
    # On one rank too: `cross_entropy_and_z` takes 4 to 6 bytes per logit more unless it is compiled.
    both: Callable[..., tuple[Tensor, Tensor]] = partial(
        vocab_parallel_cross_entropy_and_z, vocab_size=vocab_size, tp=tp
    )
    if training.compile and tp.size == 1:
        both = torch.compile(cross_entropy_and_z)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        value, z = both(logits, labels, z_loss=training.z_loss)
        if note_z:
            note_z(z)
        return value

    return loss
