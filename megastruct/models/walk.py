"""The one walk of a micro-batch through named layers, for the whole model and for a stage of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from megastruct.models.block import Block
from megastruct.models.documents import Mask, attention_mask
from megastruct.models.guidance import NOT_EVALUATED, BlockChoices

BLOCK_PREFIX = "blocks."


def walk(
    layers: Iterable[tuple[str, Callable[..., Any]]],
    x: Tensor,
    choices: Sequence[BlockChoices] | None,
    documents: Tensor | None,
    head_dim: int,
) -> Tensor:
    """Run `layers`, (global name, layer), one after the other: ids [b, s] or activations [s/tp, b, h] in and out.

    `choices`: what the guides of every block of the model do. `documents` int32 [b, s]: attention stays inside of them;
    the mask is made once, when the first block has told the dtype of the activations.
    """
    mask: Mask | None = None
    for name, layer in layers:
        if isinstance(layer, Block):
            if documents is not None and mask is None:
                mask = attention_mask(documents, x.dtype, head_dim)
            x = layer(x, choices[int(name.removeprefix(BLOCK_PREFIX))] if choices else NOT_EVALUATED, mask)
        else:
            x = layer(x)
    return x
