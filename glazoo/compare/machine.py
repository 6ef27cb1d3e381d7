"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from glazoo.versions import stated

__all__ = ["cores", "machine", "versions"]


def versions() -> dict[str, str]:
    """Return the versions of Python and of what computes."""
    return stated("torch", "triton", "numpy")


def cores() -> int:
    """Counts the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> str:
    """Names the processor, its cores and memory, and a GPU if there is one."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    text = f"{name}, {cores()} cores"
    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    return text
