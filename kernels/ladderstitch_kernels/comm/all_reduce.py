"""All-reduce in one kernel: every rank stores into the memory of all ranks, then adds.

    one-shot   every rank stores its whole tensor at every peer: one transfer, R - 1 times the bytes
    two-shot   rank r sums piece r and stores the sum everywhere: two transfers, 2 (R - 1) / R times

One-shot is faster while latency dominates: up to about 256 KB with more than two ranks. With two
ranks the bytes are equal and it is always faster. Two-shot is for prefill. Both accumulate in
float32 and in rank order, so that all ranks get the same bits.
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
    """One rank's memory for all-reduces of up to `elements`; all ranks call in the same order.

    Each call runs `programs` programs on every rank, and each of them waits for its counterparts on
    the other ranks. They must all be resident at the same time, together with those of other ranks
    that share the GPU. `block` is the number of elements that a program handles at a time.
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
        """Signals of one-shot, of two-shot's first transfer, and of its second one."""
        self.counts = torch.zeros(4, dtype=torch.int32, device=torch.device(device))
        """Calls and finished programs of one-shot, then the same of two-shot."""

    def stop(self) -> None:
        """End every wait of this rank at once; see `Exchange.stop`."""
        self.arrivals.local.add_(STOPPED)

    def resume(self) -> None:
        """Let this rank wait again after `stop`, if all ranks have made the same calls."""
        self.arrivals.local.sub_(STOPPED)

    def __call__(
        self, x: Tensor, algorithm: Literal["auto", "one_shot", "two_shot"] = "auto"
    ) -> Tensor:
        """Return the sum over ranks of `x`, in its shape and dtype.

        `auto` is one-shot for sizes that fit its slots. Raises `ValueError` for more elements or
        another dtype than this object was made for.
        """
        algorithm = self._choose_algorithm(x, algorithm)
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

    def _choose_algorithm(
        self, x: Tensor, algorithm: Literal["auto", "one_shot", "two_shot"]
    ) -> Literal["one_shot", "two_shot"]:
        expect_like("x", x, x)
        if x.dtype != self.dtype or not 0 < x.numel() <= self.elements:
            raise ValueError(
                f"x: expected 1 to {self.elements} elements of {self.dtype}, "
                f"got {x.numel()} of {x.dtype}"
            )
        if algorithm == "auto":
            return "one_shot" if x.numel() <= self.one_shot_elements else "two_shot"
        if algorithm == "one_shot" and x.numel() > self.one_shot_elements:
            raise ValueError(
                f"x: expected at most {self.one_shot_elements} elements for one_shot, "
                f"got {x.numel()}"
            )
        return algorithm


def _piece(elements: int, ranks: int) -> int:
    """Return the elements of one rank's piece: a multiple of 16, for 128-bit loads."""
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
    """Store `x` in a slot of every rank, wait for the other ranks, and add the slots.

    Consecutive calls alternate between two slots.
    """
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
    """Store pieces in the inboxes, sum this rank's piece, store it in the outboxes, and copy them.

    Inbox and outbox need no second copy. A peer's first signal of the next call shows that it has
    read its outbox of this call. A peer's second signal shows that it has read its inbox, that is,
    what this rank stored before its own first signal.
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
