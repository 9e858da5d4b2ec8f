"""A reduction in two halves: `gemv_post` starts it, `wait_add_norm` collects it a sub-block later.

In tensor-parallel decoding, every sub-block ends in x W^T summed over ranks. Posting stores each
rank's partial product directly into a slot of every rank's memory and signals. No multiprocessor
and no side stream is occupied while the data is in transit. Collecting waits for the signals, sums
the partials in rank order (so that all ranks hold the same bits), adds the residual, and norms.

If a reduction is collected right after it is posted, the pair is an all-reduce: the standard
residual. With one sub-block in between it is the Ladder Residual (arXiv 2501.06589), which has up
to two reductions in flight. A peer's post e + 2 is then the first proof that it has read the slot
of e. Therefore slots are reused after 4 reductions.

The width of the sums may change between reductions, as when a stream crosses a stitching layer. The
places of slots and the number of programs of a post are those of the largest width. They do not
depend on the sums that came before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladderstitch_kernels.comm.signals import STOPPED, advance, signal, wait
from ladderstitch_kernels.comm.symmetric import SymmetricMemory
from ladderstitch_kernels.launch import expect_like, expect_shape, interpreted, warps

SLOTS = 4


class Exchange:
    """One rank's slots and counters for reductions of up to `rows` rows of up to `width` elements.

    All ranks create their exchanges in the same order, post the same shapes, and collect in posting
    order with at most two reductions in flight. No state changes on the host after creation, so
    posts and waits can be captured in CUDA graphs.
    """

    def __init__(
        self,
        memory: SymmetricMemory,
        rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        columns: int = 32,
    ) -> None:
        """Allocate slots and counters; all ranks must do so together.

        One program of a post handles `columns` columns of the output, a power of two. Raises
        `ValueError` for any other number.
        """
        if columns != triton.next_power_of_2(columns):
            raise ValueError(f"columns: expected a power of two, got {columns}")
        self.rank, self.ranks = memory.rank, memory.ranks
        self.rows, self.width, self.dtype, self.columns = rows, width, dtype, columns
        self.device = torch.device(device)
        self.programs = triton.cdiv(width, columns)
        """Programs of a post; those after the last column of a narrower sum only signal."""
        self.slot_elements = rows * width
        self.slots = memory.zeros((SLOTS, self.ranks, rows, width), dtype)
        self.arrivals = memory.zeros((self.ranks,), torch.int32)
        """The number of programs of each rank that have posted, over all posts."""
        self.counts = torch.zeros(4, dtype=torch.int32, device=self.device)
        """Posts, programs that finished posting, collections, programs that finished collecting."""

    def stop(self) -> None:
        """End every wait of this rank at once, whatever the slots hold.

        This is for a rank whose peer died: everything that it computes from here on must be
        discarded. On a GPU, call it on another stream than the one that waits.
        """
        self.arrivals.local.add_(STOPPED)

    def resume(self) -> None:
        """Let this rank wait again after `stop`, if all ranks have posted and collected equally."""
        self.arrivals.local.sub_(STOPPED)

    def check(self, name: str, x: Tensor) -> tuple[int, int]:
        """Return rows and columns of a sum, or of this rank's part of it.

        Raises `ValueError` for a shape or dtype that this exchange was not made for.
        """
        if x.dim() != 2 or not 0 < x.shape[1] <= self.width:
            raise ValueError(
                f"{name}: expected shape [1 to {self.rows}, 1 to {self.width}], got {list(x.shape)}"
            )
        self.check_rows(name, x, x.shape[1])
        return x.shape[0], x.shape[1]

    def check_rows(self, name: str, x: Tensor, width: int) -> None:
        """Raise `ValueError` unless `x` is [M, width], and its M and dtype are of this exchange."""
        if x.dim() != 2 or not 0 < x.shape[0] <= self.rows or x.shape[1] != width:
            raise ValueError(
                f"{name}: expected shape [1 to {self.rows}, {width}], got {list(x.shape)}"
            )
        if x.dtype != self.dtype:
            raise ValueError(f"{name}: expected {self.dtype}, got {x.dtype}")


@triton.jit
def _slot(epoch, SLOTS: tl.constexpr):
    tl.static_assert((SLOTS & (SLOTS - 1)) == 0)
    return epoch & (SLOTS - 1)


@triton.jit
def _push(
    partial,
    where,
    exists,
    slots,
    epoch,
    rank,
    slot_elements,
    RANKS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Store a part of this rank's partial product in the slot of every rank."""
    slot = (_slot(epoch, SLOTS) * RANKS + rank).to(tl.int64) * slot_elements
    for peer in tl.static_range(RANKS):
        base = tl.load(slots + peer).to(tl.pointer_type(partial.dtype))
        base = tl.multiple_of(base, 16)
        tl.store(base + slot + where, partial, mask=exists)


