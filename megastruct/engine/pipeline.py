"""The same layers as a DeepSpeed pipeline, one stage per rank of the pipe axis.

What crosses a stage border is one tensor, the activations [s/tp, b, h]; every tensor-parallel rank sends its own part.
Where attention stays inside of documents, a second one goes with it and gets no gradient: the documents int32 [b, s],
whole on every rank, which the first stage makes of the ids. So no stage between the first and the last reads data.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megastruct.config.schema import Config
from megastruct.models.documents import document_ids
from megastruct.models.gpt import EMBEDDING, HEAD, NamedLayer, named_layers
from megastruct.models.guidance import Guidance
from megastruct.models.mlp import MLP
from megastruct.models.walk import walk
from megastruct.parallel.groups import TensorGroup
from megastruct.parallel.topology import Topology
from megastruct.planning.cost import layer_costs
from megastruct.planning.stages import balanced_stages

TIED_PREFIX = "tied_modules."


class GPTPipeline(PipelineModule):
    """One stage of the decoder. Only the stage's own layers are built; their weights depend on names alone."""

    def __init__(
        self,
        config: Config,
        topology: Topology,
        tp: TensorGroup,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        guidance: Guidance | None = None,
        eod_id: int | None = None,
    ) -> None:
        """`guidance` and `eod_id` as in `GPT`. The weights hold uninitialised memory. Collective over the world."""
        layers = named_layers(config, tp, guided=guidance is not None)
        self.layer_names = [layer.name for layer in layers]
        self.stage_costs = [layer.forward_flops for layer in layer_costs(config)]
        if config.model.tie_embeddings:
            self.layer_names.append(HEAD)
        built: dict[str, nn.Module] = {}
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its partition with print()
            super().__init__(
                layers=_layer_specs(config, layers, built),
                topology=deepspeed_topology(topology),
                loss_fn=loss_fn,
                partition_method="balanced",
            )
        self.guidance, self.eod_id, self.head_dim = guidance, eod_id, config.model.attention_head_dim
        self.own_layers = list(built.items())  # of this stage, with the names that hold in every layout

    @property
    def data_parallel_group(self) -> Any:
        """The process group of the replicas of this rank's part of the model."""
        return self._grid.get_data_parallel_group()

    @property
    def replica_group(self) -> Any:
        """The process group of all stages and tensor-parallel ranks of one replica."""
        return self._grid.get_model_parallel_group()

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """One micro-batch through the stage: ids [b, s] or what crosses a border in, the same or logits out."""
        documents = None
        if isinstance(x, tuple):
            x, documents = x
        elif self.eod_id is not None:
            documents = document_ids(x, self.eod_id)
        choices = self.guidance.choices() if self.guidance else None
        layers = zip(self.layer_names[self._local_start :], self.forward_funcs, strict=False)
        y = walk(layers, x, choices, documents, self.head_dim)
        return y if documents is None or self.stage_id == self.num_stages - 1 else (y, documents)

    def drop_guides(self) -> None:
        """Free the guides of all blocks of this stage."""
        self.guidance = None
        for module in self.modules():
            if isinstance(module, MLP):
                module.drop_guides()

    def _partition_layers(self, method: str = "balanced") -> None:
        """Called by PipelineModule: cut where the most expensive stage is cheapest, from the analytic FLOPs.

        DeepSpeed's own methods count layers, or build every layer on every rank to count its parameters.
        """
        self.parts = balanced_stages(self.stage_costs, self.num_stages)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    def canonical_name(self, name: str) -> str:
        """DeepSpeed's `3.mlp.fc1.weight` or `tied_modules.embedding.weight` -> the layout's own name."""
        if name.startswith(TIED_PREFIX):
            return name.removeprefix(TIED_PREFIX)
        index, _, rest = name.partition(".")
        return f"{self.layer_names[int(index)]}.{rest}"


def deepspeed_topology(topology: Topology) -> PipeModelDataParallelTopology:
    """The same grid of ranks as DeepSpeed's class."""
    return PipeModelDataParallelTopology(num_pp=topology.pp_size, num_mp=topology.tp_size, num_dp=topology.dp_size)


def _layer_specs(config: Config, layers: list[NamedLayer], built: dict[str, nn.Module]) -> list[LayerSpec]:
    if not config.model.tie_embeddings:
        return [_Spec(layer, built) for layer in layers]
    embedding, *others = layers
    head = _TiedSpec(embedding, built, forward_fn=lambda module, x: module.project(x))
    return [_TiedSpec(embedding, built), *[_Spec(layer, built) for layer in others], head]


class _Spec(LayerSpec):
    """Builds a named layer, on the stages that own it, and notes it in `built`; its weights are drawn later."""

    def __init__(self, layer: NamedLayer, built: dict[str, nn.Module]) -> None:
        super().__init__(nn.Module)
        self.layer, self.built = layer, built

    def build(self, log: bool = False) -> nn.Module:
        return self.built.setdefault(self.layer.name, self.layer.build())


class _TiedSpec(TiedLayerSpec):
    """The embedding, on the first stage and, as the head, on the last; DeepSpeed sums the two gradients."""

    def __init__(
        self,
        layer: NamedLayer,
        built: dict[str, nn.Module],
        forward_fn: Callable[[Any, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(EMBEDDING, nn.Module, forward_fn=forward_fn, tied_weight_attr="weight")
        self.layer, self.built = layer, built

    def build(self, log: bool = False) -> nn.Module:
        return self.built.setdefault(self.layer.name, self.layer.build())
