"""Signals between ranks: release the stores of this rank, acquire those of the others.

A signal is one atomic that raises a vector of counters, one at each peer, so that a single fence
covers all of them. A wait is an atomic that adds nothing. Neither needs inline assembly, so both
run in the interpreter, too. Counters only rise, and wrap around. A wait ends when its counters are
at the goal or past it. The kernels of a rank run one after another, so a counter that all programs
of a kernel share reaches a multiple of their number only after all of them have signalled.
"""

from __future__ import annotations

import triton
import triton.language as tl

STOPPED = 2**30
"""The amount by which a counter is raised so that every wait of its rank ends."""


@triton.jit
def signal(table, offset, RANKS: tl.constexpr, RANKS_PAD: tl.constexpr):
    """Raise the counter at `offset` of every rank, after all stores of this program.

    `table` [R] holds the addresses of the ranks' counters. The barrier orders the stores of all
    threads of the program before the fence of the thread that signals.
    """
    tl.debug_barrier()
    peer = tl.arange(0, RANKS_PAD)
    exists = peer < RANKS
    counters = tl.load(table + peer, mask=exists, other=0).to(tl.pointer_type(tl.int32))
    tl.atomic_add(counters + offset, 1, mask=exists, sem="release", scope="sys")


@triton.jit
def wait(counters, exists, goal):
    """Wait until every counter of a vector of pointers is at the goal or past it.

    The difference to the goal is compared with 0, so that counters may wrap.
    """
    ahead = _poll(counters, exists, goal)
    while ahead < 0:
        ahead = _poll(counters, exists, goal)


@triton.jit
def _poll(counters, exists, goal):
    seen = tl.atomic_add(counters, 0, mask=exists, sem="acquire", scope="sys")
    return tl.min(tl.where(exists, seen - goal, 0), axis=0)


@triton.jit
def advance(count, finished, programs):
    """Raise the epoch at `count` once all programs of a kernel have called this.

    All programs read the epoch at their start, and the last one to call this raises it. The epoch
    is in device memory, so that a captured CUDA graph continues to count when it is replayed.
    `finished` counts the calls and is reset to 0.
    """
    tl.debug_barrier()
    if tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(finished, 0)
        tl.store(count, tl.load(count) + 1)
