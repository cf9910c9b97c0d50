"""Embedding, output head and cross-entropy with the vocabulary sharded over tensor-parallel ranks.

No rank sees all logits of a token. Letters: s sequence, b micro-batch, h hidden size, V words, Vt the rank's words, tp
ranks. Rank t has the words [t * c, min((t + 1) * c, V)) with c = ceil(V / tp): the shares are equal, except that the
last is shorter where tp does not divide V. There are no padding rows, because nothing here needs equal shares, so the
global parameter is [V, h] for every tp.
Source of the sharded softmax: Shoeybi et al. 2019 (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from megastruct.layers.embedding import Embedding
from megastruct.parallel.collectives import all_reduce, gather_sequence, reduce_scatter_sequence
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.shards import ShardSpec
from megastruct.parallel.sizes import words_per_rank
from megastruct.structures.dense.layers import Linear
from megastruct.structures.product import linear
from megastruct.structures.sharded import ShardedLayer


class VocabParallelEmbedding(ShardedLayer[Embedding]):
    """The embedding: weight [Vt, h] holds the rank's words.

    `project` is the tied output head, whose logits are multiplied by `logit_scale`.
    """

    weight: nn.Parameter

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TensorGroup, init_std: float = 0.02, logit_scale: float = 1.0
    ) -> None:
        super().__init__(tp)
        self.sizes, self.init_std, self.logit_scale = (vocab_size, hidden_size), init_std, logit_scale
        self.add_parameter("weight", self.sizes, ShardSpec.along(0, tp.size), uneven=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids int64 [b, s], the same on all ranks, to the embeddings [s/tp, b, h] of the rank's own tokens."""
        if self.tp.size == 1:
            return F.embedding(ids.t(), self.weight)
        local, ours = _local_words(ids.t(), self.weight.shape[0], self.sizes[0], self.tp)  # [s, b]
        x = F.embedding(local, self.weight) * ours[..., None]  # [s, b, h], zero for the other ranks' words
        return reduce_scatter_sequence(x, self.tp)

    def project(self, x: Tensor) -> Tensor:
        """Map x [s/tp, b, h] to the logits [s, b, Vt] of the rank's words."""
        return _logits(x, self.weight, self.logit_scale, self.tp)

    @override
    def unsharded(self) -> Embedding:
        return Embedding(*self.sizes, init_std=self.init_std)


class VocabParallelHead(ShardedLayer[Linear]):
    """The untied output head: weight [Vt, h] holds the rank's words; logits are multiplied by `logit_scale`."""

    weight: nn.Parameter

    def __init__(
        self, hidden_size: int, vocab_size: int, tp: TensorGroup, init_std: float = 0.02, logit_scale: float = 1.0
    ) -> None:
        super().__init__(tp)
        self.sizes, self.init_std, self.logit_scale = (hidden_size, vocab_size), init_std, logit_scale
        self.add_parameter("weight", (vocab_size, hidden_size), ShardSpec.along(0, tp.size), uneven=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [s/tp, b, h] to the logits [s, b, Vt] of the rank's words."""
        return _logits(x, self.weight, self.logit_scale, self.tp)

    @override
    def unsharded(self) -> Linear:
        return Linear(*self.sizes, bias=False, init_std=self.init_std)


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int, tp: TensorGroup) -> Tensor:
    """The mean cross-entropy over b x s tokens: logits [s, b, Vt] of any float dtype, labels int64 [b, s] -> float32
    scalar.

    The result equals `models.loss.cross_entropy` of the whole logits, on every rank; the softmax is computed in
    float32. Three numbers per token are communicated: a maximum, a sum and the label's logit. The logits as they came
    in and one float32 per token are kept for the backward.
    """
    return _CrossEntropy.apply(logits, labels.t(), vocab_size, tp, 0.0)[0]


def vocab_parallel_cross_entropy_and_z(
    logits: Tensor, labels: Tensor, vocab_size: int, tp: TensorGroup, z_loss: float
) -> tuple[Tensor, Tensor]:
    """`vocab_parallel_cross_entropy`, and z = z_loss x the mean of log(sum exp(logits))^2, both float32 scalars.

    The gradient of the first is that of their sum, and the second has none: `models.loss.cross_entropy_and_z` of the
    whole logits. Nothing more is communicated or kept.
    """
    loss, z = _CrossEntropy.apply(logits, labels.t(), vocab_size, tp, z_loss)
    return loss, z


def _logits(x: Tensor, weight: Tensor, scale: float, tp: TensorGroup) -> Tensor:
    """Map x [s/tp, b, h] to [s, b, Vt]. The h values of a token are scaled, because its logits are many more."""
    return linear(gather_sequence(x if scale == 1.0 else x * scale, tp), weight)


def _local_words(words: Tensor, num_local: int, vocab_size: int, tp: TensorGroup) -> tuple[Tensor, Tensor]:
    """(row of each word in this rank's shard, 0 for other ranks' words; whether it is this rank's), both [...]."""
    local = words - tp.rank * words_per_rank(vocab_size, tp.size)
    ours = (local >= 0) & (local < num_local)
    return local * ours, ours


class _CrossEntropy(torch.autograd.Function):
    """Forward: log(sum exp(logits)) - logits[label], averaged, and the z term, z_loss x the mean of log_sum^2.

    Backward, local words: (softmax (1 + 2 z_loss log_sum) - one-hot) / tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, tp: TensorGroup, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        logits32 = logits.float()  # [s, b, Vt]
        local, ours = _local_words(labels, logits.shape[-1], vocab_size, tp)  # [s, b]
        maximum = all_reduce(logits32.amax(-1), tp, "max")  # [s, b]
        exp_sum = (logits32 - maximum[..., None]).exp().sum(-1)
        of_label = logits32.gather(-1, local[..., None])[..., 0]
        of_label = torch.where(ours, of_label - maximum, 0.0)
        exp_sum, of_label = all_reduce(torch.stack((exp_sum, of_label)), tp).unbind()
        log_sum = exp_sum.log()
        whole_log_sum = maximum + log_sum
        ctx.save_for_backward(logits, whole_log_sum, local, ours)
        ctx.z_loss = z_loss
        z = z_loss * whole_log_sum.square().mean()
        ctx.mark_non_differentiable(z)
        return (log_sum - of_label).mean(), z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, log_sum, local, ours = ctx.saved_tensors
        scale = gradients[0] / log_sum.numel()
        gradient = (logits.float() - log_sum[..., None]).exp()  # the softmax's share of this rank, [s, b, Vt]
        if ctx.z_loss:
            gradient.mul_((1 + 2 * ctx.z_loss * log_sum)[..., None])
        gradient = gradient.scatter_add(-1, local[..., None], -ours[..., None].float())
        return (gradient * scale).to(logits.dtype), None, None, None, None
