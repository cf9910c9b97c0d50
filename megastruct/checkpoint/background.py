"""Saves while training continues: the state is copied to host memory, and a thread writes the copy.

Training stops only for the copy. There is one save at a time; the next one waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# A rank that has written its file waits for the slowest disk.
TIMEOUT = timedelta(hours=6)


class BackgroundSaver:
    """The pending save of this process, its host memory, and its own process group over the world.

    The group uses gloo on all devices, so that the thread's collectives do not mix with those of training.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._group: dist.ProcessGroup | None = None

    def connect(self) -> None:
        """Make the process group if there is none yet. Collective; called early, to fail before any training."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def host_copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, page-locked for tensors of a GPU. The memory is kept for the next save.

        Waits for the pending save, which is written from the same memory.
        """
        self.wait()
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return self._buffers

    def start(self, write: Callable[[dist.ProcessGroup], object]) -> None:
        """Call `write(group)` in a thread. Collective. A process that exits normally waits for the thread."""
        self.wait()
        self.connect()
        group = self._group
        assert group is not None

        def run() -> None:
            try:
                write(group)
            except BaseException as error:  # CheckpointException is not an Exception
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the pending save, if there is one, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def meet(self) -> None:
        """Wait for all ranks, for as long as a save may take. Collective; after `connect`."""
        dist.barrier(self._group)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        old = self._buffers.get(name)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            return old
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
