"""Submit a run to Slurm: megastruct-submit CONFIG [section.key=value ...] --nodes 2 --gpus-per-node 8 --time 1200.

The job saves and is requeued when it is preempted or its time is over, until the run is finished.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from megastruct.config import load_config
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.import_path import import_variables_set
from megastruct.launch.slurm import Resources, TrainingJob, job_text, run_here, submit
from megastruct.run.preflight import preflight
from megastruct.run.run_folder import RunFolder

JOBS_FOLDER = "jobs"


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_intermixed_args(argv)
    with user_errors_exit():
        config = load_config(args.config, args.overrides)
        slurm = _more_options(args)
        minutes = _minutes(args.time)
        if args.nodes < 1 or args.gpus_per_node < 1:
            raise UserError(Problem("--nodes, --gpus-per-node", "less than 1", "--nodes 1 --gpus-per-node 8"))
        preflight(config, args.nodes * args.gpus_per_node)
        job = TrainingJob([args.config, *args.overrides], args.nodes, args.gpus_per_node)
        resources = Resources(
            nodes=args.nodes,
            gpus_per_node=args.gpus_per_node,
            minutes=minutes,
            name=config.run.name,
            folder=RunFolder(config).path / JOBS_FOLDER,
            uses_gpus=config.hardware.device != "cpu",
            cpus_per_task=args.cpus_per_node,
            signal_seconds=args.signal_seconds,
            max_timeouts=args.max_requeues,
            slurm=slurm,
        )
        if args.dry_run:
            print(job_text(resources, job), end="")
            return
        with import_variables_set():  # the job is a Python process elsewhere, with this environment
            submitted = run_here(resources, job) if args.local else submit(resources, job)
    print(f"job {submitted.job_id}\noutput: {submitted.paths.stdout}", flush=True)
    if args.local:
        submitted.wait()
        if submitted.exception() is not None:
            print(f"error: the job failed; {submitted.paths.stdout} says why", file=sys.stderr)
            raise SystemExit(1)
        print(submitted.result())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, for example configs/run/xl_lowrank_32.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, required=True, help="one process for each; also without GPUs")
    parser.add_argument("--time", required=True, help="minutes, HH:MM:SS or D-HH:MM:SS; then it is requeued")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--constraint")
    parser.add_argument("--mem", help="memory of a node, as sbatch takes it: 500G")
    parser.add_argument("--cpus-per-node", type=int)
    parser.add_argument("--slurm", action="append", default=[], metavar="OPTION=VALUE", help="any option of sbatch")
    parser.add_argument("--signal-seconds", type=int, default=120, help="warning before the end: a step and a save")
    parser.add_argument("--max-requeues", type=int, default=1000, help="after the time was over")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    parser.add_argument("--local", action="store_true", help="run the job here, and wait for it")
    return parser


def _minutes(text: str) -> int:
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if text.isdigit() and int(text) > 0:
        return int(text)
    if not match:
        raise UserError(Problem("--time", f"{text!r} is no time", "--time 24:00:00, or minutes"))
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return max(1, (days * 24 + hours) * 60 + minutes + (seconds > 0))


def _more_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options that go to sbatch as they are."""
    options = {name: getattr(args, name) for name in ("partition", "account", "qos", "constraint", "mem")}
    problems = []
    for text in args.slurm:
        name, equal, value = text.partition("=")
        name = name.removeprefix("--")
        if not re.fullmatch(r"[a-z][a-z-]*", name) or not equal:
            problems.append(Problem("--slurm", f"{text!r} is no option", "--slurm exclude=node7"))
        options[name] = value
    if problems:
        raise UserError(problems)
    return {name: value for name, value in options.items() if value is not None}
