"""Check everything that one process can check, then start the ranks with the deepspeed launcher.

`./launch.sh` calls this module; where the package is installed, so does `megastruct-train`:
python -m megastruct.start CONFIG [section.key=value ...] [--num-gpus N ...]

torch takes seconds to import. It is imported after the config has been read and the first line has been printed.
"""

from __future__ import annotations

from megastruct.import_path import import_variables, leave_out_working_folder

if __name__ == "__main__":
    leave_out_working_folder()

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megastruct.config import Config, load_config
from megastruct.config.load import places_in_errors
from megastruct.config.reference import PrintKeys
from megastruct.console import lasting_command
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.launch.deepspeed import LaunchOptions, deepspeed_command
from megastruct.launch.environment import began, reserved_port
from megastruct.launch.hostfile import hostfile_slots
from megastruct.launch.running import run_launcher
from megastruct.paths import option_text
from megastruct.planning.steps import total_steps
from megastruct.stops import STOP_FILE, ends_when_asked


@lasting_command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exit code 2 for a user error, 75 if it was asked to stop, else the launcher's."""
    args = _parse(argv)
    with ends_when_asked(), user_errors_exit(), reserved_port() as free_port:
        config = load_config(args.config, args.overrides)
        if argv is None:  # as a command
            print(f"{args.config}: checking the config, the data and the devices", file=sys.stderr, flush=True)
        from megastruct.run.mirroring import complete_mirror
        from megastruct.run.preflight import preflight
        from megastruct.run.run_folder import RunFolder

        run, total = RunFolder(config), total_steps(config)
        with places_in_errors(args.config, args.overrides):
            run.check_config()
        finished = run.finished_steps()
        if finished < total:
            options, world_size, here = _launch_options(config, args, free_port)
            with places_in_errors(args.config, args.overrides):
                preflight(config, world_size, here)
            finished = run.finished_steps()  # the mirror may have had more
        if finished >= total:
            if not args.node_rank:
                complete_mirror(config)
            print(f"{run.path} is finished: {total} steps are done.")
            return _say_where(config, run.path)
        stop_file = run.path / STOP_FILE if options.by_ssh else None
        command = deepspeed_command(options, [args.config, *args.overrides], stop_file)
        if finished:
            print(f"{run.path}: resuming after step {finished}.", flush=True)
        if not args.node_rank:  # on the first node only: a later start on another node must not undo a request to stop
            (run.path / STOP_FILE).unlink(missing_ok=True)
        status = run_launcher(command, _environment(config), stop_file)
    if status:
        raise SystemExit(status)
    if not args.node_rank:
        _say_where(config, run.path)


def _say_where(config: Config, folder: Path) -> None:
    board = shlex.join([_beside("tensorboard"), "--logdir", config.run.folder])
    print(f"checkpoints and metrics: {folder}\nTensorBoard: {board}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    prog = "megastruct-train" if Path(sys.argv[0]).name == "megastruct-train" else "./launch.sh"
    parser = argparse.ArgumentParser(prog=prog, description="Train a model with the deepspeed launcher.")
    parser.add_argument("config", help="YAML file, for example configs/run/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--keys", nargs="?", action=PrintKeys, metavar="SECTION", help="print the keys of configs")
    parser.add_argument(
        "--num-gpus",
        type=int,
        help="processes per node; left out: the hostfile's slots; without one, what parallel.dp needs, else all GPUs",
    )
    parser.add_argument(
        "--hostfile", type=option_text, help="file with lines `host slots=N`; left out: this machine only"
    )
    parser.add_argument("--num-nodes", type=int, help="use only the first N hosts of the hostfile")
    parser.add_argument(
        "--node-rank", type=int, help="index of this node in the hostfile; starts this node only, without ssh"
    )
    parser.add_argument("--master-addr", help="address of the first node")
    parser.add_argument(
        "--master-port",
        type=int,
        help="port of the first node; left out: any free one, with --hostfile deepspeed's default",
    )
    return parser.parse_intermixed_args(argv)


def _launch_options(config: Config, args: argparse.Namespace, free_port: int) -> tuple[LaunchOptions, int, int]:
    """(options for the launcher, processes on all nodes, processes on one node).

    Raises UserError for options that do not fit.
    """
    problems = [
        Problem(f"--{name.replace('_', '-')}", f"{getattr(args, name)} is less than {least}", f"{least} or more")
        for name, least in (("num_gpus", 1), ("num_nodes", 1), ("node_rank", 0), ("master_port", 1))
        if getattr(args, name) is not None and getattr(args, name) < least
    ]
    if args.hostfile is None:
        problems += [
            Problem(
                f"--{name.replace('_', '-')}", "set without --hostfile", "--hostfile FILE with a line for each node"
            )
            for name in ("num_nodes", "node_rank", "master_addr")
            if getattr(args, name) is not None
        ]
    if args.node_rank is not None and args.master_addr is None and args.hostfile is not None:
        problems.append(
            Problem(
                "--master-addr", "missing, but required with --node-rank", "--master-addr ADDRESS_OF_THE_FIRST_NODE"
            )
        )
    if problems:
        raise UserError(problems)
    if args.hostfile is not None:
        slots = hostfile_slots(Path(args.hostfile), args.num_nodes, args.node_rank)
        processes = args.num_gpus or max(slots)
        world_size = args.num_gpus * len(slots) if args.num_gpus else sum(slots)
        port = args.master_port
    else:
        processes = world_size = _local_processes(config, args.num_gpus)
        port = args.master_port or free_port  # so that several runs on a machine do not collide
    per_node = args.num_gpus if args.hostfile is not None else processes
    options = LaunchOptions(args.hostfile, per_node, args.num_nodes, args.node_rank, args.master_addr, port)
    return options, world_size, processes


def _local_processes(config: Config, num_gpus: int | None) -> int:
    import torch

    gpus = torch.cuda.device_count() if config.hardware.device != "cpu" else 0
    if config.hardware.device == "cuda" and not gpus:
        raise UserError(Problem("hardware.device", "cuda, but PyTorch sees no GPU here", "hardware.device=auto"))
    one_replica = config.parallel.pp * config.parallel.tp
    wanted = num_gpus or (one_replica * config.parallel.dp if config.parallel.dp else gpus or one_replica)
    if gpus and wanted > gpus:
        found = f"{wanted} processes are requested, but there are {gpus} GPUs"
        raise UserError(Problem("--num-gpus", found, "smaller parallel sizes, or hardware.device=cpu"))
    return wanted


def _environment(config: Config) -> dict[str, str]:
    """The environment of the launcher and all ranks."""
    import torch

    environment = os.environ | import_variables() | began()
    if config.hardware.device == "cpu" or not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("LOG_LEVEL", "warning")
    return environment


def _beside(program: str) -> str:
    """The path of the program that belongs to this Python, or its bare name if that is outside the working folder."""
    path = os.path.relpath(Path(sys.executable).with_name(program))
    return program if path.startswith("..") or not Path(path).exists() else path


if __name__ == "__main__":
    main()
