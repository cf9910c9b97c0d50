"""The structure `blockshuffle`."""

from megastruct.structures.blockshuffle.numbers import BlockShuffleNumbers
from megastruct.structures.registry import Structure

STRUCTURE = Structure(BlockShuffleNumbers(), "megastruct.structures.blockshuffle.layers")
