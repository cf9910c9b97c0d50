"""The kernel for the attention of one new token, against attention in float64. Without a GPU, Triton interprets it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from marks import needs_gpu

ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# rows, key/value heads, query heads of each, head width, slots, programs that the tokens of a head are divided among
CASES = [(3, 2, 3, 64, 300, 1), (2, 1, 1, 80, 520, 4), (1, 1, 20, 16, 1024, 8), (3, 2, 6, 128, 384, 2)]
# Of values of about 1; in half precision, the output and the weights of the softmax are rounded.
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def check(case: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compare one case; the first row has one token, the second all slots."""
    from megastruct.inference import decode_kernel

    b, kv_heads, group, width, slots, splits = case
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(b, kv_heads * group, width, generator=generator).to(DEVICE, dtype)
    keys, values = torch.randn(2, b, kv_heads, slots, width, generator=generator).to(DEVICE, dtype)
    positions = torch.tensor([0, slots - 1, 130][:b], device=DEVICE)
    if b == 1:
        positions[0] = slots - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_kernel, "num_splits", lambda *sizes: splits)
        found = decode_kernel.attend(q, keys, values, positions)
    mask = (torch.arange(slots, device=DEVICE) <= positions[:, None])[:, None, None]
    grouped = q.view(b, kv_heads, group, width).double()
    wanted = F.scaled_dot_product_attention(grouped, keys.double(), values.double(), attn_mask=mask)
    assert (found.double() - wanted.view_as(found)).abs().max() <= BOUNDS[dtype], (case, dtype)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_equals_attention_in_float64(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.skipif(HAS_GPU, reason="runs on the GPU")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with a PyTorch for GPUs")
def test_equals_attention_in_float64_interpreted() -> None:
    """In a process of its own: Triton reads the variable when a kernel is defined. It interprets no bfloat16."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=120)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with a PyTorch for GPUs")
@pytest.mark.parametrize(
    ("heads", "slots", "wanted"), [(1, 100, 1), (1, 1024, 8), (2, 100_000, 32), (100, 4096, 4), (528, 4096, 1)]
)
def test_few_heads_are_divided(heads: int, slots: int, wanted: int) -> None:
    """Until every processor of 132 has four programs, or a part has 128 tokens, or there are 32 parts."""
    from megastruct.inference.decode_kernel import num_splits

    assert num_splits(heads, slots, 132) == wanted


if __name__ == "__main__":
    for each in CASES:
        for precision in (torch.float32, torch.float16):
            check(each, precision)