@triton.jit
def gemv_post_kernel(
    x,
    weight,
    slots,
    arrivals,
    counts,
    rank,
    m,
    n,
    k,
    slot_elements,
    RANKS: tl.constexpr,
    RANKS_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute `BLOCK_N` columns of x W^T per program, store them at every rank, and signal."""
    epoch = tl.load(counts) + 1
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    w_at = weight + columns[:, None].to(tl.int64) * k + ks[None, :]
    if M == 1:
        lanes = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, k, BLOCK_K):
            inside = start + ks < k
            w = tl.load(w_at + start, mask=(columns[:, None] < n) & inside[None, :], other=0.0)
            a = tl.load(x + start + ks, mask=inside, other=0.0)
            lanes += w.to(tl.float32) * a.to(tl.float32)[None, :]
        partial = tl.sum(lanes, axis=1)
        where, exists = columns, columns < n
    else:
        rows = tl.arange(0, M)
        total = tl.zeros([BLOCK_N, M], tl.float32)
        for start in range(0, k, BLOCK_K):
            inside = start + ks < k
            w = tl.load(w_at + start, mask=(columns[:, None] < n) & inside[None, :], other=0.0)
            a = tl.load(
                x + rows[None, :] * k + (start + ks)[:, None],
                mask=(rows[None, :] < m) & inside[:, None],
                other=0.0,
            )
            if UPCAST:
                w, a = w.to(tl.float32), a.to(tl.float32)
            total = tl.dot(w, a, total, input_precision="ieee")
        partial = total
        where = rows[None, :] * n + columns[:, None]
        exists = (rows[None, :] < m) & (columns[:, None] < n)
    partial = partial.to(x.dtype.element_ty)
    _push(partial, where, exists, slots, epoch, rank, slot_elements, RANKS, SLOTS)
    signal(arrivals, rank, RANKS, RANKS_PAD)
    advance(counts, counts + 1, tl.num_programs(0))


def gemv_post(x: Tensor, weight: Tensor, exchange: Exchange) -> None:
    """Start the sum over ranks of x @ weight.T, [M, N], for x [M, K_r] and weight [N, K_r].

    N is at most the width of the exchange, and K_r this rank's share of the reduced dimension. The
    product accumulates in float32 and is sent in the dtype of `x`. M is at most 16: the op is for
    decoding, where reading the weight bounds the time. Raises `ValueError` for a shape or dtype
    that the exchange was not made for.
    """
    m, (n, k) = x.shape[0], weight.shape
    exchange.check_rows("x", x, k)
    if m > 16:
        raise ValueError(f"x: expected at most 16 rows, got {m}; use a matmul and `post`")
    if n > exchange.width:
        raise ValueError(f"weight: expected at most {exchange.width} rows, got {n}")
    expect_like("weight", weight, x)
    expect_like("x", x, x)
    tile = 16384 if m == 1 else 8192  # elements of the weight; measured on an H100
    block_k = min(max(16, tile // exchange.columns), max(16, triton.next_power_of_2(k)))
    gemv_post_kernel[(exchange.programs,)](
        x,
        weight,
        exchange.slots.addresses,
        exchange.arrivals.addresses,
        exchange.counts,
        exchange.rank,
        m,
        n,
        k,
        exchange.slot_elements,
        **_constants(exchange),
        M=1 if m == 1 else 16,
        BLOCK_N=exchange.columns,
        BLOCK_K=block_k,
        UPCAST=interpreted() or x.dtype == torch.float32,
        num_warps=4,
        num_stages=3 if m == 1 or x.element_size() > 2 else 5,
    )


@triton.jit
def post_kernel(
    x,
    slots,
    arrivals,
    counts,
    rank,
    m,
    n,
    slot_elements,
    RANKS: tl.constexpr,
    RANKS_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store `BLOCK_N` columns of a product at every rank per program, and signal."""
    epoch = tl.load(counts) + 1
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    for first in range(0, m, BLOCK_M):
        rows = (first + tl.arange(0, BLOCK_M))[:, None]
        exists = (rows < m) & (columns < n)
        where = rows * n + columns
        partial = tl.load(x + where, mask=exists, other=0.0)
        _push(partial, where, exists, slots, epoch, rank, slot_elements, RANKS, SLOTS)
    signal(arrivals, rank, RANKS, RANKS_PAD)
    advance(counts, counts + 1, tl.num_programs(0))


def post(partial: Tensor, exchange: Exchange) -> None:
    """Start the sum over ranks of a product [M, N] that is computed already.

    N is at most the width of the exchange. Raises `ValueError` for a shape or dtype that the
    exchange was not made for.
    """
    m, n = exchange.check("partial", partial)
    expect_like("partial", partial, partial)
    post_kernel[(exchange.programs,)](
        partial,
        exchange.slots.addresses,
        exchange.arrivals.addresses,
        exchange.counts,
        exchange.rank,
        m,
        n,
        exchange.slot_elements,
        **_constants(exchange),
        BLOCK_M=min(16, triton.next_power_of_2(m)),
        BLOCK_N=exchange.columns,
        num_warps=2,
    )


@triton.jit
def wait_add_norm_kernel(
    slots,
    arrivals,
    counts,
    residual,
    weight,
    total_out,
    norm_out,
    n,
    slot_elements,
    eps,
    programs,
    RANKS: tl.constexpr,
    RANKS_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
):
    """Collect one row per program: wait for all ranks, sum, and optionally add and norm."""
    row = tl.program_id(0)
    epoch = tl.load(counts + 2) + 1
    source = tl.arange(0, RANKS_PAD)
    wait(arrivals + source, source < RANKS, epoch * programs)
    columns = tl.arange(0, BLOCK)
    exists = columns < n
    slot = slots + _slot(epoch, SLOTS).to(tl.int64) * RANKS * slot_elements + row * n + columns
    total = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(RANKS):
        part = tl.load(slot + source * slot_elements, mask=exists, other=0.0)
        total += part.to(tl.float32)
    if ADD:
        before = tl.load(residual + row * n + columns, mask=exists, other=0.0)
        total += before.to(tl.float32)
    rounded = total.to(total_out.dtype.element_ty)
    tl.store(total_out + row * n + columns, rounded, mask=exists)
    if NORM:
        total = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(total * total, axis=0) / n + eps)
        gain = tl.load(weight + columns, mask=exists, other=0.0)
        normed = total * scale * gain.to(tl.float32)
        tl.store(norm_out + row * n + columns, normed.to(rounded.dtype), mask=exists)
    advance(counts + 2, counts + 3, tl.num_programs(0))


