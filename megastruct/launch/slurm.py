"""Runs as Slurm jobs, through submitit: one task per node starts the ranks of its node; a preempted job is requeued.

submitit pickles the job into its folder and unpickles it on the nodes, so only the owner may access that folder.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from megastruct.errors import EXIT_CODE_START_AGAIN, Problem, UserError

FIRST_PORT, NUM_PORTS = 20_000, 10_000  # the job's number picks one, so that all of its nodes use the same port
SIGNAL_SECONDS = 2.0  # the time between a signal's arrival at the ranks and at the task that started them


@dataclass(frozen=True)
class Resources:
    """What the job requests from Slurm.

    `gpus_per_node` is also the number of processes per node; `slurm` holds further options of sbatch, by name.
    """

    nodes: int
    gpus_per_node: int
    minutes: int
    name: str
    folder: Path
    uses_gpus: bool
    cpus_per_task: int | None = None
    signal_seconds: int = 120
    max_timeouts: int = 1000
    slurm: dict[str, Any] | None = None
    setup: tuple[str, ...] = ()  # lines of shell before the run


class TrainingJob:
    """What runs on every node of a job. submitit calls it, and calls `checkpoint` before the job is preempted."""

    def __init__(self, arguments: list[str], nodes: int, processes_per_node: int, devices: str | None = None) -> None:
        """`arguments`: the config and overrides, as for `megastruct.start`. `devices`: CUDA_VISIBLE_DEVICES, if it is
        not the scheduler's."""
        self.arguments, self.nodes, self.processes, self.devices = arguments, nodes, processes_per_node, devices
        self.process: Any = None
        self.code: int | None = None

    def __call__(self) -> str:
        """Train until the run is finished or a user stops it. Raises RuntimeError if it fails."""
        environment = os.environ | ({} if self.devices is None else {"CUDA_VISIBLE_DEVICES": self.devices})
        self.process = subprocess.Popen(self.command(submitit.JobEnvironment()), env=environment)
        threading.Thread(target=self._note_end, daemon=True).start()
        self._wait()
        if self.code == EXIT_CODE_START_AGAIN:
            time.sleep(SIGNAL_SECONDS)  # in a preemption, `checkpoint` is called now and requeues the job
            return "stopped"
        if self.code:
            raise RuntimeError(f"the run ended with exit code {self.code}; see its output for the cause")
        return "finished"

    def checkpoint(self) -> DelayedSubmission:
        """Save and end the run before the time limit or a preemption; the returned job continues it.

        Raises RuntimeError if the run fails to save.
        """
        if self.process is not None:
            # Slurm may have sent SIGTERM already; a second one would kill the run without saving.
            self.process.send_signal(signal.SIGUSR1)
            self._wait()
            if self.code not in (0, EXIT_CODE_START_AGAIN):
                raise RuntimeError(f"not requeued: the run ended with exit code {self.code} instead of saving")
        return DelayedSubmission(TrainingJob(self.arguments, self.nodes, self.processes, self.devices))

    def command(self, environment: Any) -> list[str]:
        """The command that starts this node's ranks; with several nodes each starts its own, without ssh."""
        command = [sys.executable, "-u", "-m", "megastruct.start", *self.arguments]
        command += ["--num-gpus", str(self.processes)]
        if self.nodes == 1:
            return command
        hosts, node = environment.hostnames, environment.node
        hostfile = Path(environment.paths.folder) / f"hosts.{node}"
        hostfile.write_text("".join(f"{host} slots={self.processes}\n" for host in hosts), encoding="utf-8")
        port = FIRST_PORT + int(environment.raw_job_id) % NUM_PORTS
        command += ["--hostfile", str(hostfile), "--node-rank", str(node)]
        return [*command, "--master-addr", hosts[0], "--master-port", str(port)]

    def _note_end(self) -> None:
        self.code = self.process.wait()

    def _wait(self) -> None:
        """Wait for the run to end, without a lock: a signal handler may wait here while the main code does, too."""
        while self.code is None:
            time.sleep(0.1)


class _AnySlurm(submitit.SlurmExecutor):
    """An executor that writes its job file even where Slurm is not installed."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def job_text(resources: Resources, job: TrainingJob) -> str:
    """The text that `submit` would pass to sbatch, and the command that the job would run."""
    executor = _slurm(resources, _AnySlurm)
    text = executor._make_submission_file_text(executor._submitit_command_str, "dry")
    command = shlex.join(["megastruct-train", *job.arguments, "--num-gpus", str(job.processes)])
    return f"{text}\n# on each of {resources.nodes} nodes:\n#   {command}\n"


def submit(resources: Resources, job: TrainingJob) -> submitit.Job[str]:
    """Submit the job to Slurm. Raises UserError if Slurm is not installed or refuses the job."""
    try:
        executor = _slurm(resources, submitit.SlurmExecutor)
    except RuntimeError as error:
        raise UserError(Problem("sbatch", str(error), "--dry-run to see the job, --local to run it here")) from None
    _private(resources.folder)
    try:
        return executor.submit(job)
    except (FailedJobError, FailedSubmissionError) as error:
        found = (str(error).strip().splitlines() or ["refused"])[-1]
        raise UserError(Problem("sbatch", found, "--dry-run shows what was submitted")) from None


def run_here(resources: Resources, job: TrainingJob) -> submitit.Job[str]:
    """Run the same job on this machine in the background, requeued as by Slurm. Raises UserError for several nodes."""
    if resources.nodes > 1:
        raise UserError(Problem("--nodes", f"{resources.nodes} with --local", "--nodes 1"))
    _private(resources.folder)
    executor = submitit.LocalExecutor(resources.folder, max_num_timeout=resources.max_timeouts)
    job.devices = os.environ.get("CUDA_VISIBLE_DEVICES")  # submitit would number them
    executor.update_parameters(
        timeout_min=resources.minutes,
        gpus_per_node=resources.gpus_per_node if resources.uses_gpus else 0,
        tasks_per_node=1,
        signal_delay_s=resources.signal_seconds,
        stderr_to_stdout=True,
    )
    return executor.submit(job)


def _slurm(resources: Resources, kind: type[submitit.SlurmExecutor]) -> submitit.SlurmExecutor:
    executor = kind(resources.folder, max_num_timeout=resources.max_timeouts)
    parameters = {
        "job_name": resources.name,
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": resources.gpus_per_node if resources.uses_gpus else None,
        "cpus_per_task": resources.cpus_per_task,
        "signal_delay_s": resources.signal_seconds,
        "stderr_to_stdout": True,
        "setup": list(resources.setup) or None,
        "additional_parameters": {"requeue": True, **(resources.slurm or {})},
    }
    executor._internal_update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return executor


def _private(folder: Path) -> None:
    """Make the folder, accessible to its owner only. Raises UserError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise UserError(Problem("run.folder", f"{folder}: {error.strerror}", "run.folder=runs")) from None
