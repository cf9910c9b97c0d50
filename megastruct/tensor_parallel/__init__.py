"""Second floor: the layers of `layers/`, shared by the ranks of a tensor-parallel group that each own s/tp tokens.

A layer is handed its `TensorGroup`; a group of one rank makes it the unsharded layer. Its parameters have the names and
the global meaning that they have there: `parameter.shard_spec` says which part a rank holds (absent: all of it).
"""

from megastruct.tensor_parallel.base import ShardedLayer
from megastruct.tensor_parallel.blockdense import BlockDenseColumnLinear, BlockDenseRowLinear
from megastruct.tensor_parallel.blockshuffle import BlockShuffleColumnLinear, BlockShuffleRowLinear
from megastruct.tensor_parallel.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from megastruct.tensor_parallel.lowrank import LowRankColumnLinear, LowRankRowLinear
from megastruct.tensor_parallel.norm import SequenceParallelLayerNorm, SequenceParallelRMSNorm
from megastruct.tensor_parallel.vocabulary import (
    VocabParallelEmbedding,
    VocabParallelHead,
    vocab_parallel_cross_entropy,
)

# Every structure of ops.cost.STRUCTURES: the linear into the sharded features, and the one out of them.
COLUMN_LINEARS: dict[str, type[ShardedLayer]] = {
    "dense": ColumnParallelLinear,
    "lowrank": LowRankColumnLinear,
    "blockdense": BlockDenseColumnLinear,
    "blockshuffle": BlockShuffleColumnLinear,
}
ROW_LINEARS: dict[str, type[ShardedLayer]] = {
    "dense": RowParallelLinear,
    "lowrank": LowRankRowLinear,
    "blockdense": BlockDenseRowLinear,
    "blockshuffle": BlockShuffleRowLinear,
}

__all__ = [
    "COLUMN_LINEARS",
    "ROW_LINEARS",
    "BlockDenseColumnLinear",
    "BlockDenseRowLinear",
    "BlockShuffleColumnLinear",
    "BlockShuffleRowLinear",
    "ColumnParallelLinear",
    "LowRankColumnLinear",
    "LowRankRowLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
    "SequenceParallelLayerNorm",
    "SequenceParallelRMSNorm",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "vocab_parallel_cross_entropy",
]
