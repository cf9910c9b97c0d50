"""What a block keeps for its backward with `training.activation_checkpointing: selective`.

Kept are the outputs of products, of attention and of the collectives of tensor parallelism: all that takes long, and
all that several ranks have to run together. Norms, rotary embeddings, activations and sums run again in the backward.
Source: Korthikanti et al. 2022 (arXiv 2205.05198), section 5, the other way round: there attention is what runs again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from megastruct.parallel.collectives import KEPT_COLLECTIVES
from megastruct.structures.block_product import block_product
from megastruct.structures.product import makes_partial_sums, wide_product

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    block_product._opoverload,
    wide_product._opoverload,
    *(operator._opoverload for operator in KEPT_COLLECTIVES),
}


def contexts() -> tuple[Any, Any]:
    """The contexts of the forward and of the second forward, for `torch.utils.checkpoint.checkpoint`."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Partial sums are as large as on one rank, and after their collective nothing needs them: they are made again."""
    kept = operator in KEPT and not makes_partial_sums()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
