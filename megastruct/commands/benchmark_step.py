"""The benchmark `step` of megastruct-benchmark: a training step beside plain PyTorch, and `trace`: a trace by part."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from megastruct.benchmarks.device import device_name
from megastruct.commands.output_files import file_problems, parent_problems, write_json
from megastruct.config import Config, load_config
from megastruct.config.checks import check_batch
from megastruct.errors import Problem, Problems, UserError, user_errors_exit
from megastruct.launch.environment import Process, current_process, keep_compiled_code, take_share_of_cores
from megastruct.parallel.topology import Topology
from megastruct.paths import option_path
from megastruct.profiling.breakdown import as_json, breakdown, breakdown_lines
from megastruct.profiling.trace import read_trace

if TYPE_CHECKING:
    from megastruct.benchmarks.step import Measured
    from megastruct.benchmarks.tokens import Tokens


def add_parsers(what: Any) -> None:
    """Add the two benchmarks to the subparsers `what`."""
    step = what.add_parser("step", help="a training step beside plain PyTorch, and its time by part")
    add = step.add_argument
    add("config", help="YAML file of a run")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--steps", type=int, default=10, help="steps that are timed; the median counts (default: %(default)s)")
    add("--warmup", type=int, default=3, help="steps before them (default: %(default)s)")
    add("--tokens", choices=("synthetic", "data"), default="synthetic", help="default: %(default)s")
    add("--json", type=option_path, metavar="FILE", help="also write all numbers there")
    add("--trace", type=option_path, metavar="FOLDER", help="keep the traces of rank 0 there")
    add("--no-baseline", action="store_true", help="measure this project only")
    step.set_defaults(run=benchmark_step)
    trace = what.add_parser("trace", help="the time by part of a trace that a run has written")
    trace.add_argument("files", nargs="+", type=option_path, help="files of profiling.steps, in RUN/profile")
    trace.set_defaults(run=print_traces)


def print_traces(arguments: argparse.Namespace) -> None:
    """Print the time by part of each trace."""
    for path in arguments.files:
        found = breakdown(read_trace(path))
        print(f"{path}: {found.step:.2f} ms a step, {found.num_steps} traced", *breakdown_lines(found), sep="\n")


def benchmark_step(arguments: argparse.Namespace) -> None:
    """Print speed, memory and time by part of a step. With several processes, rank 0 prints."""
    process = current_process()
    with TemporaryDirectory() as folder:
        _benchmark_step(arguments, process, Path(folder))


def _benchmark_step(arguments: argparse.Namespace, process: Process, folder: Path) -> None:
    with user_errors_exit(print_message=process.local_rank == 0):  # the same on all ranks of a node
        config, topology, tokens = _checked(arguments, process.world_size, folder)
    with user_errors_exit(rank=process.rank):
        _run(arguments, config, topology, tokens, process, folder)


def _checked(arguments: argparse.Namespace, world_size: int, folder: Path) -> tuple[Config, Topology, Tokens]:
    """Raises UserError with all problems of options, config, layout and data."""
    from megastruct.benchmarks.plain_training import baseline_problems
    from megastruct.benchmarks.tokens import open_tokens

    problems = Problems()
    problems += parent_problems("--trace", arguments.trace)
    problems += file_problems("--json", arguments.json, "step.json")
    config = problems.collect(lambda: load_config(arguments.config, arguments.overrides))
    topology = None
    if config:
        parallel = config.parallel
        topology = problems.collect(lambda: Topology.of_world(world_size, parallel.pp, parallel.dp, parallel.tp))
        if topology:
            problems += check_batch(config, topology.dp_size)
            problems += [] if arguments.no_baseline else baseline_problems(config, world_size)
    tokens = problems.collect(lambda: open_tokens(config, arguments.tokens == "synthetic", folder)) if config else None
    problems.raise_if_any()
    assert config and topology and tokens
    return config, topology, tokens


def _run(
    arguments: argparse.Namespace, config: Config, topology: Topology, tokens: Tokens, process: Process, folder: Path
) -> None:
    from megastruct.benchmarks import step as benchmark
    from megastruct.engine.determinism import make_deterministic
    from megastruct.engine.distributed import choose_device, join, leave

    if config.reliability.deterministic:
        make_deterministic()
    keep_compiled_code(config.hardware.compile_cache)
    torch.set_num_threads(take_share_of_cores())
    device = choose_device(config.hardware.device, process)
    join(device, config.reliability.collective_seconds)
    amount, traces = benchmark.Amount(arguments.warmup, arguments.steps), arguments.trace or folder
    if process.rank == 0:
        print(_heading(config, topology, device, arguments), flush=True)
    if config.training.compile:
        benchmark.start_compiler(device)
    found: list[Measured] = []
    for name in ("megastruct", "baseline")[: 1 if arguments.no_baseline else 2]:
        trace = traces / f"{name}_step.json.gz"
        try:
            if name == "megastruct":
                found.append(benchmark.measure_product(config, topology, device, tokens, amount, trace))
            else:
                found.append(benchmark.measure_baseline(config, device, tokens, amount, trace))
        except torch.OutOfMemoryError:
            raise UserError(_too_large(config, name, device)) from None
        if process.rank == 0:
            print(_row(found[-1]), flush=True)
            if arguments.json:
                write_json("--json", arguments.json, _values(found, config, topology, device, arguments))
    if process.rank == 0:
        print(*_comparison(found), sep="\n")
    leave()


def _heading(config: Config, topology: Topology, device: torch.device, arguments: argparse.Namespace) -> str:
    training, size = config.training, topology.world_size
    compiled = "compiled" if training.compile else "not compiled"
    layout = f"pp {topology.pp_size} x dp {topology.dp_size} x tp {topology.tp_size}, ZeRO {config.parallel.zero_stage}"
    rows = f"{training.global_batch_size} x {training.seq_length} tokens a step ({arguments.tokens})"
    return (
        f"{device_name(device)}, PyTorch {torch.__version__}, {training.precision}, {compiled}\n"
        f"{size} {'process' if size == 1 else 'processes'}: {layout}; {rows}, "
        f"micro-batches of {training.micro_batch_size}; {arguments.steps} steps after {arguments.warmup}\n\n"
        f"  {'':<34}{'tokens/s':>12}{'TFLOP/s':>9}{'MFU':>7}{'ms/step':>10}{'GiB':>8}{'first step':>12}"
    )


def _row(found: Measured) -> str:
    mfu = "-" if found.mfu is None else f"{found.mfu:.3f}"
    memory = "-" if found.peak_bytes is None else f"{found.peak_bytes / 2**30:.2f}"
    return (
        f"  {found.name:<34}{found.tokens_per_second:12,.0f}{found.tflops:9.3g}{mfu:>7}{1000 * found.seconds:10.2f}"
        f"{memory:>8}{found.first_step_seconds:10.1f} s"
    )


def _comparison(found: list[Measured]) -> list[str]:
    """The ratio of the speeds, and the times by part side by side."""
    lines = []
    if len(found) == 2:
        ratio = found[0].tokens_per_second / found[1].tokens_per_second
        lines.append(f"  tokens/s, {found[0].name} / {found[1].name}: {ratio:.3f}")
    for measured in found:
        assert measured.parts, "rank 0 traces"
        lines += ["", f"{measured.name}: a step of rank 0 by part, {measured.parts.step:.2f} ms with the profiler on"]
        lines += breakdown_lines(measured.parts)
    return lines


def _values(
    found: list[Measured], config: Config, topology: Topology, device: torch.device, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All numbers, as plain values."""
    values: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "config": config.model_dump(mode="json", by_alias=True),
        "layout": {"pp": topology.pp_size, "dp": topology.dp_size, "tp": topology.tp_size},
        "tokens": arguments.tokens,
        "warmup": arguments.warmup,
        "steps": arguments.steps,
    }
    for key, measured in zip(("megastruct", "baseline"), found, strict=False):
        values[key] = {
            "name": measured.name,
            "tokens_per_second": measured.tokens_per_second,
            "tflops_per_device": measured.tflops,
            "mfu": measured.mfu,
            "step_seconds": measured.step_seconds,
            "first_step_seconds": measured.first_step_seconds,
            "peak_bytes": measured.peak_bytes,
            "losses": measured.losses,
            "parts": measured.parts and as_json(measured.parts),
        }
    if len(found) == 2:
        values["ratio"] = found[0].tokens_per_second / found[1].tokens_per_second
    return values


def _too_large(config: Config, name: str, device: torch.device) -> Problem:
    size = config.training.micro_batch_size
    what = "this config" if name == "megastruct" else "the dense baseline"
    fix = f"training.micro_batch_size={size // 2}" if size > 1 else "training.activation_checkpointing=true"
    more = "" if name == "megastruct" else ", or --no-baseline"
    return Problem("training.micro_batch_size", f"{size}: {what} does not fit into {device_name(device)}", fix + more)
