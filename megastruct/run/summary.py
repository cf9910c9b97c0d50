"""What a run says about itself before its first step, in at most ten lines, and whether a machine can hold it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

import torch

from megastruct.config.checks import check_evaluation
from megastruct.config.schema import Config
from megastruct.data import TrainingData
from megastruct.errors import Problem
from megastruct.metrics.devices import memory_there_bytes
from megastruct.parallel.topology import Topology
from megastruct.planning.memory import ALWAYS_HELD
from megastruct.planning.plan import make_plan
from megastruct.planning.words import count, size
from megastruct.run.origin import origin
from megastruct.run.run_folder import RunFolder

HOPELESS = 2.0  # the plan is not exact: beyond this many times the memory that is there, a run cannot succeed


def summary(config: Config, topology: Topology, data: TrainingData, device: torch.device, step: int) -> str:
    """The summary of a run that begins after `step`. One line for each topic."""
    plan, training = make_plan(config, topology.world_size), config.training
    sizes = " ".join(f"{key} {value}" for key, value in config.ffn.sizes.items())
    ffn = f"{count(plan['ffn_parameters'])} in the FFN ({config.ffn.structure}{' ' + sizes if sizes else ''}"
    layout = f"pp {topology.pp_size} x dp {topology.dp_size} x tp {topology.tp_size}, ZeRO {config.parallel.zero_stage}"
    steps = f"{plan['steps']['total']:,} steps" + (f", resuming after step {step:,}" if step else "")
    planned, there = _planned_bytes(config, topology.world_size), memory_there_bytes(device.type)
    each, too_much = "GPU" if device.type == "cuda" else "process", ": that is too little" if planned > there else ""
    lines = [
        ("model", f"{count(plan['parameters'])} parameters, {ffn}: {plan['ffn']['share']:.1%} of dense)"),
        ("layout", f"{layout}, {training.precision}, {plan['micro_batches_per_step']} micro-batches per step"),
        ("devices", _devices(device, topology.world_size)),
        ("data", _data(config, data)),
        ("tokenizer", f"{data.tokenizer.path}, {data.tokenizer.vocab_size:,} ids"),
        ("training", f"{steps}, {count(plan['tokens'])} tokens, {plan['training_flops']:.3g} FLOPs"),
        ("memory", f"{size(planned)} planned per {each}, {size(there)} {_where(device.type)}{too_much}"),
        ("output", os.path.join(config.run.folder, config.run.name)),
        *(("parent", text) for text in _beginning(config, step)),
        *(("warning", f"{found.where}: {found.found}; try: {found.suggestion}") for found in check_evaluation(config)),
    ]
    return "\n".join(f"{title:<10}{text}" for title, text in lines)


def _beginning(config: Config, step: int) -> Iterator[str]:
    """What a branch that begins takes over, and what of its optimizer."""
    began = origin(RunFolder(config).path)
    if step or config.run.from_ is None or began is None:
        return
    place = ", their place in the data" if config.run.inherits_place else ""
    text = f"weights of {began['folder']}@{began['step']}{place}"
    if config.run.inherits_optimizer:
        yield f"{text} and the optimizer's state"
        return
    other = began.get("optimizer", config.optimizer.kind)
    of = f": the parent's is of {other}" if other != config.optimizer.kind else ""
    yield f"{text}; the optimizer's state starts anew{of}"


def check_memory(config: Config, topology: Topology, device_type: str, processes: int) -> Iterator[Problem]:
    """A problem if `processes` of the run cannot fit into the memory of this machine, however exact the plan is."""
    there = memory_there_bytes(device_type)
    held = _planned_bytes(config, topology.world_size, ALWAYS_HELD)
    planned = _planned_bytes(config, topology.world_size)
    if device_type == "cpu":
        held, planned = held * processes, planned * processes
    if held > there or planned > HOPELESS * there:
        what = f"the model with its optimizer needs {size(held)}" if held > there else f"a step needs {size(planned)}"
        found = f"{what}, but there are {size(there)} {_where(device_type)}"
        suggestion = (
            "a smaller model or training.micro_batch_size, or more devices for parallel.pp, parallel.tp and "
            "parallel.zero_stage=3; tools/plan.py shows the parts"
        )
        yield Problem("memory", found, suggestion)


def _planned_bytes(config: Config, world_size: int, parts: tuple[str, ...] | None = None) -> int:
    """Bytes on the fullest device, of some parts of the plan or of all."""
    stages = make_plan(config, world_size)["stages"]
    return max(
        sum(number for part, number in stage["memory_bytes"].items() if parts is None or part in parts)
        for stage in stages
    )


def _where(device_type: str) -> str:
    return "on each GPU" if device_type == "cuda" else "on this machine"


def _devices(device: torch.device, world_size: int) -> str:
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    each = f"{threads} thread{'s' if threads > 1 else ''} on {platform.processor() or platform.machine()}"
    return f"1 process with {each}" if world_size == 1 else f"{world_size} processes, each with {each}"


def _data(config: Config, data: TrainingData) -> str:
    """The sources, and how often the run reads their tokens if their number is known."""
    paths = [path for path, _ in config.data.sources]
    text = f"{config.data.kind} from {paths[0] if len(paths) == 1 else f'{len(paths)} sources'}"
    if (tokens := data.describe().get("num_train_tokens")) and len(paths) == 1:
        read = config.training.tokens(config.training.base_steps)
        text += f", {count(tokens)} tokens, read {read / tokens:.2g} times"
    return text
