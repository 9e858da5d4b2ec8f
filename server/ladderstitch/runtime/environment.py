"""What a measurement was taken with: versions of the software and the name of the device."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import ladderstitch


def versions() -> dict[str, str]:
    return {
        "ladderstitch": ladderstitch.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.multiprocessing.cpu_count()} cores"
