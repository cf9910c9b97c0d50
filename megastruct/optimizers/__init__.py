"""Ground floor: the optimizers, one record each. Loads no torch until an optimizer is built."""

from megastruct.optimizers.record import MASTER, Group, Key, Optimizer, Precision, Role
from megastruct.optimizers.registry import ADAMW, OPTIMIZERS, nearest_optimizer, register

__all__ = [
    "ADAMW",
    "MASTER",
    "OPTIMIZERS",
    "Group",
    "Key",
    "Optimizer",
    "Precision",
    "Role",
    "nearest_optimizer",
    "register",
]
