"""Check everything that one process can check, then start the ranks with the deepspeed launcher.

`./launch.sh` calls this: python -m megastruct.start CONFIG [section.key=value ...] [--num-gpus N ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megastruct.config import Config, load_config
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.launch.deepspeed import LaunchOptions, deepspeed_command
from megastruct.launch.environment import free_port
from megastruct.training.preflight import preflight
from megastruct.training.run_folder import finished_steps, run_folder


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    # On one machine any free port will do, so that several runs do not meet; several machines must agree on one.
    port = args.master_port or (free_port() if args.hostfile is None else None)
    options = LaunchOptions(args.hostfile, args.num_gpus, args.num_nodes, args.node_rank, args.master_addr, port)
    with user_errors_exit():
        config = load_config(args.config, args.overrides)
        num_processes = _processes_per_node(config, args.num_gpus)
        if args.hostfile is None:
            preflight(config, num_processes)
        else:
            _check_hostfile(args)
    folder = run_folder(config)
    if finished_steps(config) >= config.training.total_steps:
        print(f"{folder} is finished: {config.training.total_steps} steps are done.")
    else:
        if finished_steps(config):
            print(f"{folder}: resuming after step {finished_steps(config)}.")
        status = subprocess.run(
            deepspeed_command(options, num_processes, [args.config, *args.overrides]), env=_environment(config)
        ).returncode
        if status:
            raise SystemExit(status)
    if not args.node_rank:
        print(f"checkpoints and metrics: {folder}\nTensorBoard: {_beside('tensorboard')} --logdir {config.run.folder}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./launch.sh", description="Train a model with the deepspeed launcher.")
    parser.add_argument("config", help="YAML file, for example configs/run/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--num-gpus", type=int, help="processes per node; left out: what the config needs or has")
    parser.add_argument("--hostfile", help="lines of `host slots=N`; left out: this machine")
    parser.add_argument("--num-nodes", type=int, help="use only the first N hosts of the hostfile")
    parser.add_argument("--node-rank", type=int, help="this node's line in the hostfile: start here only, without ssh")
    parser.add_argument("--master-addr", help="address of the first node")
    parser.add_argument("--master-port", type=int)
    return parser.parse_intermixed_args(argv)


def _processes_per_node(config: Config, num_gpus: int | None) -> int:
    if num_gpus is not None:
        return num_gpus
    if config.parallel.dp is not None:
        return config.parallel.pp * config.parallel.dp
    gpus = torch.cuda.device_count() if config.hardware.device != "cpu" else 0
    return gpus or config.parallel.pp


def _check_hostfile(args: argparse.Namespace) -> None:
    if not Path(args.hostfile).is_file():
        raise UserError(
            Problem("--hostfile", f"{args.hostfile} is no file", "a file with lines such as: node1 slots=8")
        )
    if args.node_rank is not None and args.master_addr is None:
        raise UserError(Problem("--master-addr", "missing beside --node-rank", "--master-addr ADDRESS_OF_FIRST_NODE"))


def _environment(config: Config) -> dict[str, str]:
    """For the launcher and all ranks: the accelerator, and a CPU share for each of many processes."""
    environment = dict(os.environ)
    if config.hardware.device == "cpu" or not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", "1")
    environment.setdefault("LOG_LEVEL", "warning")
    return environment


def _beside(program: str) -> str:
    """The program as installed with this Python; its bare name if that is elsewhere than below the working folder."""
    path = os.path.relpath(Path(sys.executable).with_name(program))
    return program if path.startswith("..") or not Path(path).exists() else path


if __name__ == "__main__":
    main()
