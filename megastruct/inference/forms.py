"""The forms in which a structured linear is computed: its factors, the merged dense weight, or what is faster.

With few tokens the time of a linear is that of reading its weights, which are fewer in the structured form, and of
starting its kernels, of which the merged form has one. With many tokens it is that of the FLOPs, which are fewer in the
structured form. Which wins depends on the device and on the sizes, so it is measured (`crossover.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from megastruct.errors import Problem, UserError
from megastruct.inference.crossover import Crossover, measured_crossover
from megastruct.structures import DENSE
from megastruct.structures.product import linear as product
from megastruct.structures.sharded import ShardedLinear

Form = Literal["structured", "merged", "auto"]


class MergedLinear(nn.Module):
    """y = W x + b with the merged weight [M, N] of a structured linear."""

    def __init__(self, linear: ShardedLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.to_dense(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., N] to [..., M]."""
        return product(x, self.weight, self.bias)


class FasterLinear(nn.Module):
    """Both forms of a structured linear; each call takes the one that is faster for its number of tokens."""

    def __init__(self, linear: ShardedLinear, crossover: Crossover) -> None:
        super().__init__()
        self.structured, self.merged, self.crossover = linear, MergedLinear(linear), crossover

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., N] to [..., M]."""
        merged = self.crossover.merged_is_faster(x.numel() // x.shape[-1])
        return self.merged(x) if merged else self.structured(x)


def use_form(model: nn.Module, form: Form, dtype: torch.dtype) -> None:
    """Replace the structured linears of a model on one process by `form`; dense ones stay as they are.

    structured: the factors. merged: the equal dense weight, made in float32. auto: both, chosen in each call by the
    number of tokens; it takes the memory of both, and the first call for a size, dtype and device measures. The model
    is expected in float32 and is to be cast to `dtype` afterwards.

    Raises UserError for another name.
    """
    if form not in get_args(Form):
        raise UserError(Problem("--form", f"{form!r}; the forms are {', '.join(get_args(Form))}", "--form structured"))
    if form == "structured":
        return
    for parent, name, linear in list(structured_linears(model)):
        new = MergedLinear(linear) if form == "merged" else FasterLinear(linear, measured_crossover(linear, dtype))
        setattr(parent, name, new)


def structured_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, ShardedLinear]]:
    """(parent, attribute, linear) of every linear of a model whose structure is not dense."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, ShardedLinear) and child.linear.numbers.name != DENSE:
                yield parent, name, child
