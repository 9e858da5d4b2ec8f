"""What launchers share: who runs a kernel, and argument checks that say what was expected."""

from __future__ import annotations

import torch
import triton
from torch import Tensor


def interpreted() -> bool:
    """Whether kernels run in the interpreter (TRITON_INTERPRET=1 when triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def runs_triton(x: Tensor) -> bool:
    """Triton for what lies on a GPU, and for everything in the interpreter; else torch."""
    return x.is_cuda or interpreted()


def expect_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises `ValueError` unless `x` has this shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")


def expect_like(name: str, x: Tensor, other: Tensor) -> None:
    """Raises `ValueError` unless `x` has the other's dtype and device and is contiguous."""
    if x.dtype != other.dtype or x.device != other.device:
        raise ValueError(
            f"{name}: expected {other.dtype} on {other.device}, got {x.dtype} on {x.device}"
        )
    expect_contiguous(name, x)


def expect_contiguous(name: str, x: Tensor) -> None:
    """Raises `ValueError` unless `x` is contiguous."""
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")


def warps(block_bytes: int) -> int:
    """Warps for a program that holds this much in registers: 64 bytes a thread and more."""
    return max(1, min(16, triton.next_power_of_2(block_bytes) // (32 * 64)))


def sms(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter, where programs run in turn, one."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