def wait_add_norm(
    residual: Tensor, weight: Tensor, eps: float, exchange: Exchange
) -> tuple[Tensor, Tensor]:
    """Collect the oldest reduction s and return r = residual + s and r / rms(r) * weight.

    Both results are [M, N]. s accumulates in float32 and in rank order, and r is rounded to its
    dtype before the norm. Raises `ValueError` for a shape or dtype that the exchange was not made
    for.
    """
    _, n = exchange.check("residual", residual)
    expect_shape("weight", weight, (n,))
    expect_like("residual", residual, residual)
    expect_like("weight", weight, residual)
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    _collect(exchange, residual, weight, eps, total, normed)
    return total, normed


def wait_add(residual: Tensor, exchange: Exchange) -> Tensor:
    """Collect the oldest reduction s and return residual + s, [M, N].

    Raises `ValueError` for a shape or dtype that the exchange was not made for.
    """
    exchange.check("residual", residual)
    expect_like("residual", residual, residual)
    total = torch.empty_like(residual)
    _collect(exchange, residual, None, 0.0, total, None)
    return total


def wait_sum(rows: int, exchange: Exchange, width: int | None = None) -> Tensor:
    """Collect the oldest reduction, [rows, width], and return it.

    Without `width`, it is the width of the exchange. Raises `ValueError` for more rows or columns
    than the exchange was made for.
    """
    n = exchange.width if width is None else width
    total = torch.empty(rows, n, dtype=exchange.dtype, device=exchange.device)
    exchange.check("sum", total)
    _collect(exchange, None, None, 0.0, total, None)
    return total


def _collect(
    exchange: Exchange,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    total: Tensor,
    normed: Tensor | None,
) -> None:
    rows, n = total.shape
    block = triton.next_power_of_2(n)
    wait_add_norm_kernel[(rows,)](
        exchange.slots.local,
        exchange.arrivals.local,
        exchange.counts,
        residual,
        weight,
        total,
        normed,
        n,
        exchange.slot_elements,
        eps,
        exchange.programs,
        **_constants(exchange),
        BLOCK=block,
        ADD=residual is not None,
        NORM=normed is not None,
        num_warps=warps(block * 4),
    )


def _constants(exchange: Exchange) -> dict[str, int]:
    return {
        "RANKS": exchange.ranks,
        "RANKS_PAD": triton.next_power_of_2(exchange.ranks),
        "SLOTS": SLOTS,
    }
