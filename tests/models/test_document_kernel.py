"""Attention inside of documents by FlexAttention's kernels, which train on a GPU only."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from configs import tiny_config
from megastruct.models.block import compile_blocks
from megastruct.models.gpt import GPT

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

EOD = 2


@pytest.mark.parametrize(
    ("kv_heads", "compiled", "recompute", "s"),
    [(4, False, False, 512), (2, False, True, 200), (4, True, False, 200), (2, True, True, 512)],
)
def test_kernel_and_dense_mask_agree(kv_heads: int, compiled: bool, recompute: bool, s: int) -> None:
    """Logits and gradients: in bf16 the kernel is about as far from fp32 as the dense mask is."""
    sizes = {"hidden_size": 128, "ffn_hidden_size": 256, "num_key_value_heads": kv_heads}
    training = {"activation_checkpointing": recompute, "seq_length": s}
    exact = GPT(tiny_config(model=sizes, training=training), eod_id=EOD).cuda()
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(EOD + 1, 64, (3, 3, s), generator=generator)
    batches = torch.where(torch.rand(words.shape, generator=generator) < 0.02, EOD, words).cuda()

    def run(model: GPT, ids: Tensor) -> list[Tensor]:
        model.zero_grad()
        logits = model(ids)
        logits.float().square().mean().backward()
        return [logits.detach().float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)]

    in_blocks = copy.deepcopy(exact).bfloat16()
    dense = copy.deepcopy(in_blocks)
    dense.head_dim = 0  # no kernel
    if compiled:
        compile_blocks(in_blocks, s, torch.device("cuda", torch.cuda.current_device()))
    for ids in batches:
        wanted = run(exact, ids)
        errors = [
            [float((a - b).norm() / b.norm()) for a, b in zip(run(model, ids), wanted, strict=True)]
            for model in (in_blocks, dense)
        ]
        for of_blocks, of_dense in zip(*errors, strict=True):
            assert of_blocks <= 1.5 * of_dense + 2e-3
