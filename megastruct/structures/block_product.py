"""Products with block-diagonal matrices, in layouts that cost no copy.

Shapes: w [B, o, i] maps x [..., B i] to [..., B o]: block l reads the features from l i on and writes those from l o
on; shuffled, block l reads features r B + l and writes s B + l. A tensor [..., F] of T tokens is either token-major
(contiguous) or feature-major (in memory a contiguous [F, T]). cuBLAS reads and writes one matrix per block with any
distance between rows, so the blocks of either layout are strides to it, and so is a shuffle in the feature-major one.

These are operators of their own because the products write straight into their places, which autograd has no word for,
and because the compiler then keeps the layouts that they ask for. They take all dimensions of x as they are: through a
view, the compiler would lay out an element-wise neighbour token-major and copy it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def autocast_pair(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on, as torch's own products have it."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), w.to(dtype)
    return x, w


def is_feature_major(x: Tensor) -> bool:
    return not x.is_contiguous() and x.movedim(-1, 0).is_contiguous()


def _by_block(x: Tensor, nblocks: int, shuffled: bool) -> Tensor:
    """[..., F] -> [B, T, F/B]; a view in both layouts."""
    x = x.reshape(-1, x.shape[-1])
    if shuffled:
        return x.unflatten(1, (-1, nblocks)).permute(2, 0, 1)
    return x.unflatten(1, (nblocks, -1)).transpose(0, 1)


def _empty(x: Tensor, features: int, feature_major: bool) -> Tensor:
    leading = x.shape[:-1]
    return x.new_empty(features, *leading).movedim(0, -1) if feature_major else x.new_empty(*leading, features)


@torch.library.custom_op("megastruct::block_product", mutates_args=())
def block_product(x: Tensor, w: Tensor, shuffled: bool, feature_major: bool) -> Tensor:
    """x [..., B i], w [B, o, i] -> [..., B o] in the layout asked for; `shuffled`, both are to be feature-major."""
    nblocks, out_per_block, _ = w.shape
    y = _empty(x, nblocks * out_per_block, feature_major)
    torch.bmm(_by_block(x, nblocks, shuffled), w.mT, out=_by_block(y, nblocks, shuffled))
    return y


@block_product.register_fake
def _(x: Tensor, w: Tensor, shuffled: bool, feature_major: bool) -> Tensor:
    return _empty(x, w.shape[0] * w.shape[1], feature_major)


@torch.library.custom_op("megastruct::block_product_weight_gradient", mutates_args=())
def block_product_weight_gradient(gradient: Tensor, x: Tensor, nblocks: int, shuffled: bool) -> Tensor:
    """Gradient [..., B o] of the product and its input x [..., B i] -> gradient of w [B, o, i]."""
    return torch.bmm(_by_block(gradient, nblocks, shuffled).mT, _by_block(x, nblocks, shuffled))


@block_product_weight_gradient.register_fake
def _(gradient: Tensor, x: Tensor, nblocks: int, shuffled: bool) -> Tensor:
    return x.new_empty(nblocks, gradient.shape[-1] // nblocks, x.shape[-1] // nblocks)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool, bool], output: Tensor) -> None:
    x, w, ctx.shuffled, ctx.feature_major = inputs
    ctx.save_for_backward(x, w)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    """The gradient of x gets the layout of x. One that arrives in neither layout, or shuffled and token-major, as it
    comes from a residual stream, is copied here."""
    x, w = ctx.saved_tensors
    if ctx.shuffled or not gradient.is_contiguous():
        gradient = gradient.movedim(-1, 0).contiguous().movedim(0, -1)
    by_x = by_w = None
    if ctx.needs_input_grad[0]:
        by_x = block_product(gradient, w.mT, ctx.shuffled, ctx.shuffled or is_feature_major(x))
    if ctx.needs_input_grad[1]:
        by_w = block_product_weight_gradient(gradient, x, w.shape[0], ctx.shuffled)
    return by_x, by_w, None, None


block_product.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.megastruct.block_product])
def _product_flops(x_shape: tuple[int, ...], w_shape: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape[:-1]) * math.prod(w_shape)


@register_flop_formula([torch.ops.megastruct.block_product_weight_gradient])
def _gradient_flops(gradient_shape: tuple[int, ...], x_shape: tuple[int, ...], nblocks: int, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * gradient_shape[-1] // nblocks
