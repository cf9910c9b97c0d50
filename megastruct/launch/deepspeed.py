"""The command line of the deepspeed launcher."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchOptions:
    """Options that pass on to `deepspeed`; None = its own default."""

    hostfile: str | None = None
    num_gpus: int | None = None
    num_nodes: int | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None


def deepspeed_command(options: LaunchOptions, num_processes: int, arguments: Sequence[str]) -> list[str]:
    """The argv that starts `num_processes` ranks per node of `megastruct.train` with `arguments`.

    With a node rank, every node runs its own launcher and none needs ssh; otherwise deepspeed reaches the hosts of
    the hostfile by pdsh or ssh.
    """
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]  # what the `deepspeed` script runs, in this Python
    if options.hostfile is not None:
        command += ["--hostfile", options.hostfile]
        if options.num_gpus is not None:  # otherwise the hostfile's slots say how many
            command += ["--num_gpus", str(options.num_gpus)]
    else:
        # A machine-wide hostfile must not turn a local start into another one.
        command += ["--hostfile", "", "--num_gpus", str(num_processes)]
    if options.num_nodes is not None:
        command += ["--num_nodes", str(options.num_nodes)]
    if options.node_rank is not None:
        command += ["--no_ssh", "--node_rank", str(options.node_rank)]
    if options.master_addr is not None:
        command += ["--master_addr", options.master_addr]
    if options.master_port is not None:
        command += ["--master_port", str(options.master_port)]
    return [*command, "--log_level", "error", "--no_local_rank", "--module", "megastruct.train", *arguments]
