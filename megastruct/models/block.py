"""One transformer block, pre-norm: x + attention(norm x), then x + mlp(norm x)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megastruct.config.schema import Recompute
from megastruct.models.attention import Attention
from megastruct.models.documents import Mask
from megastruct.models.guidance import NOT_EVALUATED, BlockChoices
from megastruct.models.mlp import MLP
from megastruct.models.recompute import contexts

# All blocks share one limit, because they share their code: dense and structured blocks, training and evaluation, and,
# with guides, every choice of the two linears.
COMPILED_VARIANTS = 32


class Block(nn.Module):
    """A transformer block.

    `recompute`: what runs again in the backward. True: all, only the input is kept. "selective": what `recompute.py`
    does not keep.
    """

    def __init__(
        self, attention: Attention, mlp: MLP, attention_norm: nn.Module, mlp_norm: nn.Module, recompute: Recompute
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.recompute = recompute

    def forward(self, x: Tensor, choices: BlockChoices = NOT_EVALUATED, mask: Mask | None = None) -> Tensor:
        """Map x [s/tp, b, h] to [s/tp, b, h].

        `choices`: what the guides of the FFN do, if there are any. `mask`: the attention mask if documents are
        separate.
        """
        if self.recompute and self.training:
            # Nothing inside is random (choices are made before), so no generator state is needed for the second
            # forward.
            run = partial(checkpoint, self._forward, x, choices, mask, use_reentrant=False, preserve_rng_state=False)
            return run(context_fn=contexts) if self.recompute == "selective" else run()
        return self._forward(x, choices, mask)

    def _forward(self, x: Tensor, choices: BlockChoices, mask: Mask | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x), choices)


def compile_blocks(module: nn.Module, seq_length: int, device: torch.device) -> None:
    """Compile every block below `module`, for sequences of this length."""
    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    for block in module.modules():
        if isinstance(block, Block):
            block.attention.rotary.tables(seq_length, device)  # outside the compiled program
            block.compile()
