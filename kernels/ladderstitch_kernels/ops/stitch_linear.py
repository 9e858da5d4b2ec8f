"""The stitching layer: an affine map between widths with a low-rank update, in one kernel.

A stitching layer S x = W x + b commutes with a reduction in flight: S(x + sum p) = S x + sum W p.
A ladder path can therefore cross a stitch without waiting for the reduction. `stitch_pending` maps
the stream and, without the bias, this rank's part of the pending sum. It reads W once for both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ladderstitch_kernels import reference
from ladderstitch_kernels.launch import expect_like, expect_shape, interpreted, runs_triton

_MAX_RANK = 128
PLAIN_PRODUCTS, LOW_RANK_PRODUCTS = 2**29, 2**35
"""Multiply-accumulates above which torch computes the op, without and with a low-rank update."""


@triton.jit
def stitch_kernel(
    x,
    pending,
    weight,
    bias,
    down,
    up,
    out,
    pending_out,
    m,
    n,
    k,
    rank,
    PENDING: tl.constexpr,
    BIAS: tl.constexpr,
    RANK_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one tile of the output per program; tiles after the stream's are of the pending sum.

    Tiles with the same columns follow each other, so that the weight is read once.
    """
    tiles = tl.cdiv(m, BLOCK_M)
    tile, column_tile = tl.program_id(0), tl.program_id(1)
    biased = tile < tiles
    if PENDING:
        x = tl.where(biased, x, pending)
        out = tl.where(biased, out, pending_out)
        tile = tl.where(biased, tile, tile - tiles)
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    x_at = x + rows[:, None] * k + ks[None, :]
    w_at = weight + columns[None, :].to(tl.int64) * k + ks[:, None]
    if RANK_PAD:
        ranks = tl.arange(0, RANK_PAD)
        down_at = down + ranks[None, :] * k + ks[:, None]
        low = tl.zeros([BLOCK_M, RANK_PAD], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = start + ks < k
        a = tl.load(x_at + start, mask=(rows[:, None] < m) & inside[None, :], other=0.0)
        w = tl.load(w_at + start, mask=(columns[None, :] < n) & inside[:, None], other=0.0)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        total = tl.dot(a, w, total, input_precision="ieee")
        if RANK_PAD:
            d = tl.load(down_at + start, mask=(ranks[None, :] < rank) & inside[:, None], other=0.0)
            low = tl.dot(a, d.to(a.dtype), low, input_precision="ieee")
    if RANK_PAD:
        exists = (columns[None, :] < n) & (ranks[:, None] < rank)
        u = tl.load(up + columns[None, :] * rank + ranks[:, None], mask=exists, other=0.0)
        if UPCAST:
            u = u.to(tl.float32)
        total = tl.dot(low.to(u.dtype), u, total, input_precision="ieee")
    if BIAS:
        shift = tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)
        total += tl.where(biased, 1.0, 0.0) * shift[None, :]
    exists = (rows[:, None] < m) & (columns[None, :] < n)
    at = out + rows[:, None] * n + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=exists)


def stitch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Return x W^T + b + (x A^T) B^T, [M, N], for x [M, K], W [N, K] and b [N].

    A (`down`) is [r, K] and B (`up`) is [N, r], with r at most 128; give both or neither. The torch
    equivalent is `F.linear(x, weight, bias) + F.linear(F.linear(x, down), up)`. One launch pays off
    where launches and passes over the output dominate: for small and medium products. Torch
    computes larger ones. Sums accumulate in float32, and x A^T is rounded to the dtype of `x`.
    Raises `ValueError` if the shapes do not fit together.
    """
    _check(x, weight, bias, down, up)
    if not runs_triton(x):
        return reference.stitch_linear(x, weight, bias, down, up)
    if _torch_is_faster(x, weight, down):
        mapped = F.linear(x, weight, bias)
        return mapped if down is None or up is None else mapped.addmm_(F.linear(x, down), up.T)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    _launch(x, None, weight, bias, down, up, out, None)
    return out


def stitch_pending(
    x: Tensor,
    pending: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return stitch_linear(x), and stitch_linear(pending) without bias, in one launch; both [M, N].

    `pending` [M, K] is this rank's part of a sum over ranks that has not been computed. If each
    rank posts the second result instead of its part, the sum arrives in the new width, which is
    fewer bytes if N < K. Raises `ValueError` if the shapes do not fit together.
    """
    _check(x, weight, bias, down, up)
    expect_shape("pending", pending, tuple(x.shape))
    expect_like("pending", pending, x)
    if not runs_triton(x):
        return reference.stitch_pending(x, pending, weight, bias, down, up)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    arriving = torch.empty_like(out)
    _launch(x, pending, weight, bias, down, up, out, arriving)
    return out, arriving


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None
) -> None:
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"x and weight: expected [M, K] and [N, K], got {list(x.shape)}, {list(weight.shape)}"
        )
    expect_shape("weight", weight, (weight.shape[0], x.shape[1]))
    if (down is None) != (up is None):
        raise ValueError("down and up: expected both or neither, got one")
    tensors = {"x": x, "weight": weight}
    if bias is not None:
        expect_shape("bias", bias, (weight.shape[0],))
        tensors["bias"] = bias
    if down is not None and up is not None:
        rank = down.shape[0]
        if not 0 < rank <= _MAX_RANK:
            raise ValueError(f"down: expected a rank of 1 to {_MAX_RANK}, got {rank}")
        expect_shape("down", down, (rank, x.shape[1]))
        expect_shape("up", up, (weight.shape[0], rank))
        tensors |= {"down": down, "up": up}
    for name, tensor in tensors.items():
        expect_like(name, tensor, x)


def _launch(
    x: Tensor,
    pending: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    arriving: Tensor | None,
) -> None:
    m, k, n = x.shape[0], x.shape[1], weight.shape[0]
    if not out.numel():
        return
    rank = 0 if down is None else down.shape[0]
    block_m, block_n = tile_shape(m, n)
    large = block_m * block_n >= 128 * 128
    tiles = triton.cdiv(m, block_m) * (1 if pending is None else 2)
    stitch_kernel[(tiles, triton.cdiv(n, block_n))](
        x,
        pending,
        weight,
        bias,
        down,
        up,
        out,
        arriving,
        m,
        n,
        k,
        rank,
        PENDING=pending is not None,
        BIAS=bias is not None,
        RANK_PAD=max(16, triton.next_power_of_2(rank)) if rank else 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=64 if x.element_size() <= 2 else 32,
        UPCAST=interpreted() or x.dtype == torch.float32,
        num_warps=8 if large else 4,
        num_stages=3 if large else 4,
    )


def _torch_is_faster(x: Tensor, weight: Tensor, down: Tensor | None) -> bool:
    """Return whether cuBLAS is faster than one launch of this kernel, as measured on an H100."""
    products = x.numel() * weight.shape[0]
    return x.is_cuda and products > (PLAIN_PRODUCTS if down is None else LOW_RANK_PRODUCTS)


def tile_shape(m: int, n: int) -> tuple[int, int]:
    """Return rows and columns of a tile for an output [m, n]: flat for few rows, else square.

    The limits are measured on an H100 (`results/`).
    """
    if m <= 16:
        return 16, 32
    if m * n <= 1_500_000:
        return 64, 64
    return (64, 128) if m * n <= 2_200_000 else (128, 128)
