"""Device and number format of a model, resolved from `auto` or a name."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

import ladderstitch
from ladderstitch.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> str:
    """Return the device's name; `auto` is `cuda` if torch sees a GPU, else `cpu`.

    Raises `ConfigError` for an unknown device, or for a GPU if torch sees none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ConfigError(f"device: expected auto, cpu or cuda[:N], got {name!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: expected cpu because torch sees no GPU, got {name!r}")
    return name


def use_device(name: str, rank: int = 0) -> torch.device:
    """Return a device, and make it the current one if it is a GPU.

    Streams, graphs and Triton's kernels run on the current device. `cuda` without a number is the
    GPU number `rank`, modulo their count.
    """
    device = torch.device(name)
    if device.type == "cuda":
        index = rank % torch.cuda.device_count() if device.index is None else device.index
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Return the torch type; `auto` is bfloat16 on GPUs, and float32 on CPUs.

    On a CPU, batch size 1 is faster in float32. Raises `ConfigError` for an unknown name.
    """
    if name == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ConfigError(f"dtype: expected auto or one of {sorted(DTYPES)}, got {name!r}")
    return DTYPES[name]


def resolve_text_dtype(name: str, device: str) -> torch.dtype:
    """Return the torch type for a language model; `auto` is that of `resolve_dtype`.

    Raises `ConfigError` for bfloat16 on a CPU without instructions for it, where it is emulated and
    slower than float32.

    `auto` is float32 on CPUs with such instructions, too. On an AMD EPYC (Zen 5, one thread),
    SmolLM2-135M decodes 1.3 times as fast in bfloat16 with one row and 1.7 times with 8 rows, but
    then its greedy answers depend more often on the other sequences of their batches.
    """
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and name == "bfloat16" and not has_bfloat16_instructions():
        raise ConfigError(
            "dtype: expected auto or float32 on a CPU without bfloat16 instructions "
            "(avx512_bf16, amx_bf16), where it is emulated and slower, got 'bfloat16'"
        )
    return resolve_dtype(name, device)


def has_bfloat16_instructions() -> bool:
    """Return whether oneDNN multiplies bfloat16 on this CPU, and the CPU has instructions for it.

    On x86, oneDNN's own check also passes with AVX-512 alone, where it emulates bfloat16.
    """
    if not torch._C._has_mkldnn or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def resolve_runtime(name: str, device: str, dtype: str) -> Literal["onnx", "torch"]:
    """Return what runs image models; `auto` is `onnx` on CPUs in float32, else `torch`.

    Raises `ConfigError` for `onnx` on another device or in another number format.
    """
    can_compile = torch.device(device).type == "cpu" and dtype == "float32"
    if name == "torch" or (name == "auto" and not can_compile):
        return "torch"
    if not can_compile:
        raise ConfigError(f"runtime: expected torch on {device} in {dtype}, got {name!r}")
    return "onnx"


def versions() -> dict[str, str]:
    """Return the versions that measurements record: ours, the runtimes' and Python's."""
    return {
        "ladderstitch": ladderstitch.__version__,
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's name, generation and number of cores.

    The generation is that of x86 processors: in virtual machines their name alone says little.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    pairs = (line.partition(":") for line in reversed(lines))
    fields = {name.strip(): value.strip() for name, _, value in pairs}  # of the first processor
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        name = f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return f"{name}, {torch.multiprocessing.cpu_count()} cores"
