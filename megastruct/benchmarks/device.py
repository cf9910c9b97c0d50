"""What all benchmarks do with the device that they measure."""

from __future__ import annotations

import gc
import platform

import torch


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def start_afresh(device: torch.device) -> None:
    """Let go of what an earlier model has left: compiled programs, cycles of objects, cached memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done everything that it was given; a CPU has always."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
