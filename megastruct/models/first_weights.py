"""The first weights of a model. Each part's come from random streams that are named by the seed and its full name.

So they do not depend on what draws them. The parts of a stage are drawn side by side by threads, each by one of the
ranks that hold them or shards of them, and sent to the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megastruct.parallel.seeds import Names
from megastruct.structures.sharded import ShardedModule, global_shape


class _Part(NamedTuple):
    """What is drawn at once: a module of a layer, the name of its streams, and the index of the layer."""

    module: ShardedModule
    names: Names
    layer: int


def draw_first_weights(
    layers: Sequence[tuple[str, nn.Module]],
    seed: int,
    group: ProcessGroup | None = None,
    device: torch.device | None = None,
    done: Callable[[nn.Module], None] = lambda layer: None,
) -> None:
    """Fill all weights of the layers, which are given with their full names, one layer after another.

    `group`: the ranks that have the same layers, whole or shards of them, if there are several. Each draws its share
    of the parts, and sends them whole to the others by way of `device`. Collective over the group. Besides the weights
    in their place, a rank holds as many drawn parts as it has threads.
    `done` is called with each layer as soon as it has its weights, in the order of `layers`.
    """
    parts = [part for index, (name, layer) in enumerate(layers) for part in _parts(layer, name, seed, index)]
    size, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    threads = torch.get_num_threads()
    own, drawn = deque(range(rank, len(parts), size)), dict[int, Future[dict[str, Tensor]]]()
    finished = 0
    # One thread for each part: products of this size gain little from more, and then do not depend on their number.
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        for index, part in enumerate(parts):
            while own and own[0] < index + threads * size:
                drawn[own[0]] = pool.submit(parts[own[0]].module.draw_weights, parts[own[0]].names)
                own.popleft()
            for _, layer in layers[finished : part.layer]:
                done(layer)
            finished = part.layer
            weights = drawn.pop(index).result() if index % size == rank else {}
            if group is not None and size > 1:
                weights = _shared(part.module, weights, dist.get_global_rank(group, index % size), group, device)
            part.module.load_whole(weights)
    torch.set_num_threads(threads)  # of this thread; libraries may have one number for all
    for _, layer in layers[finished:]:
        done(layer)


def _parts(module: nn.Module, name: str, seed: int, layer: int) -> Iterator[_Part]:
    """The parts of one named layer. A module that has `draw_weights` draws everything below it."""
    if isinstance(module, ShardedModule):
        yield _Part(module, (seed, "weights", name), layer)
        return
    for child_name, child in module.named_children():
        yield from _parts(child, f"{name}.{child_name}", seed, layer)


def _shared(
    module: ShardedModule, weights: dict[str, Tensor], source: int, group: ProcessGroup, device: torch.device | None
) -> dict[str, Tensor]:
    """The weights that the rank `source` has drawn, on every rank, in float32 as drawn."""
    sent = {}
    for name, parameter in module.named_parameters():
        if name in weights:
            sent[name] = weights[name].to(device)
        else:
            sent[name] = torch.empty(global_shape(parameter), dtype=parameter.dtype, device=device)
        dist.broadcast(sent[name], source, group)
    return sent
