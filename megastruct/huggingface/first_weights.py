"""The first weights of a run from a folder of transformers: dense linears as they are, or projected to the structure.

Letters: N inputs and M outputs of a linear, f FFN width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megastruct.config.schema import Config
from megastruct.data import Tokenizer
from megastruct.errors import Problem, Problems, UserError
from megastruct.huggingface.source import Source, is_zero, read_pieces
from megastruct.huggingface.stock import EMBEDDING, FINAL_NORM, HEAD, HEAD_NORMS
from megastruct.planning.steps import guided_steps
from megastruct.structures import STRUCTURES

_MLP = ("mlp.fc1", "mlp.fc2")


@dataclass
class Projection:
    """How far a linear's projection is from the dense weight: squares of Frobenius norms."""

    name: str
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """The Frobenius norm of the difference, divided by that of the weight."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass
class FirstWeights:
    """Float32 tensors by the names of the run's parameters, and how far the projected linears are from the source."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    projections: list[Projection] = field(default_factory=list)

    def overall(self) -> Projection:
        """All projected linears together."""
        return Projection(
            "all projected linears",
            sum(one.squared_error for one in self.projections),
            sum(one.squared_norm for one in self.projections),
        )


def check_source(source: Source, config: Config, tokenizer: Tokenizer | None) -> None:
    """Raises UserError with everything in the config that does not fit the source.

    `tokenizer`: the run's, whose pieces must have the same ids as in the folder; None: they are not compared.
    """
    model, problems = config.model, Problems()
    ours = {**model.model_dump(), "num_key_value_heads": model.kv_heads, "head_dim": model.attention_head_dim}
    for key, value in source.model_keys().items():
        if ours[key] != value:
            own, theirs = (str(each).lower() if isinstance(each, bool) else each for each in (ours[key], value))
            found = f"{own}, but {source.folder} has {theirs}"
            problems.append(Problem(f"model.{key}", found, f"model.{key}={theirs}"))
    if model.tie_embeddings and not source.tied:
        found = f"true, but {source.folder} has a head of its own"
        problems.append(Problem("model.tie_embeddings", found, "model.tie_embeddings=false"))
    if not model.bias and not problems and (biases := [name for name in _biases(source) if not is_zero(source, name)]):
        found = f"false, but {source.folder} has biases, for example {biases[0]}"
        problems.append(Problem("model.bias", found, "model.bias=true"))
    structure = STRUCTURES[config.ffn.structure]
    if not hasattr(structure.layers.maths, "project"):
        found = (
            f"{structure.name} has no `project` in {structure.layers.maths.__name__}, which makes factors of weights"
        )
        problems.append(Problem("ffn.structure", found, "ffn.structure=dense"))
    if tokenizer is not None:
        problems += _tokenizer_problems(source, config, tokenizer)
    if problems:
        raise UserError(problems, headline=f"the config does not fit {source.folder}")


@torch.no_grad()
def first_weights(source: Source, config: Config) -> FirstWeights:
    """The weights of the model of `config`, which fits the source; guides are the dense weights of the source.

    Biases that the source does not have are zero. Raises UserError if a tensor is missing or has another shape.
    """
    model, weights = config.model, FirstWeights()
    tensors = weights.tensors
    tensors["embedding.weight"] = _read(source, f"{EMBEDDING}.weight", (model.vocab_size, model.hidden_size))
    for index in range(model.num_layers):
        for ours, theirs in source.stock.block_modules().items():
            name = f"blocks.{index}.{ours}"
            weight, bias = _module(source, config, [f"model.layers.{index}.{one}" for one in theirs], ours)
            if ours in _MLP:
                _project(weights, config, index, name, weight)
            else:
                tensors[f"{name}.weight"] = weight
            if bias is not None:
                tensors[f"{name}.bias"] = bias
    weight, bias = _module(source, config, [FINAL_NORM], "final_norm")
    for kind, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            tensors[f"final_norm.{kind}"] = tensor / model.logit_scale
    if not model.tie_embeddings:
        words = tensors["embedding.weight"]
        tensors["head.weight"] = words.clone() if source.tied else _read(source, f"{HEAD}.weight", tuple(words.shape))
    return weights


