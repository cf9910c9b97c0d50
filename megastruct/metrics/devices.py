"""Peak speeds of devices and the memory in use, for MFU and the log."""

from __future__ import annotations

import resource
import sys

import torch

# Dense (not sparse) bf16 matrix peak in TFLOP/s, from the vendors' data sheets. The first name that is part of the
# device's own name counts, so longer names stand first.
PEAK_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("L40S", 362.0),
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


def peak_tflops(device: torch.device, configured: float | None) -> float | None:
    """TFLOP/s that one device could do at best: the configured number, else the table; None if neither knows."""
    if configured is not None:
        return configured
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_TFLOPS if part in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory of this process so far: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
