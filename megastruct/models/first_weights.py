"""The first weights of a model. Each layer's come from random streams that are named by the seed and its full name.

So they do not depend on what draws them. Layers are drawn side by side by threads, and each by one of the replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup


def draw_first_weights(
    layers: Sequence[tuple[str, nn.Module]],
    seed: int,
    replicas: ProcessGroup | None = None,
    device: torch.device | None = None,
) -> None:
    """Fill all weights of the layers, which are given with their full names.

    `replicas`: the ranks that have the same layers, if there are several. Each draws its share of them, and sends them
    to the others by way of `device`. Collective over the group.
    """
    size, rank = (1, 0) if replicas is None else (dist.get_world_size(replicas), dist.get_rank(replicas))
    threads = torch.get_num_threads()
    # One thread for each layer: products of this size gain little from more, and then do not depend on their number.
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        list(pool.map(partial(_draw, seed=seed), layers[rank::size]))
    torch.set_num_threads(threads)  # of this thread; libraries may have one number for all
    if replicas is None or size == 1:
        return
    for index, (_, layer) in enumerate(layers):
        source = dist.get_global_rank(replicas, index % size)
        for parameter in layer.parameters():
            weight = parameter.detach()
            sent = weight.to(device)
            dist.broadcast(sent, source, replicas)
            weight.copy_(sent)


def _draw(layer: tuple[str, nn.Module], seed: int) -> None:
    init_weights(layer[1], layer[0], seed)


@torch.no_grad()
def init_weights(layer: nn.Module, layer_name: str, seed: int) -> None:
    """Fill all weights of one named layer from the random streams named by (seed, full name of the module).

    A module that has `init_weights` itself fills everything below it.
    """
    own = getattr(layer, "init_weights", None)
    if own is not None:
        own((seed, "weights", layer_name))
        return
    for name, child in layer.named_children():
        init_weights(child, f"{layer_name}.{name}", seed)
