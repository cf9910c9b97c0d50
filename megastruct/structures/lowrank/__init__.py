"""The structure `lowrank`."""

from megastruct.structures.lowrank.numbers import LowRankNumbers
from megastruct.structures.registry import Structure

STRUCTURE = Structure(LowRankNumbers(), "megastruct.structures.lowrank.layers")
