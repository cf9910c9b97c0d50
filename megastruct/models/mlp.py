"""The feed-forward network. It is built with any linears, dense or structured."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from megastruct.config.activations import Activation
from megastruct.models.guidance import NOT_EVALUATED, BlockChoices
from megastruct.parallel.seeds import Names
from megastruct.structures.guide import Choice
from megastruct.structures.sharded import LinearBuilder, ShardedLinear, ShardedModule


class MLP(ShardedModule):
    """fc2(activation(fc1 x)); with a gated activation, fc1 makes gate and value in one map h -> 2f.

    A guide stands beside a structured linear while it is trained with one (`structures/guide.py`).
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        activation: Activation,
        fc1: LinearBuilder,
        fc2: LinearBuilder,
        fc1_guide: LinearBuilder | None = None,
        fc2_guide: LinearBuilder | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation.load()
        fc1_out_features = ffn_hidden_size * activation.fc1_width
        self.fc1 = fc1(hidden_size, fc1_out_features)
        self.fc2 = fc2(ffn_hidden_size, hidden_size)
        self.fc1_guide = fc1_guide(hidden_size, fc1_out_features) if fc1_guide else None
        self.fc2_guide = fc2_guide(ffn_hidden_size, hidden_size) if fc2_guide else None

    def forward(self, x: Tensor, choices: BlockChoices = NOT_EVALUATED) -> Tensor:
        """Map x [s/tp, b, h] to [s/tp, b, h]; `choices` say what the guides of fc1 and fc2 do."""
        y = _linear(self.fc1, self.fc1_guide, x, choices[0])  # [s, b, f/tp] or [s, b, 2f/tp]
        return _linear(self.fc2, self.fc2_guide, self.activation(y), choices[1])

    @override
    @torch.no_grad()
    def draw_weights(self, names: Names) -> dict[str, Tensor]:
        """The linears' from the streams named by `names`; a guide starts as its linear's dense equivalent."""
        *path, name = names
        weights: dict[str, Tensor] = {}
        for linear, guide, suffix in ((self.fc1, self.fc1_guide, "fc1"), (self.fc2, self.fc2_guide, "fc2")):
            whole = linear.draw_unsharded((*path, f"{name}.{suffix}"))
            weights |= {f"{suffix}.{key}": weight.detach() for key, weight in whole.named_parameters()}
            if guide is not None:
                weights[f"{suffix}_guide.weight"] = whole.to_dense()
        return weights

    @property
    @override
    def tensor_rank(self) -> int:
        return self.fc1.tensor_rank

    def drop_guides(self) -> None:
        """Free the guides, if there are any."""
        self.fc1_guide = self.fc2_guide = None


def _linear(linear: ShardedLinear, guide: ShardedLinear | None, x: Tensor, choice: Choice | None) -> Tensor:
    y = linear(x)
    return y if guide is None else guide(x, y, linear.output_bias(), choice)
