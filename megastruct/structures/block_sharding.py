"""Sharding of the block-diagonal first factor V_b of BlockDense and BlockShuffle over tensor-parallel ranks.

Letters: T = s*b tokens, N inputs, K hidden features (R of BlockDense), B blocks, tp ranks. v is [B, K/B, N/B]. A matrix
[T, K] is token-major or feature-major, as in `block_product.py`; features are exchanged feature-major.

In a row layer (fc2) a rank's N/tp inputs are whole blocks if tp <= B. Its hidden features are then complete, and ranks
only exchange them: a slice of the features for all tokens becomes all features for the rank's own tokens. If tp > B,
tp/B ranks share a block, and each has N/tp of its inputs. They exchange their partial sums in the same way, K/B values
per token and rank, and the receiver adds them. This never costs more than a reduce-scatter of K values, and needs no
second process group.
"""

from __future__ import annotations

from torch import Tensor

from megastruct.parallel.collectives import features_to_tokens
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.shards import Cut, ShardSpec
from megastruct.structures.block_product import block_product
from megastruct.structures.product import autocast_pair
from megastruct.structures.sizes import blocks_divide


def hidden_features(x: Tensor, v: Tensor, feature_major: bool) -> Tensor:
    """Compute V_b x: x [..., N], v [B, K/B, N/B] -> [T, K], in the layout that is asked for."""
    x, v = autocast_pair(x, v)
    return block_product(x.reshape(-1, x.shape[-1]), v, shuffled=False, feature_major=feature_major)


def row_spec(nblocks: int, tp_size: int) -> ShardSpec:
    """How v [B, K/B, N/B] is cut so that rank t has the entries for inputs [t * N/tp, (t+1) * N/tp).

    If tp <= B, each rank has B/tp blocks. If tp > B, the inputs of a block are split over tp/B ranks. Raises ValueError
    if neither of the two numbers divides the other.
    """
    if nblocks % tp_size == 0:
        return ShardSpec.along(0, tp_size)
    if not blocks_divide(nblocks, tp_size):
        raise ValueError(f"{nblocks} blocks over {tp_size} ranks: neither divides the other")
    return ShardSpec((Cut(0, nblocks), Cut(2, tp_size // nblocks)))


def row_hidden_features(x: Tensor, v: Tensor, nblocks: int, tp: TensorGroup, feature_major: bool) -> Tensor:
    """Map x [s, b, N/tp] with the rank's part of v to the hidden features [T/tp, K] of the rank's own tokens.

    The result is feature-major whenever there is an exchange; on one rank it has the layout that is asked for.
    """
    if tp.size == 1:
        return hidden_features(x, v, feature_major)
    partial = hidden_features(x, v, feature_major=True).t()  # [K/tp, T], or [K/B, T] of the inputs of a shared block
    hidden = features_to_tokens(partial, tp)  # [K, T/tp], or [K * tp/B, T/tp]
    if tp.size > nblocks:
        hidden = hidden.unflatten(0, (nblocks, tp.size // nblocks, -1)).sum(1).flatten(0, 1)  # [K, T/tp]
    return hidden.t()
