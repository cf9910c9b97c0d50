"""The plan of a run before it is started: parameters, FLOPs, memory, traffic, and warnings.

It is arithmetic only, and needs no device, process group or torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from megastruct.config.checks import check_batch, ffn_widths
from megastruct.config.schema import Config, FFNConfig
from megastruct.errors import Problem, UserError
from megastruct.parallel.sizes import nearest_multiple
from megastruct.parallel.topology import Topology
from megastruct.planning.cost import (
    ffn_linears,
    ffn_parameters,
    forward_flops_by_part,
    forward_flops_per_token,
    guided_fraction,
    total_parameters,
)
from megastruct.planning.memory import memory_by_part
from megastruct.planning.ownership import optimizer_flops
from megastruct.planning.stages import Stage, pipeline_stages
from megastruct.planning.steps import guided_steps, total_steps, total_tokens, total_training_flops
from megastruct.planning.traffic import linear_bytes_per_token, micro_batches_per_step, traffic_bytes
from megastruct.structures import DENSE, STRUCTURES
from megastruct.structures.numbers import Sizes, share_of_dense
from megastruct.structures.sizes import TILE

UNBALANCED = 1.15  # largest stage over the mean
LONG_BUBBLE = 0.2  # share of the time that a pipeline's stages idle


def make_plan(config: Config, num_devices: int | None = None, dense: Config | None = None) -> dict[str, Any]:
    """The plan as plain values (JSON); its `memory_bytes` are those of the fullest stage.

    `num_devices` None means pp x tp x dp of the config. `dense` is the model whose FLOPs a self-guided run matches, if
    it is not the same model with dense FFNs. Raises UserError if the devices do not divide into the layout, or the
    batch not over the devices.
    """
    parallel = config.parallel
    if num_devices is None:
        num_devices = parallel.pp * parallel.tp * (parallel.dp or 1)
    if num_devices < 1:
        raise UserError(Problem("--num-gpus", f"{num_devices} devices", f"--num-gpus {parallel.pp * parallel.tp}"))
    topology = Topology.of_world(num_devices, parallel.pp, parallel.dp, parallel.tp)
    if problems := list(check_batch(config, topology.dp_size)):
        raise UserError(problems)
    stages = pipeline_stages(config)
    described = [_stage(config, stage, topology.dp_size) for stage in stages]
    forward = forward_flops_per_token(config)
    return {
        "name": config.run.name,
        "parameters": total_parameters(config),
        "ffn_parameters": ffn_parameters(config),
        "ffn": {"structure": config.ffn.structure, **config.ffn.sizes, "share": ffn_share(config, config.ffn)},
        "tokens": total_tokens(config),
        "forward_flops_per_token": forward,
        "training_flops": total_training_flops(config),
        "optimizer_flops_per_step": sum(stage["optimizer_flops"]["total"] for stage in described),
        "flops_share": {part: flops / forward for part, flops in forward_flops_by_part(config).items()},
        "guided_fraction": guided_fraction(config, dense),
        "steps": {"total": total_steps(config), "guided": guided_steps(config)},
        "layout": {"devices": num_devices, "pp": topology.pp_size, "dp": topology.dp_size, "tp": topology.tp_size},
        "micro_batches_per_step": micro_batches_per_step(config, topology.dp_size),
        "ffn_linear_bytes_per_token": linear_bytes_per_token(config, config.ffn),
        "dense_linear_bytes_per_token": linear_bytes_per_token(config, FFNConfig()),
        "memory_bytes": max(described, key=lambda stage: stage["total_memory_bytes"])["memory_bytes"],
        "stages": described,
        "warnings": list(warnings(config, stages, topology.dp_size)),
    }


def ffn_share(config: Config, ffn: FFNConfig) -> float:
    """The weights of a structured block's FFN as a share of the dense FFN's, such as the paper's 63 % and 32 %."""
    return share_of_dense(ffn_linears(config, ffn))


def suggest(config: Config, share: float) -> list[dict[str, Any]]:
    """For every structure, the sizes that come nearest to a share of the dense FFN's weights, by config key.

    Raises UserError if the share is not between 0 and 1.
    """
    if not 0.0 < share < 1.0:
        raise UserError(Problem("--ffn-share", f"{share:g} is not between 0 and 1", "--ffn-share 0.32"))
    found = []
    for name in sorted(STRUCTURES, key=list(STRUCTURES).index):
        if name == DENSE:
            continue
        sizes = STRUCTURES[name].numbers.nearest_sizes(
            ffn_widths(config), share, partial(_share_of, config, name), config.ffn.sizes
        )
        found.append({"structure": name, **sizes, "share": _share_of(config, name, sizes)})
    return found


def _share_of(config: Config, structure: str, sizes: Sizes) -> float:
    return ffn_share(config, FFNConfig.model_validate({"structure": structure, **sizes}))


def warnings(config: Config, stages: list[Stage], dp_size: int) -> Iterator[str]:
    """Settings that work but make the run slower or larger than necessary, each with an alternative."""
    yield from _width_warnings(config)
    if not config.ffn.is_dense and ffn_share(config, config.ffn) >= 1.0:
        yield f"the {config.ffn.structure} FFN costs as much as the dense one; use a smaller rank or more blocks"
    pp, flops = config.parallel.pp, [stage.forward_flops for stage in stages]
    excess = max(flops) * len(flops) / sum(flops)
    if excess > UNBALANCED:
        where = f"stage {flops.index(max(flops))} has {excess:.2f} times the mean stage's FLOPs"
        yield f"{where}, so the others wait; fewer stages than parallel.pp={pp} balance better"
    micro_batches = micro_batches_per_step(config, dp_size)
    idle = (pp - 1) / (micro_batches + pp - 1)
    if idle > LONG_BUBBLE:
        where = f"{micro_batches} micro-batches per step leave {pp} stages idle {idle:.0%} of the time"
        yield f"{where}; use a smaller training.micro_batch_size or fewer replicas"


def _width_warnings(config: Config) -> Iterator[str]:
    """Warnings about widths that are not multiples of a tile, for models in which this matters."""
    model, ffn = config.model, config.ffn
    if model.hidden_size < 4 * TILE:
        return
    yield from STRUCTURES[ffn.structure].numbers.tile_warnings(ffn_widths(config), ffn.sizes)
    if model.vocab_size % TILE:
        nearest = f"model.vocab_size={nearest_multiple(model.vocab_size, TILE)}"
        found = f"model.vocab_size = {model.vocab_size} is not a multiple of {TILE}"
        yield f"{found}, so tiles stay half empty; try {nearest}"


def _stage(config: Config, stage: Stage, dp_size: int) -> dict[str, Any]:
    memory = memory_by_part(config, stage, dp_size)
    total, most = optimizer_flops(config, stage, dp_size)
    return {
        "stage": stage.index,
        "layers": [stage.layers[0].name, stage.layers[-1].name],
        "parameters": stage.parameters,
        "parameters_per_device": stage.parameters_per_device,
        "flops_share": stage.forward_flops / forward_flops_per_token(config),
        "optimizer_flops": {"total": total, "busiest_device": most},
        "memory_bytes": memory,
        "total_memory_bytes": sum(memory.values()),
        "traffic_bytes_per_step": traffic_bytes(config, stage, dp_size),
    }
