"""Which part of a step a kernel, or an operator on a CPU, belongs to.

The names are those of PyTorch's kernels and of the libraries below it. What a name leaves open, such as whose addition
an addition is, the ranges decide that were open when the kernel was launched: those of PyTorch (`Optimizer.step#...`,
`autograd::engine::evaluate_function: ...`, operators), and those of `engine/ranges.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

# Ranges that this project opens.
STEP_RANGE = "megastruct::step"
DATA_RANGE = "megastruct::data"
LOSS_RANGE = "megastruct::loss"
ACCUMULATION_RANGE = "megastruct::gradient_accumulation"
REDUCTION_RANGE = "megastruct::gradient_reduction"
OPTIMIZER_RANGE = "megastruct::optimizer"


class Part(StrEnum):
    """A part of a step's time, in the order in which time that several parts share is counted."""

    PRODUCTS = "products"
    ATTENTION = "attention"
    LOSS = "loss"
    GRADIENT_ACCUMULATION = "gradient_accumulation"
    OPTIMIZER = "optimizer"
    ELEMENT_WISE = "element_wise"
    COLLECTIVES = "collectives"
    STAGE_TRANSFERS = "stage_transfers"
    DATA = "waiting_for_data"
    NOTHING = "nothing_running"


COMPUTE = (
    Part.PRODUCTS,
    Part.ATTENTION,
    Part.LOSS,
    Part.GRADIENT_ACCUMULATION,
    Part.OPTIMIZER,
    Part.ELEMENT_WISE,
)
COMMUNICATION = (Part.COLLECTIVES, Part.STAGE_TRANSFERS)

_COMMUNICATION = re.compile(r"^nccl|^gloo:|^(rccl|mscclpp)", re.IGNORECASE)
_SEND_OR_RECEIVE = re.compile(r"sendrecv|gloo:(send|recv)", re.IGNORECASE)
_ALL_TO_ALL = re.compile(r"all_?to_?all", re.IGNORECASE)
# A fused kernel of the compiler is named after all operators that it has a share of; it does none of their products.
_FUSED = re.compile(r"^triton_(poi|red|per)_|^(graph_\d+_)?cpp_fused")
_ATTENTION = re.compile(
    r"flash|fmha|sdpa|scaled_dot_product|flex_attention|_efficient_attention|mem_eff|attention_(forward|backward|kernel)",
    re.IGNORECASE,
)
_PRODUCT = re.compile(
    r"gemm|gemv|nvjet|cutlass|cublas|xmma|split_?k|(?<![a-z])(add|b|badd)?m[mv](?![a-z])|mkl\w*::\w*linear",
    re.IGNORECASE,
)
_LOSS = re.compile(r"nll_?loss|log_?softmax|cross_?entropy|softmax_?(forward|backward|warp|online)", re.IGNORECASE)
_OPTIMIZER_RANGE = re.compile(rf"^{OPTIMIZER_RANGE}|^Optimizer\.step#|^Optimizer\.zero_grad#")
_OPTIMIZER_NAME = re.compile(r"multi_tensor_apply|fused_adamw?_|adam_?mode|lpnorm", re.IGNORECASE)
_ACCUMULATION = re.compile(rf"^{ACCUMULATION_RANGE}|^{REDUCTION_RANGE}|\bAccumulateGrad$")


def part_of(name: str, ranges: Sequence[str] = ()) -> Part:
    """The part of a kernel or operator called `name`, launched inside of `ranges`, the outermost first.

    Never DATA or NOTHING, which are times in which no kernel runs. Matrix products of the optimizer are the
    optimizer's, its collectives are not.
    """
    if _COMMUNICATION.search(name):
        exchange = any(_ALL_TO_ALL.search(range_) for range_ in (name, *ranges))
        return Part.STAGE_TRANSFERS if _SEND_OR_RECEIVE.search(name) and not exchange else Part.COLLECTIVES
    if any(_OPTIMIZER_RANGE.search(range_) for range_ in ranges):
        return Part.OPTIMIZER
    if any(_ACCUMULATION.search(range_) for range_ in ranges):
        return Part.GRADIENT_ACCUMULATION
    if not _FUSED.search(name):
        if any(_ATTENTION.search(range_) for range_ in (name, *_operators(ranges))):
            return Part.ATTENTION
        if _PRODUCT.search(name):
            return Part.PRODUCTS
    if any(_LOSS.search(range_) for range_ in (name, *ranges)) or LOSS_RANGE in ranges:
        return Part.LOSS
    return Part.OPTIMIZER if _OPTIMIZER_NAME.search(name) else Part.ELEMENT_WISE


def _operators(ranges: Sequence[str]) -> list[str]:
    """The ranges that PyTorch's own operators open, whose names say what all below them is."""
    return [range_ for range_ in ranges if range_.startswith("aten::")]
