"""The structure `dense`."""

from megastruct.structures.dense.numbers import DenseNumbers
from megastruct.structures.registry import Structure

STRUCTURE = Structure(DenseNumbers(), "megastruct.structures.dense.layers")
