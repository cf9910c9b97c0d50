"""The tensors of a stock class, from a model whose structured linears are multiplied out by `to_dense`.

Rotary features, grouped heads and the order of heads are those of transformers already, so nothing is permuted.
Letters: d hidden size, dh head_dim, f FFN width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from megastruct.config.schema import Config
from megastruct.huggingface.stock import EMBEDDING, FINAL_NORM, GATED_NAMES, HEAD, Variant
from megastruct.models.gpt import GPT
from megastruct.structures.sharded import ShardedLinear

_QUERY, _KEY_VALUE, _OUT = "attention.query", ("attention.key", "attention.value"), "attention.out"
_ADDED_TO_THE_STREAM = (_OUT, "mlp.fc2")


@torch.no_grad()
def merged_tensors(model: GPT, config: Config, variant: Variant) -> Iterator[tuple[str, Tensor]]:
    """(name in transformers, tensor in float32) of every parameter of the stock class."""
    words = cast(Tensor, model.get_submodule("embedding").weight)  # [v, d]
    yield f"{EMBEDDING}.weight", _without_mean(words, 1) if variant.centred else words
    for index in range(config.model.num_layers):
        block = model.blocks[str(index)]
        for ours, theirs in variant.stock.block_modules().items():
            module = block.get_submodule(ours)
            if isinstance(module, ShardedLinear):
                tensors = _linear(ours, module, config, variant)
            else:
                tensors = _norm(module, variant)
            for kind, tensor in tensors.items():
                if tuple(name.rpartition(".")[2] for name in theirs) == GATED_NAMES:
                    parts = [tensor[0::2], tensor[1::2]]  # gate i is row 2i of fc1, value i is row 2i + 1
                else:
                    parts = [tensor]
                for name, part in zip(theirs, parts, strict=True):
                    yield f"model.layers.{index}.{name}.{kind}", part
    # A factor of the logits is one of the final norm's output.
    for kind, tensor in _norm(model.get_submodule("final_norm"), variant).items():
        yield f"{FINAL_NORM}.{kind}", tensor * config.model.logit_scale
    if not variant.ties(config.model):
        yield f"{HEAD}.weight", words if model.tied else cast(Tensor, model.get_submodule("head").weight)


def _norm(module: nn.Module, variant: Variant) -> dict[str, Tensor]:
    """Weight and, of a LayerNorm, bias: in transformers it always has one."""
    norm = cast(Any, module)
    if variant.stock.norm == "rmsnorm":
        return {"weight": norm.weight}
    return {"weight": norm.weight, "bias": torch.zeros_like(norm.weight) if norm.bias is None else norm.bias}


def _linear(name: str, linear: ShardedLinear, config: Config, variant: Variant) -> dict[str, Tensor]:
    weight = linear.to_dense()
    bias: Tensor | None = linear.bias
    if variant.centred and name in _ADDED_TO_THE_STREAM:
        assert bias is None, "only models without biases are centred"
        weight = _without_mean(weight, 0)
    model = config.model
    if variant.num_heads != model.num_attention_heads:
        heads = (model.kv_heads, model.num_attention_heads // model.kv_heads)
        wanted = (variant.kv_heads, variant.num_heads // variant.kv_heads)
        if name == _OUT:
            weight = _with_zero_heads(weight.T, heads, wanted).T
        elif name == _QUERY or name in _KEY_VALUE:
            shapes = (heads, wanted) if name == _QUERY else ((heads[0], 1), (wanted[0], 1))
            weight = _with_zero_heads(weight, *shapes)
            bias = None if bias is None else _with_zero_heads(bias[:, None], *shapes)[:, 0]
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _without_mean(weight: Tensor, dim: int) -> Tensor:
    """Subtract the mean over the d features of `dim`; computed in float64."""
    return (weight.double() - weight.double().mean(dim, keepdim=True)).to(weight.dtype)


def _with_zero_heads(weight: Tensor, heads: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """[kv_heads * queries_per_kv * dh, n] -> the same with zeros for the heads that `wanted` has in addition.

    `heads`, `wanted`: (kv_heads, queries_per_kv).
    """
    kv_heads, queries = heads
    by_head = weight.unflatten(0, (kv_heads, queries, -1))  # [kv_heads, queries_per_kv, dh, n]
    filled = by_head.new_zeros(*wanted, *by_head.shape[2:])
    filled[:kv_heads, :queries] = by_head
    return filled.flatten(0, 2)
