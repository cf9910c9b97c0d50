"""A structure of its own, in one folder: the Kronecker product of a large and a small matrix, y = (A ⊗ B) x + b."""

from kronecker.numbers import KroneckerNumbers
from megastruct.structures import Structure

STRUCTURE = Structure(KroneckerNumbers(), "kronecker.layers")