def _project(weights: FirstWeights, config: Config, index: int, name: str, weight: Tensor) -> None:
    """Add the factors of a linear, and its guide if the run begins with guides."""
    ffn = config.ffn.of_block(index)
    structure = STRUCTURES[ffn.structure]
    m, n = weight.shape
    factors = structure.layers.maths.project(weight, **ffn.sizes)
    names = structure.numbers.factor_shapes(n, m, ffn.sizes)
    weights.tensors |= {f"{name}.{factor}": value for factor, value in zip(names, factors, strict=True)}
    if ffn.is_dense:
        return
    difference = structure.layers.maths.to_dense(*factors).double() - weight.double()
    squares = [float(matrix.square().sum()) for matrix in (difference, weight.double())]
    weights.projections.append(Projection(name, *squares))
    if guided_steps(config):
        weights.tensors[f"{name}_guide.weight"] = weight


def _module(source: Source, config: Config, names: list[str], ours: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a module; gate and value of a gated fc1 become its alternating rows."""
    shape = _shape(config, ours)
    part = (shape[0] // len(names), *shape[1:])
    weight = _joined([_read(source, f"{name}.weight", part) for name in names])
    has_bias = config.model.bias and not ("norm" in ours and config.model.norm == "rmsnorm")
    if not has_bias:
        return weight, None
    absent = [f"{name}.bias" not in source.files for name in names]
    biases = [
        torch.zeros(part[0]) if missing else _read(source, f"{name}.bias", part[:1])
        for name, missing in zip(names, absent, strict=True)
    ]
    return weight, _joined(biases)


def _shape(config: Config, ours: str) -> tuple[int, ...]:
    model, d = config.model, config.model.hidden_size
    kv = model.kv_heads * model.attention_head_dim
    shapes = {
        "attention.query": (model.attention_width, d),
        "attention.key": (kv, d),
        "attention.value": (kv, d),
        "attention.out": (d, model.attention_width),
        "mlp.fc1": (model.fc1_out_features, d),
        "mlp.fc2": (d, model.ffn_hidden_size),
        **dict.fromkeys(HEAD_NORMS, (model.attention_head_dim,)),
    }
    return shapes.get(ours, (d,))


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, 1).flatten(0, 1) if len(parts) > 1 else parts[0]


def _read(source: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = source.tensor(name)
    if tuple(tensor.shape) != shape:
        found = f"{name} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}"
        raise UserError(Problem(str(source.files[name]), found, "download the folder again"))
    return tensor


def _biases(source: Source) -> Iterator[str]:
    modules = [f"model.layers.{i}.{one}" for i in range(source.values["num_hidden_layers"]) for one in _names(source)]
    yield from (f"{module}.bias" for module in [*modules, FINAL_NORM])


def _names(source: Source) -> list[str]:
    return [name for names in source.stock.block_modules().values() for name in names]


def _tokenizer_problems(source: Source, config: Config, tokenizer: Tokenizer) -> Iterator[Problem]:
    pieces = read_pieces(source.folder)
    if tokenizer.vocab_size > config.model.vocab_size:
        found = f"has {tokenizer.vocab_size:,} pieces, but the model {config.model.vocab_size:,} words"
        yield Problem("data.tokenizer", found, "the tokenizer of the imported model")
    if pieces is None:
        return
    ours = tokenizer.pieces()
    other = [piece for piece, index in ours.items() if pieces.get(piece) != index]
    if other:
        found = f"{len(other):,} of its {len(ours):,} pieces have another id in {source.folder}, such as {other[0]!r}"
        advice = "the tokenizer of the imported model, or --ignore-tokenizer to learn the words anew"
        yield Problem("data.tokenizer", found, advice)
