"""Ground floor: structured matrices, one folder per structure, and nothing about a structure anywhere else.

numbers.py         the numbers of a structure, without torch: sizes, weights, communication, what must divide
sizes.py           ranks and numbers of blocks, which several structures have
registry.py        the registry of all structures
layers.py          the torch half of a structure; its layers are given sizes and a tensor-parallel group only
linear.py          a linear layer of one process
sharded.py         a linear layer of which every tensor-parallel rank holds a part
guide.py           the dense guide beside a structured layer in self-guided training
dense/ lowrank/ blockdense/ blockshuffle/
block_product.py, block_sharding.py, draws.py, orthonormal.py, spectral.py, truncation.py      what some of them share

Importing this room loads no torch.
"""

from megastruct.structures.registry import DENSE, STRUCTURES, Structure, known_sizes, nearest_name, register
from megastruct.structures.registry import _register_all as _register_all

_register_all()

__all__ = ["DENSE", "STRUCTURES", "Structure", "known_sizes", "nearest_name", "register"]
