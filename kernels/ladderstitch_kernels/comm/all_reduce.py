"""Sums over ranks in one kernel, for what cannot wait: everybody stores at everybody, then adds.

    one-shot   every rank stores all of its tensor at every peer: one flight, R - 1 times the bytes
    two-shot   rank r sums the r-th piece and hands the sum round: two flights, 2 (R - 1) / R times

One-shot wins while the flight is what counts (to about 256 KB with more than two ranks; with two
the bytes are equal and it always wins), two-shot for prefill. Both accumulate in float32 in rank
order, so that all ranks get the same bits.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladderstitch_kernels.comm.signals import STOPPED, advance, signal, wait
from ladderstitch_kernels.comm.symmetric import SymmetricMemory
from ladderstitch_kernels.launch import expect_like

ONE_SHOT_BYTES = 256 * 1024
_SLOTS = 2


class AllReduce:
    """One rank's memory for sums of up to `elements`; all ranks call in the same order.

    `programs` run at once on every rank and wait for their like, so no more than the GPU can hold;
    ranks that share a GPU must all fit.
    """

    def __init__(
        self,
        memory: SymmetricMemory,
        elements: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        programs: int = 24,
        block: int = 2048,
    ) -> None:
        self.rank, self.ranks = memory.rank, memory.ranks
        self.elements, self.dtype = elements, dtype
        self.programs, self.block = programs, block
        piece = _piece(elements, self.ranks)
        small = min(elements, ONE_SHOT_BYTES // dtype.itemsize) if self.ranks > 2 else elements
        self.one_shot_elements = triton.cdiv(small, 16) * 16
        self.slots = memory.zeros((_SLOTS, self.ranks, self.one_shot_elements), dtype)
        self.inbox = memory.zeros((self.ranks, piece), dtype)
        self.outbox = memory.zeros((self.ranks, piece), dtype)
        self.arrivals = memory.zeros((3, self.ranks, programs), torch.int32)
        """Of one-shot, of two-shot's first flight and of its second."""
        self.counts = torch.zeros(4, dtype=torch.int32, device=torch.device(device))
        """Of one-shot: calls, programs done; the same of two-shot."""

    def stop(self) -> None:
        """Let every wait of this rank pass at once; see `Exchange.stop`."""
        self.arrivals.local.add_(STOPPED)

    def __call__(
        self, x: Tensor, algorithm: Literal["auto", "one_shot", "two_shot"] = "auto"
    ) -> Tensor:
        """The sum of every rank's `x`, in its shape and dtype.

        Raises `ValueError` for more elements or another dtype than this was made for.
        """
        expect_like("x", x, x)
        if x.dtype != self.dtype or not 0 < x.numel() <= self.elements:
            raise ValueError(
                f"x: expected 1 to {self.elements} elements of {self.dtype}, "
                f"got {x.numel()} of {x.dtype}"
            )
        if algorithm == "auto":
            algorithm = "one_shot" if x.numel() <= self.one_shot_elements else "two_shot"
        if algorithm == "one_shot" and x.numel() > self.one_shot_elements:
            raise ValueError(
                f"x: expected at most {self.one_shot_elements} elements for one_shot, "
                f"got {x.numel()}"
            )
        out = torch.empty_like(x)
        constants = {
            "RANKS": self.ranks,
            "RANKS_PAD": triton.next_power_of_2(self.ranks),
            "BLOCK": self.block,
            "num_warps": 8,
        }
        if algorithm == "one_shot":
            one_shot_kernel[(self.programs,)](
                x,
                out,
                self.slots.local,
                self.slots.addresses,
                self.arrivals.local,
                self.arrivals.addresses,
                self.counts,
                self.rank,
                x.numel(),
                self.one_shot_elements,
                SLOTS=_SLOTS,
                **constants,
            )
        else:
            two_shot_kernel[(self.programs,)](
                x,
                out,
                self.inbox.local,
                self.inbox.addresses,
                self.outbox.local,
                self.outbox.addresses,
                self.arrivals.local,
                self.arrivals.addresses,
                self.counts,
                self.rank,
                x.numel(),
                _piece(x.numel(), self.ranks),
                **constants,
            )
        return out


