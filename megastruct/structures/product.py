"""The product with a dense matrix, y = x W^T + b, as fast in bf16 as in fp32 on every CPU.

PyTorch multiplies bf16 matrices on CPUs with oneDNN, but only if the CPU has AVX-512. On others it falls back to plain
loops, which take up to 100 times as long as fp32. There bf16 operands are multiplied in fp32, and only the result is
rounded. Few rows are left to PyTorch, which has a fast kernel for them: reading the weight takes most of their time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

FEW_ROWS = 8  # where the two ways take equally long


def _cpu_multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


_WIDE_ON_CPU = not _cpu_multiplies_bf16()


_partial_sums = False


@contextmanager
def partial_sums(active: bool) -> Iterator[None]:
    """Inside, if `active`, products are terms of a sum over ranks, which is all that the backward needs of them."""
    global _partial_sums
    if not active or torch.compiler.is_compiling():  # the compiler sees for itself what the backward needs
        yield
        return
    _partial_sums = True
    try:
        yield
    finally:
        _partial_sums = False


def makes_partial_sums() -> bool:
    """Whether it is inside of `partial_sums`."""
    return _partial_sums


def autocast_pair(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to autocast's dtype where autocast is on, as torch's own products do; the shapes stay."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), w.to(dtype)
    return x, w


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [..., N] to [..., M]; weight [M, N], bias [M]. As `torch.nn.functional.linear`, autocast included."""
    if _WIDE_ON_CPU and x.device.type == "cpu" and math.prod(x.shape[:-1]) >= FEW_ROWS:
        cast_x, cast_weight = autocast_pair(x, weight)
        if cast_x.dtype == torch.bfloat16:
            return wide_product(cast_x, cast_weight, bias if bias is None else bias.to(torch.bfloat16))
    return F.linear(x, weight, bias)


@torch.library.custom_op("megastruct::wide_product", mutates_args=())
def wide_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map bf16 x [..., N] to bf16 [..., M], multiplied in fp32; bf16 weight [M, N], bias [M].

    An operator of its own keeps the operands for the backward in bf16.
    """
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


@wide_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    rows = gradient.reshape(-1, gradient.shape[-1])  # [T, M]
    by_x = wide_product(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
    by_weight = wide_product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if ctx.needs_input_grad[1] else None
    return by_x, by_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


wide_product.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.megastruct.wide_product])
def _flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape[:-1]) * math.prod(weight_shape)
