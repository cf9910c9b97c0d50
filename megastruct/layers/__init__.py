"""First floor: the layers of one process. A layer knows sizes that it was handed: no config, no step, no environment.

Every layer with weights has `init_weights(names)`: it fills them from the random streams named by `names` (the seed
and the layer's full name), so that the weights do not depend on what else is built, in which order or where.
"""

from megastruct.layers.embedding import Embedding
from megastruct.layers.linear import Linear, LinearBuilder
from megastruct.layers.norm import LayerNorm, RMSNorm
from megastruct.layers.structured import LINEARS, BlockDenseLinear, BlockShuffleLinear, LowRankLinear

__all__ = [
    "LINEARS",
    "BlockDenseLinear",
    "BlockShuffleLinear",
    "Embedding",
    "LayerNorm",
    "Linear",
    "LinearBuilder",
    "LowRankLinear",
    "RMSNorm",
]
