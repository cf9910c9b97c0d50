"""Submit a run to Slurm: megastruct-submit CONFIG [section.key=value ...] --nodes 2 --gpus-per-node 8 --time 1200.

When the job is preempted or reaches its time limit, it saves a checkpoint and is requeued, until the run is finished.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from megastruct.config import Config, load_config
from megastruct.console import command
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.import_path import import_variables_set
from megastruct.launch.slurm import Resources, TrainingJob, job_text, run_here, submit
from megastruct.planning.plan import make_plan
from megastruct.run.preflight import preflight
from megastruct.run.run_folder import RunFolder

JOBS_FOLDER = "jobs"
CPUS_PER_GPU = 4  # a rank's threads for the loop, NCCL, saving and the data
HOST_BYTES = 4 * 2**30  # of the libraries of one process, with CUDA


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Check the config and submit the job, or run it here with --local. A user's mistake exits with code 2."""
    args = _parser().parse_intermixed_args(argv)
    with user_errors_exit():
        config = load_config(args.config, args.overrides)
        slurm = _more_options(args)
        minutes = _minutes(args.time)
        if args.nodes < 1 or args.gpus_per_node < 1:
            raise UserError(
                Problem("--nodes, --gpus-per-node", "one of them is less than 1", "--nodes 1 --gpus-per-node 8")
            )
        if args.local and args.setup:
            raise UserError(Problem("--setup", "is for jobs of sbatch", "run the lines in this shell, without --setup"))
        preflight(config, args.nodes * args.gpus_per_node, args.gpus_per_node if args.local else 0)
        job = TrainingJob([args.config, *args.overrides], args.nodes, args.gpus_per_node)
        resources = Resources(
            nodes=args.nodes,
            gpus_per_node=args.gpus_per_node,
            minutes=minutes,
            name=config.run.name,
            folder=RunFolder(config).path / JOBS_FOLDER,
            uses_gpus=config.hardware.device != "cpu",
            cpus_per_task=args.cpus_per_node or _cpus(config, args.gpus_per_node, slurm),
            signal_seconds=args.signal_seconds,
            max_timeouts=args.max_requeues,
            slurm=_memory(config, args.nodes, args.gpus_per_node, slurm) | slurm,
            setup=tuple(args.setup),
        )
        if args.dry_run:
            print(job_text(resources, job), end="")
            return
        with import_variables_set():  # the job is a Python process elsewhere that inherits this environment
            submitted = run_here(resources, job) if args.local else submit(resources, job)
    print(f"job {submitted.job_id}\noutput: {submitted.paths.stdout}", flush=True)
    if args.local:
        submitted.wait()
        if submitted.exception() is not None:
            print(f"error: the job failed; see {submitted.paths.stdout}", file=sys.stderr)
            raise SystemExit(1)
        print(submitted.result())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, for example configs/run/xl_lowrank_32.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
    parser.add_argument(
        "--gpus-per-node", type=int, required=True, help="processes per node, one per GPU; also needed on CPUs"
    )
    parser.add_argument(
        "--time", required=True, help="time limit, after which the job is requeued: minutes, HH:MM:SS or D-HH:MM:SS"
    )
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--constraint")
    parser.add_argument("--mem", help="memory per node as sbatch accepts it, such as 500G (default: from the plan)")
    parser.add_argument(
        "--cpus-per-node",
        type=int,
        help=f"default: {CPUS_PER_GPU} per GPU (1 per process on CPUs), and data.num_workers",
    )
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="a line of shell before the run, such as 'module load cuda'; may be repeated",
    )
    parser.add_argument(
        "--slurm", action="append", default=[], metavar="OPTION=VALUE", help="any other option of sbatch"
    )
    parser.add_argument(
        "--signal-seconds",
        type=int,
        default=120,
        help="signal the job this long before its time limit; must cover a step and a save (default: %(default)s)",
    )
    parser.add_argument(
        "--max-requeues",
        type=int,
        default=1000,
        help="largest number of requeues after a time limit (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the job script without submitting it")
    parser.add_argument("--local", action="store_true", help="run the job on this machine and wait for it")
    return parser


def _cpus(config: Config, processes: int, given: Mapping[str, Any]) -> int | None:
    """CPUs per node, which sbatch would take to be 1; None if an option for it is given."""
    if any(name.startswith("cpus-per") for name in given):
        return None
    workers = config.data.num_workers if config.data.kind == "text" else 0
    return processes * ((1 if config.hardware.device == "cpu" else CPUS_PER_GPU) + workers)


def _memory(config: Config, nodes: int, processes: int, given: Mapping[str, Any]) -> dict[str, str]:
    """The option `mem` for the host's memory of a node; none if an option for it is given.

    A process needs room for its libraries, and while it saves a copy of the optimizer's state (twice that where it is
    page-locked, docs/runs.md); on a CPU also for all that it trains with.
    """
    if any(name.startswith("mem") for name in given):
        return {}
    stages = make_plan(config, nodes * processes)["stages"]
    copy = 2 * max(stage["memory_bytes"]["optimizer"] for stage in stages)
    trained = max(stage["total_memory_bytes"] for stage in stages) if config.hardware.device == "cpu" else 0
    return {"mem": f"{ceil(processes * (HOST_BYTES + copy + trained) / 2**30)}G"}


def _minutes(text: str) -> int:
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if text.isdigit() and int(text) > 0:
        return int(text)
    if not match:
        raise UserError(Problem("--time", f"{text!r} is not a time", "--time 24:00:00, or a number of minutes"))
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return max(1, (days * 24 + hours) * 60 + minutes + (seconds > 0))


def _more_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options that are passed to sbatch unchanged.

    Raises:
        UserError: with every --slurm that is not OPTION=VALUE.
    """
    options = {name: getattr(args, name) for name in ("partition", "account", "qos", "constraint", "mem")}
    problems = []
    for text in args.slurm:
        name, equal, value = text.partition("=")
        name = name.removeprefix("--")
        if not re.fullmatch(r"[a-z][a-z-]*", name) or not equal:
            problems.append(Problem("--slurm", f"{text!r} is not an option of sbatch", "--slurm exclude=node7"))
        options[name] = value
    if problems:
        raise UserError(problems)
    return {name: value for name, value in options.items() if value is not None}
