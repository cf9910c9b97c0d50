"""Peak speeds of devices and the memory in use, for MFU and the log."""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

# The limits of a container or job, of control groups of version 2 and 1.
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# Dense (not sparse) bf16 matrix peak in TFLOP/s, from the vendors' data sheets. The first name that occurs in the
# device's own name as whole words counts, so more specific names come first.
PEAK_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 150.0),
    ("A10", 125.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.0),
    ("MI250X", 383.0),
)


def peak_tflops(device: torch.device, precision: str, configured: float | None) -> float | None:
    """Peak TFLOP/s of one device: the configured number, else the table's, else None.

    The table covers bf16 only, because the fp32 peak depends on PyTorch's matrix-product mode.
    """
    if configured is not None:
        return configured
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """Peak bf16 TFLOP/s of a device by the name that its driver reports; None if the table does not have it."""
    matches = (peak for part, peak in PEAK_BF16_TFLOPS if re.search(rf"\b{re.escape(part)}\b", name))
    return next(matches, None)


def memory_there_bytes(device_type: str) -> int:
    """Bytes that may be filled: of the first GPU; or of the machine with its swap, or of its control group."""
    if device_type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    for file in _MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # no such group, or "max"
            there = min(there, int(file.read_text()))
    return there


def current_memory_bytes(device: torch.device) -> int:
    """Bytes that this process uses now: allocated on the GPU, or resident on the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def read_peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes of this process: allocated on the GPU since the last call, or resident on the CPU since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
