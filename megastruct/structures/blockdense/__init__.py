"""The structure `blockdense`."""

from megastruct.structures.blockdense.numbers import BlockDenseNumbers
from megastruct.structures.registry import Structure

STRUCTURE = Structure(BlockDenseNumbers(), "megastruct.structures.blockdense.layers")
