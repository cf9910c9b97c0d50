"""The optimizer's state by parameter: of every parameter the fragment that this rank owns.

Under ZeRO a rank owns a contiguous part of each parameter's fp32 master and of the optimizer's state, or nothing of it.
`fragments` gives views of them, to be read into a checkpoint and to be filled from one. Nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn

from megastruct.engine import zero
from megastruct.engine.engine import Engine
from megastruct.optimizers import MASTER


@dataclass
class Fragment:
    """Elements [start, start + n) of a parameter of this rank, flattened row by row: master and state, by kind.

    `tensors`: fp32 [n] each, views of what the optimizer steps.
    """

    name: str
    parameter: nn.Parameter
    start: int
    tensors: dict[str, Tensor]

    def share(self, index: int, count: int) -> Fragment:
        """Part `index` of `count`, equal but for the last ones."""
        length = -(-self.tensors[MASTER].numel() // count)
        tensors = {kind: tensor[index * length : (index + 1) * length] for kind, tensor in self.tensors.items()}
        return Fragment(self.name, self.parameter, self.start + index * length, tensors)


def fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank owns, of each of its parameters by global name. Before the first step the state is zero."""
    _begin_state(engine, 0, only_missing=True)
    zero.link_fragments(engine.zero_optimizer)
    dp_rank = engine.topology.dp_rank(dist.get_rank())
    for name, parameter in engine.named_parameters():
        kinds = engine.state_kinds(parameter)
        start, tensors = zero.own_fragment(engine.zero_optimizer, parameter, engine.zero_stage, dp_rank, kinds)
        if tensors:
            yield Fragment(name, parameter, start, tensors)


def saved_fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank writes of a checkpoint: of what several ranks own, its share."""
    topology = engine.topology
    for fragment in fragments(engine):
        is_part = hasattr(fragment.parameter, "shard_spec")
        if zero.is_tied_copy(fragment.parameter) or not (is_part or engine.tp.rank == 0):
            continue
        if engine.zero_stage == 0:
            fragment = fragment.share(topology.dp_rank(dist.get_rank()), topology.dp_size)
        yield fragment


def begin_restore(engine: Engine, step: int, optimizer_steps: int) -> dict[str, Fragment]:
    """The fragments of an engine after `step` steps, to be filled; then `finish_restore`.

    `optimizer_steps`: those that the optimizer has made, which skipped some and may have made some for a parent run.
    """
    _begin_state(engine, optimizer_steps)
    zero.set_step_counts(engine.deepspeed, step, engine.config.training.batch_sizes.samples(step))
    return {fragment.name: fragment for fragment in fragments(engine)}


def finish_restore(engine: Engine) -> None:
    """Make the weights from the masters, as after an optimizer step. Collective over the data-parallel group."""
    zero.write_weights(engine.zero_optimizer, engine.zero_stage)


def _begin_state(engine: Engine, step: int, only_missing: bool = False) -> None:
    """Give every stepped tensor the optimizer's state after `step` steps, with zeros.

    `only_missing`: if it has none yet.
    """
    state = zero.inner_optimizer(engine.zero_optimizer).state
    for group, tensor in zero.stepped_tensors(engine.zero_optimizer):
        if not (only_missing and state[tensor]):
            state[tensor].clear()  # so that the old state is gone before the new one is made
            state[tensor].update(engine.optimizer_record.begin(group, tensor, step))
