"""megastruct: pretrain transformers whose feed-forward layers are structured matrices.

The names below are the public interface. Each is loaded when it is first used, so that `import megastruct` is quick:

    GPT, load                    a decoder with its first weights; a trained run, with its tokenizer, on a device
    Linear, LowRankLinear, BlockDenseLinear, BlockShuffleLinear      layers for any `torch.nn.Module`
    Config, load_config          the config of a run
    MegastructError, UserError, SizeError      what is raised for wrong use
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megastruct.config import Config, load_config
    from megastruct.errors import MegastructError, SizeError, UserError
    from megastruct.inference.load import load
    from megastruct.models.gpt import GPT
    from megastruct.structures.blockdense.layers import BlockDenseLinear
    from megastruct.structures.blockshuffle.layers import BlockShuffleLinear
    from megastruct.structures.dense.layers import Linear
    from megastruct.structures.lowrank.layers import LowRankLinear

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "BlockDenseLinear",
    "BlockShuffleLinear",
    "Config",
    "Linear",
    "LowRankLinear",
    "MegastructError",
    "SizeError",
    "UserError",
    "load",
    "load_config",
]

_MODULES = {
    "GPT": "models.gpt",
    "BlockDenseLinear": "structures.blockdense.layers",
    "BlockShuffleLinear": "structures.blockshuffle.layers",
    "Config": "config",
    "Linear": "structures.dense.layers",
    "LowRankLinear": "structures.lowrank.layers",
    "MegastructError": "errors",
    "SizeError": "errors",
    "UserError": "errors",
    "load": "inference.load",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
