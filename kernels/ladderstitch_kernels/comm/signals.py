"""Signals between ranks: release what was stored, acquire what the others stored.

A signal is one atomic that raises a vector of counters, one at each peer, so that one fence serves
them all; a wait is an atomic that adds nothing. Neither needs inline assembly, so both run in the
interpreter too. Counters only rise (and wrap): a wait passes those that are at its goal or past it.
A rank's kernels run one after another, so a counter shared by all programs of a kernel reaches a
multiple of their number only when all of them have signalled.
"""

from __future__ import annotations

import triton
import triton.language as tl

STOPPED = 2**30
"""What a counter is raised by so that no wait of its rank holds any more."""


@triton.jit
def signal(table, offset, RANKS: tl.constexpr, RANKS_PAD: tl.constexpr):
    """Raise the counter at `offset` of every rank's; all that this program stored comes before.

    The barrier gathers the stores of the program's threads under the fence of the one that signals.
    """
    tl.debug_barrier()
    peer = tl.arange(0, RANKS_PAD)
    exists = peer < RANKS
    counters = tl.load(table + peer, mask=exists, other=0).to(tl.pointer_type(tl.int32))
    tl.atomic_add(counters + offset, 1, mask=exists, sem="release", scope="sys")


@triton.jit
def wait(counters, exists, goal):
    """Until every one of these counters (a vector of pointers) is at the goal or past it.

    The difference is what is compared, so that counters may wrap.
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
    """The last program of a kernel to get here raises the count that all of them read at its start.

    Epochs so live in device memory: a captured graph counts on when it is replayed.
    """
    tl.debug_barrier()
    if tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(finished, 0)
        tl.store(count, tl.load(count) + 1)
