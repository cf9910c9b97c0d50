"""The deepspeed launcher: its command line and the devices of its ranks."""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megastruct.errors import Problem, UserError
from megastruct.import_path import import_variables
from megastruct.launch.hostfile import hostfile_slots, read_hostfile
from megastruct.launch.launcher import launcher_command

__all__ = ["LaunchOptions", "decoded", "deepspeed_command", "encoded", "hostfile_slots"]

ENCODED = "base64:"
RANK_MODULE = "megastruct.train"
# Of a rank that ends itself, the launcher would print the command line and exit code, after what the rank has said.
_QUIET = ("--log_level", "critical")


@dataclass(frozen=True)
class LaunchOptions:
    """Options of a start; None means the launcher's own default. `num_gpus` is the processes per node."""

    hostfile: str | None = None
    num_gpus: int | None = None
    num_nodes: int | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None

    @property
    def by_ssh(self) -> bool:
        """Whether one command starts the ranks of all nodes, over ssh."""
        return self.hostfile is not None and self.node_rank is None


def deepspeed_command(options: LaunchOptions, arguments: Sequence[str], stop_file: Path | None = None) -> list[str]:
    """The argv that starts the ranks of `megastruct.train` with `arguments`, as a child of this process.

    With a node rank, every node runs its own launcher and ssh is not needed. Otherwise deepspeed reaches the hosts of
    the hostfile through pdsh and ssh, whose shells would expand special characters; the ranks there are asked to stop
    by `stop_file` if this process is killed. Raises UserError for a hostfile that cannot be used, and for a path or an
    address that contains such characters.
    """
    if options.by_ssh:
        return launcher_command("deepspeed.launcher.runner", _runner_arguments(options, encoded(arguments)), stop_file)
    command = [f"--world_info={_words(_devices_by_node(options))}", f"--node_rank={options.node_rank or 0}"]
    if options.master_addr is not None:
        command.append(f"--master_addr={options.master_addr}")
    if options.master_port is not None:
        command.append(f"--master_port={options.master_port}")
    command += [*_QUIET, "--no_local_rank", "--module", RANK_MODULE, *arguments]
    return launcher_command("deepspeed.launcher.launch", command)


def _runner_arguments(options: LaunchOptions, argument: str) -> list[str]:
    for where, word in (
        ("folder", os.getcwd()),
        ("Python", sys.executable),
        ("PYTHONPATH", import_variables().get("PYTHONPATH")),
        ("--master-addr", options.master_addr),
    ):
        if word is not None and shlex.quote(word) != word:
            found = f"{word!r} contains characters that a shell would interpret on the way to the other nodes"
            raise UserError(Problem(where, found, "a path without spaces and quotes, or --node-rank on each node"))
    command = ["--hostfile", options.hostfile or ""]
    for name in ("num_gpus", "num_nodes", "master_addr", "master_port"):
        if getattr(options, name) is not None:  # otherwise the slots in the hostfile count
            command += [f"--{name}", str(getattr(options, name))]
    return [*command, *_QUIET, "--no_local_rank", "--module", RANK_MODULE, argument]


def _devices_by_node(options: LaunchOptions) -> dict[str, list[int | str]]:
    """By host, the devices of its ranks: on this node named as in CUDA_VISIBLE_DEVICES, on others by number only."""
    if options.hostfile is None:
        return {"localhost": _local_devices(options.num_gpus or 1)}
    hosts = dict(islice(read_hostfile(Path(options.hostfile)).items(), options.num_nodes))
    devices: dict[str, list[int | str]] = {
        host: list(range(options.num_gpus or slots)) for host, slots in hosts.items()
    }
    own = list(devices)[options.node_rank or 0]
    return devices | {own: _local_devices(len(devices[own]))}


def _local_devices(processes: int) -> list[int | str]:
    """The devices of `processes` ranks, as CUDA_VISIBLE_DEVICES names them: numbers, UUIDs or MIG names.

    Numbers from 0 on if that variable names fewer.
    """
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if len(visible) < processes:
        return list(range(processes))
    return [int(name) if name.isdigit() else name for name in visible[:processes]]


def encoded(arguments: Sequence[str]) -> str:
    """The arguments as one word that no shell expands or splits; `decoded` is the inverse."""
    return ENCODED + _words(list(arguments))


def decoded(arguments: Sequence[str]) -> list[str]:
    """The arguments that were passed to `encoded`; arguments that are not encoded are returned unchanged."""
    if len(arguments) == 1 and arguments[0].startswith(ENCODED):
        return json.loads(base64.urlsafe_b64decode(arguments[0].removeprefix(ENCODED)))
    return list(arguments)


def _words(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()
