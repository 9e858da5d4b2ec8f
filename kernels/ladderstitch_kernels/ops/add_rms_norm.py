"""Residual add and RMSNorm in one pass over each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladderstitch_kernels import reference
from ladderstitch_kernels.launch import expect_like, expect_shape, runs_triton, warps


@triton.jit
def add_rms_norm_kernel(x, residual, weight, total_out, norm_out, n, eps, BLOCK: tl.constexpr):
    """Add and normalise one row of `n` elements per program."""
    start = tl.program_id(0).to(tl.int64) * n
    columns = tl.arange(0, BLOCK)
    exists = columns < n
    own = tl.load(x + start + columns, mask=exists, other=0.0)
    before = tl.load(residual + start + columns, mask=exists, other=0.0)
    rounded = (own.to(tl.float32) + before.to(tl.float32)).to(total_out.dtype.element_ty)
    tl.store(total_out + start + columns, rounded, mask=exists)
    total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / n + eps)
    gain = tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)
    tl.store(norm_out + start + columns, (total * scale * gain).to(rounded.dtype), mask=exists)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return r = residual + x and r / sqrt(mean(r^2) + eps) * weight, both [M, N].

    The torch equivalent is `r` and `F.rms_norm(r, (N,), weight, eps)`; the kernel reads and writes
    each row once. r is rounded to its dtype before the norm. N is at most 32,768, because a row
    must fit the registers of one program. Raises `ValueError` if shapes, dtypes or devices differ.
    """
    if x.dim() != 2 or not 0 < x.shape[1] <= 32768:
        raise ValueError(f"x: expected shape [M, 1 to 32768], got {list(x.shape)}")
    expect_like("x", x, x)
    expect_shape("residual", residual, tuple(x.shape))
    expect_like("residual", residual, x)
    expect_shape("weight", weight, (x.shape[1],))
    expect_like("weight", weight, x)
    if not runs_triton(x):
        return reference.add_rms_norm(x, residual, weight, eps)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    if x.shape[0]:
        block = triton.next_power_of_2(x.shape[1])
        add_rms_norm_kernel[(x.shape[0],)](
            x,
            residual,
            weight,
            total,
            normed,
            x.shape[1],
            eps,
            BLOCK=block,
            num_warps=warps(block * 4),  # both sums are held in float32
        )
    return total, normed
