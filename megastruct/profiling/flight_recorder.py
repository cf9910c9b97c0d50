"""The collectives that each rank had started when a run hung: PyTorch's flight recorder.

    runs/NAME/profile/collectives_rank_0         one file per rank

`torchfrtrace --prefix collectives_rank_ runs/NAME/profile` compares the files of all ranks. They are written by the
watchdog of PyTorch when a collective times out, and by ours when it ends the run.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import torch.distributed as dist

from megastruct.config.system import ProfilingConfig
from megastruct.profiling.files import FOLDER_NAME, write_file

PREFIX = "collectives_rank_"
LONGEST_SECONDS = 10.0  # of a dump, which asks a GPU that may not answer
SHORTEST_SECONDS = 1.0  # a launcher kills the other ranks when one has ended


class FlightRecorder:
    """The recorder of this rank. It has to be made before the process group, which reads the environment."""

    def __init__(self, config: ProfilingConfig, folder: Path, rank: int) -> None:
        """`folder`: the run folder. Variables that the user has set stay as they are."""
        self._entries, self._folder, self._rank = config.flight_recorder_entries, folder / FOLDER_NAME, rank
        if not self._entries:
            return
        # Each has two names; releases of PyTorch differ in which one counts.
        prefix = str((self._folder / PREFIX).absolute())
        for names, value in (
            (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), str(self._entries)),
            (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), prefix),
            (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
        ):
            for name in names:
                os.environ.setdefault(name, value)
        self._folder.mkdir(parents=True, exist_ok=True)  # PyTorch does not make it

    def dump(self) -> None:
        """Write what this rank has recorded, and say so. Takes 1 to 10 seconds, and raises nothing.

        For the thread of a watchdog: the main thread may hang in a collective.
        """
        if not self._entries:
            return
        writer = threading.Thread(target=self._write, name="flight recorder", daemon=True)
        start = time.monotonic()
        writer.start()
        writer.join(LONGEST_SECONDS)
        time.sleep(max(0.0, start + SHORTEST_SECONDS - time.monotonic()))

    def _write(self) -> None:
        content = recorded_collectives()
        if content:
            write_file(self._folder / f"{PREFIX}{self._rank}", lambda path: path.write_bytes(content), "collectives")


def recorded_collectives() -> bytes:
    """The pickle of PyTorch's flight recorder; empty if this build has none or there is no process group."""
    from torch._C import _distributed_c10d

    if not dist.is_initialized():
        return b""
    name = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
    dump = getattr(_distributed_c10d, name, None)
    return dump() if dump else b""
