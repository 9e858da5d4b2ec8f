"""Shared code of launchers: where a kernel runs, and argument checks with clear errors."""

from __future__ import annotations

import torch
import triton
from torch import Tensor


def interpreted() -> bool:
    """Return whether kernels run in the interpreter.

    They do if TRITON_INTERPRET=1 was set when triton was imported.
    """
    return bool(triton.knobs.runtime.interpret)


def runs_triton(x: Tensor) -> bool:
    """Return whether Triton runs an op on `x`: on a GPU, and for any device in the interpreter.

    Otherwise torch runs it.
    """
    return x.is_cuda or interpreted()


def expect_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless `x` has this shape."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")


def expect_like(name: str, x: Tensor, other: Tensor) -> None:
    """Raise `ValueError` unless `x` has the dtype and device of `other` and is contiguous."""
    if x.dtype != other.dtype or x.device != other.device:
        raise ValueError(
            f"{name}: expected {other.dtype} on {other.device}, got {x.dtype} on {x.device}"
        )
    expect_contiguous(name, x)


def expect_contiguous(name: str, x: Tensor) -> None:
    """Raise `ValueError` unless `x` is contiguous."""
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")


def warps(block_bytes: int) -> int:
    """Return the number of warps, 1 to 16, for a program that holds `block_bytes` in registers.

    Each thread holds at least 64 bytes, unless the block is smaller than one warp's share.
    """
    return max(1, min(16, triton.next_power_of_2(block_bytes) // (32 * 64)))


def sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a GPU.

    The result is 1 for other devices, because the interpreter runs programs one after another.
    """
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
