"""The deepspeed launcher: its command line, its hostfile, and how all of its processes are stopped."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from megastruct.errors import Problem, UserError
from megastruct.import_path import import_variables
from megastruct.launch.signals import STOP_SIGNALS, blocked

ENCODED = "base64:"
RANK_MODULE = "megastruct.train"
REPEAT_SECONDS = 1.0  # signals within this time count as one request
ASK_SECONDS = 0.2  # between two looks for ranks that have not been asked to stop yet


@dataclass(frozen=True)
class LaunchOptions:
    """Options that are passed on to `deepspeed`; None means its own default. `num_gpus` is the processes per node."""

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


def deepspeed_command(options: LaunchOptions, arguments: Sequence[str]) -> list[str]:
    """The argv that starts the ranks of `megastruct.train` with `arguments`.

    With a node rank, every node runs its own launcher and ssh is not needed. Otherwise deepspeed reaches the hosts of
    the hostfile through pdsh and ssh, whose shells would expand special characters. Raises UserError for a path or an
    address that contains such characters.
    """
    if options.by_ssh:
        arguments = [encoded(arguments)]
        for where, word in (
            ("folder", os.getcwd()),
            ("Python", sys.executable),
            ("PYTHONPATH", import_variables().get("PYTHONPATH")),
            ("--master-addr", options.master_addr),
        ):
            if word is not None and shlex.quote(word) != word:
                found = f"{word!r} contains characters that a shell would interpret on the way to the other nodes"
                raise UserError(Problem(where, found, "a path without spaces and quotes, or --node-rank on each node"))
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]  # what the `deepspeed` script runs, in this Python
    if options.hostfile is None:
        # A machine-wide hostfile must not turn a local start into a start on several nodes.
        command += ["--hostfile", "", *_local_devices(options.num_gpus or 1)]
    else:
        command += ["--hostfile", options.hostfile]
        if options.num_gpus is not None:  # otherwise the slots in the hostfile count
            command += ["--num_gpus", str(options.num_gpus)]
    if options.num_nodes is not None:
        command += ["--num_nodes", str(options.num_nodes)]
    if options.node_rank is not None:
        command += ["--no_ssh", "--node_rank", str(options.node_rank)]
    if options.master_addr is not None:
        command += ["--master_addr", options.master_addr]
    if options.master_port is not None:
        command += ["--master_port", str(options.master_port)]
    return [*command, "--log_level", "error", "--no_local_rank", "--module", RANK_MODULE, *arguments]


def encoded(arguments: Sequence[str]) -> str:
    """The arguments as one word that no shell expands or splits; `decoded` is the inverse."""
    return ENCODED + base64.urlsafe_b64encode(json.dumps(list(arguments)).encode()).decode()


def decoded(arguments: Sequence[str]) -> list[str]:
    """The arguments that were passed to `encoded`; arguments that are not encoded are returned unchanged."""
    if len(arguments) == 1 and arguments[0].startswith(ENCODED):
        return json.loads(base64.urlsafe_b64decode(arguments[0].removeprefix(ENCODED)))
    return list(arguments)


def hostfile_slots(path: Path, num_nodes: int | None, node_rank: int | None) -> list[int]:
    """The number of processes per node, from the first `num_nodes` lines `host slots=N` of the file.

    Raises UserError if the file cannot be read, if a line is not of this form, or if the file has too few lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        found = f"{path}: {error.strerror}"
        raise UserError(Problem("--hostfile", found, "a file with lines such as: node1 slots=8")) from None
    slots = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.fullmatch(r"\s*[A-Za-z0-9][A-Za-z0-9._:-]*\s+slots=(\d+)\s*", line)
        if not match or int(match[1]) < 1:
            raise UserError(
                Problem(f"{path}:{number}", f"{line.strip()!r} is not a valid hostfile line", "node1 slots=8")
            )
        slots.append(int(match[1]))
    slots = slots[:num_nodes]
    if not slots or (num_nodes or 0) > len(slots) or (node_rank or 0) >= len(slots):
        found = f"{path} names {len(slots)} hosts"
        raise UserError(Problem("--num-nodes, --node-rank", found, "numbers that fit the file; node ranks start at 0"))
    return slots


def run_launcher(command: Sequence[str], environment: dict[str, str], stop_file: Path | None = None) -> int:
    """Run the launcher to its end and return its exit code.

    The first SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 is passed to the ranks, which finish their step, save and exit; the
    launchers do not receive it. `stop_file` is made for ranks on machines that the launcher reached by ssh. A later
    SIGTERM or SIGINT kills all processes of this run on this machine immediately.
    """
    asked = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and time.monotonic() - asked > REPEAT_SECONDS and number in (signal.SIGTERM, signal.SIGINT):
            _kill_children()
        elif not asked:
            asked = time.monotonic()
            name = signal.Signals(number).name
            request = "the ranks finish their step, save and exit; send it again to kill the run immediately"
            print(f"{name} received: {request}", file=sys.stderr, flush=True)
            # A thread: the launcher may still start ranks, while the main thread waits for it.
            threading.Thread(target=_ask_ranks, args=(number, process), name="stop", daemon=True).start()
            if stop_file is not None:
                stop_file.touch()

    with blocked():  # a signal that comes while the launcher is started waits for its handler
        before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
        process = subprocess.Popen(command, env=environment)
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _ask_ranks(number: int, launcher: subprocess.Popen[bytes]) -> None:
    """Send the signal once to every rank on this machine, also to those that are started later."""
    asked: set[psutil.Process] = set()
    while launcher.returncode is None:
        for child in set(psutil.Process().children(recursive=True)) - asked:
            with suppress(psutil.Error):
                if child.cmdline()[1:4] == ["-u", "-m", RANK_MODULE]:
                    asked.add(child)
                    child.send_signal(number)
        time.sleep(ASK_SECONDS)


def _kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()


def _local_devices(processes: int) -> list[str]:
    """The launcher's options for `processes` GPUs, named as in CUDA_VISIBLE_DEVICES.

    Given only a number of GPUs, the launcher would delete that variable.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(device.strip().isdigit() for device in visible) and len(visible) >= processes:
        return ["--include", "localhost:" + ",".join(device.strip() for device in visible[:processes])]
    return ["--num_gpus", str(processes)]
