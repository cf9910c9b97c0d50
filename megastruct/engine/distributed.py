"""Joining the process group."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import warnings
from datetime import timedelta
from importlib import import_module
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

from megastruct.errors import Problem, UserError
from megastruct.launch.environment import Process


def choose_device(wanted: str, process: Process) -> torch.device:
    """The device of this rank, on the accelerator that DeepSpeed chose when it was imported (DS_ACCELERATOR).

    `wanted` is "auto", "cpu" or "cuda". Raises UserError if it is not available.
    """
    found = get_accelerator().device_name()
    if wanted != "auto" and found != wanted:
        suggestion = f"start with DS_ACCELERATOR={wanted}" if wanted == "cpu" else "hardware.device=auto"
        raise UserError(Problem("hardware.device", f"{wanted}, but DeepSpeed runs on {found} here", suggestion))
    if found == "cpu":
        return torch.device("cpu")
    if process.local_rank >= torch.cuda.device_count():
        raise UserError(
            Problem(
                "--num-gpus",
                f"process {process.local_rank} of this node has no GPU: there are {torch.cuda.device_count()}",
                f"--num-gpus {torch.cuda.device_count()}",
            )
        )
    device = torch.device("cuda", process.local_rank)
    torch.cuda.set_device(device)
    return device


def _is_news(record: logging.LogRecord) -> bool:
    """False for DeepSpeed's warning that ZeRO has an optimizer that it does not know: ours are tested with ZeRO."""
    return "untested optimizer" not in record.getMessage()


def join(device: torch.device, collective_seconds: float = 1800.0) -> None:
    """Initialise torch.distributed (nccl on GPUs, gloo on CPUs) and DeepSpeed.

    `collective_seconds`: the timeout of collectives in every group. Raises UserError if the processes do not meet.
    """
    timeout = timedelta(seconds=collective_seconds)
    # The default for groups that are made without a timeout, as DeepSpeed's are.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # DeepSpeed broadcasts inside backward hooks; nothing is differentiated through it.
    warnings.filterwarnings("ignore", message="c10d::.* an autograd kernel was not registered")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    # On CPU this op is compiled at start (30 s) and leaves 66 MiB in /dev/shm per rank and run; training never uses it.
    # Asking which ops could be compiled would call compilers for all, whose complaints about missing libraries (`cannot
    # find -laio`) reach the screen.
    comm: Any = import_module("deepspeed.comm.torch")  # its name in `deepspeed.comm` is that of torch itself
    comm.build_shm_op = lambda: None
    _choose_network()
    # With `device_id` below, sends between pipeline stages wait in line with collectives, of which NCCL warns at every
    # first one; they are waited for here anyway.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
    cuda = device.type == "cuda"
    backend = "nccl" if cuda else "gloo"
    store = None
    if os.environ["MASTER_PORT"] == "0":  # alone: any free port will do
        store = dist.TCPStore(os.environ["MASTER_ADDR"], 0, 1, is_master=True)
        os.environ["MASTER_PORT"] = str(store.port)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        dist.init_process_group(
            backend,
            timeout=timeout,
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device if cuda else None,  # else NCCL guesses the device at every barrier, and warns
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        found = f"rank {rank} did not meet all {world_size} processes at {address}: {str(error).splitlines()[0]}"
        suggestion = 'start all nodes; see docs/many_machines.md, "When it hangs"'
        raise UserError(Problem("--master-addr, --master-port", found, suggestion)) from None
    deepspeed.init_distributed(backend, verbose=False)


def _choose_network() -> None:
    """Tell gloo the interface towards rank 0, unless GLOO_SOCKET_IFNAME does.

    By itself gloo takes the address that the machine's own name resolves to, often 127.0.0.1.
    """
    host = os.environ["MASTER_ADDR"]
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return  # the meeting at this address will say what is wrong
    names = [name for name, entries in psutil.net_if_addrs().items() if own in {entry.address for entry in entries}]
    if names and not ipaddress.ip_address(own).is_loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


def leave() -> None:
    """Wait for all ranks, then destroy the process group."""
    dist.barrier()
    dist.destroy_process_group()
