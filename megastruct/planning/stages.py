"""Where a pipeline is cut and what each stage holds, by arithmetic on the list of layers; no layer is built."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from megastruct.config.schema import Config
from megastruct.optimizers import Role
from megastruct.planning.cost import LayerCost, layer_costs


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline: its layers, the parameters that its devices hold together, and each of them alone (less
    where tensor parallelism shares the stage), all and by role."""

    index: int
    layers: tuple[LayerCost, ...]
    parameters: int
    parameters_per_device: int
    parameters_by_role: Mapping[Role, int]

    @property
    def forward_flops(self) -> int:
        """Forward FLOPs per token."""
        return sum(layer.forward_flops for layer in self.layers)

    @property
    def replicated_parameters(self) -> int:
        """The number of parameters that every tensor-parallel rank holds."""
        return sum(layer.replicated_parameters for layer in self.layers)

    @property
    def guide_weights(self) -> int:
        """The number of weights of the guides in self-guided training, which the stage's devices share."""
        return sum(layer.guide_weights for layer in self.layers)

    @property
    def blocks(self) -> list[int]:
        """The indices of its blocks."""
        names = (layer.name for layer in self.layers if layer.name.startswith("blocks."))
        return [int(name.removeprefix("blocks.")) for name in names]

    @property
    def has_embedding(self) -> bool:
        """Whether the embedding is on this stage."""
        return self.layers[0].name == "embedding"

    @property
    def has_head(self) -> bool:
        """Whether the output head is on this stage."""
        return self.layers[-1].name == "head"


def pipeline_stages(config: Config) -> list[Stage]:
    """The stages for `parallel.pp`; a tied head that is not on the embedding's stage has a copy of the weight."""
    layers = layer_costs(config)
    cuts = balanced_stages([layer.forward_flops for layer in layers], config.parallel.pp)
    stages = []
    for index, (start, stop) in enumerate(itertools.pairwise(cuts)):
        held = layers[start:stop]
        if config.model.tie_embeddings and stop == len(layers) and start > 0:
            held = [*held, layers[0]]
        parameters = sum(layer.parameters for layer in held)
        per_device = sum(layer.parameters_per_rank for layer in held)
        by_role = _by_role(held)
        stages.append(Stage(index, tuple(layers[start:stop]), parameters, per_device, by_role))
    return stages


def _by_role(layers: list[LayerCost]) -> dict[Role, int]:
    """The parameters of a device, by what they are to the optimizer."""
    vectors = sum(layer.vectors_per_rank for layer in layers)
    words = sum(layer.parameters_per_rank for layer in layers if layer.name in ("embedding", "head"))
    matrices = sum(layer.parameters_per_rank for layer in layers) - words - vectors
    return {"matrix": matrices, "vocabulary": words, "vector": vectors}


def balanced_stages(costs: list[int], num_stages: int) -> list[int]:
    """Cut the list of layers into stages of at least one layer; returns num_stages + 1 boundaries [0, ..., len(costs)].

    The cost of the largest stage is minimal; among such cuts, the sum of the squares of the stages' costs is minimal.
    """
    totals = [0]
    for cost in costs:
        totals.append(totals[-1] + cost)
    # best[stop] = (largest stage, sum of squares, boundaries) over the first `stop` layers
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, (0,))}
    for stage in range(num_stages):
        nxt: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for stop in range(stage + 1, len(costs) - (num_stages - stage - 1) + 1):
            options = []
            for start, (largest, squares, cuts) in best.items():
                if start < stop:
                    cost = totals[stop] - totals[start]
                    options.append((max(largest, cost), squares + cost * cost, (*cuts, stop)))
            if options:
                nxt[stop] = min(options)
        best = nxt
    return list(best[len(costs)][2])