def _piece(elements: int, ranks: int) -> int:
    """Elements of one rank's piece: a multiple of 16, for wide loads."""
    return triton.cdiv(triton.cdiv(elements, ranks), 16) * 16


@triton.jit
def one_shot_kernel(
    x,
    out,
    slots,
    slot_table,
    arrivals,
    arrival_table,
    counts,
    rank,
    n,
    slot_elements,
    RANKS: tl.constexpr,
    RANKS_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    epoch = tl.load(counts) + 1
    slot = ((epoch & (SLOTS - 1)) * RANKS).to(tl.int64) * slot_elements
    mine = slot + rank * slot_elements
    for start in range(program * BLOCK, n, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = tl.load(x + at, mask=at < n)
        for peer in tl.static_range(RANKS):
            base = tl.load(slot_table + peer).to(tl.pointer_type(x.dtype.element_ty))
            tl.store(tl.multiple_of(base, 16) + mine + at, own, mask=at < n)
    signal(arrival_table, rank * programs + program, RANKS, RANKS_PAD)
    source = tl.arange(0, RANKS_PAD)
    wait(arrivals + source * programs + program, source < RANKS, epoch)
    for start in range(program * BLOCK, n, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for sender in tl.static_range(RANKS):
            part = tl.load(slots + slot + sender * slot_elements + at, mask=at < n, other=0.0)
            total += part.to(tl.float32)
        tl.store(out + at, total.to(x.dtype.element_ty), mask=at < n)
    advance(counts, counts + 1, programs)


@triton.jit
def two_shot_kernel(
    x,
    out,
    inbox,
    inbox_table,
    outbox,
    outbox_table,
    arrivals,
    arrival_table,
    counts,
    rank,
    n,
    piece,
    RANKS: tl.constexpr,
    RANKS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Boxes need no second copy: a peer's first signal of the next call tells that it is done with
    this one, and its second that it has read what this rank stored at the first.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    epoch = tl.load(counts + 2) + 1
    source = tl.arange(0, RANKS_PAD)
    first = RANKS * programs
    second = 2 * RANKS * programs
    for start in range(program * BLOCK, piece, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        for peer in tl.static_range(RANKS):
            exists = (at < piece) & (peer * piece + at < n)
            own = tl.load(x + peer * piece + at, mask=exists)
            base = tl.load(inbox_table + peer).to(tl.pointer_type(x.dtype.element_ty))
            tl.store(tl.multiple_of(base, 16) + rank * piece + at, own, mask=exists)
    signal(arrival_table, first + rank * programs + program, RANKS, RANKS_PAD)
    wait(arrivals + first + source * programs + program, source < RANKS, epoch)
    for start in range(program * BLOCK, piece, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        exists = (at < piece) & (rank * piece + at < n)
        total = tl.zeros([BLOCK], tl.float32)
        for sender in tl.static_range(RANKS):
            part = tl.load(inbox + sender * piece + at, mask=exists, other=0.0)
            total += part.to(tl.float32)
        for peer in tl.static_range(RANKS):
            base = tl.load(outbox_table + peer).to(tl.pointer_type(x.dtype.element_ty))
            tl.store(
                tl.multiple_of(base, 16) + rank * piece + at,
                total.to(x.dtype.element_ty),
                mask=exists,
            )
    signal(arrival_table, second + rank * programs + program, RANKS, RANKS_PAD)
    wait(arrivals + second + source * programs + program, source < RANKS, epoch)
    for start in range(program * BLOCK, piece, programs * BLOCK):
        at = start + tl.arange(0, BLOCK)
        for owner in tl.static_range(RANKS):
            exists = (at < piece) & (owner * piece + at < n)
            summed = tl.load(outbox + owner * piece + at, mask=exists)
            tl.store(out + owner * piece + at, summed, mask=exists)
    advance(counts + 2, counts + 3, programs)
