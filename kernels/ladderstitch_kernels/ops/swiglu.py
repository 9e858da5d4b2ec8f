"""The gate of the MLP: silu(gate) * up without a temporary tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladderstitch_kernels import reference
from ladderstitch_kernels.launch import expect_like, runs_triton

_BLOCK = 1024


@triton.jit
def swiglu_kernel(gate_up, out, f, BLOCK: tl.constexpr):
    """Compute `BLOCK` columns of one row of the output per program."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = columns < f
    gate = tl.load(gate_up + row * 2 * f + columns, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * f + f + columns, mask=exists, other=0.0).to(tl.float32)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(out + row * f + columns, y.to(out.dtype.element_ty), mask=exists)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `F.silu(gate) * up`, [M, F], for `gate_up` [M, 2F] with gate first.

    Raises `ValueError` for another number of dimensions or an odd width.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected shape [M, 2F], got {list(gate_up.shape)}")
    expect_like("gate_up", gate_up, gate_up)
    if not runs_triton(gate_up):
        return reference.swiglu(gate_up)
    m, f = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(m, f, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(f))
        swiglu_kernel[(m, triton.cdiv(f, block))](gate_up, out, f, BLOCK=block, num_warps=4)
    return out
