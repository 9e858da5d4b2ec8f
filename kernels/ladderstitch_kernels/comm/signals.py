"""Signals between ranks: release what was stored, acquire what the others stored.

A signal is one atomic exchange over a vector of flags, one flag at each peer, so that one fence
serves them all; a wait is an atomic that adds nothing. Neither needs inline assembly, so both run
in the interpreter too. Flags hold epochs that only rise (and wrap): a wait passes flags that are
at its epoch or past it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def signal(table, offset, epoch, RANKS: tl.constexpr, RANKS_PAD: tl.constexpr):
    """Set the flag at `offset` of every rank's flags; all that this program stored comes before.

    The barrier gathers the stores of the program's threads under the fence of the one that signals.
    """
    tl.debug_barrier()
    peer = tl.arange(0, RANKS_PAD)
    exists = peer < RANKS
    flags = tl.load(table + peer, mask=exists, other=0).to(tl.pointer_type(tl.int32))
    tl.atomic_xchg(flags + offset, epoch, mask=exists, sem="release", scope="sys")


@triton.jit
def wait(flags, exists, epoch):
    """Until every one of these flags (a vector of pointers) is at the epoch or past it.

    The difference is what is compared, so that epochs may wrap.
    """
    ahead = _poll(flags, exists, epoch)
    while ahead < 0:
        ahead = _poll(flags, exists, epoch)


@triton.jit
def _poll(flags, exists, epoch):
    seen = tl.atomic_add(flags, 0, mask=exists, sem="acquire", scope="sys")
    return tl.min(tl.where(exists, seen - epoch, 0), axis=0)


@triton.jit
def advance(count, finished, programs):
    """The last program of a kernel to get here raises the count that all of them read at its start.

    Epochs so live in device memory: a captured graph counts on when it is replayed.
    """
    tl.debug_barrier()
    if tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu") == programs - 1:
        tl.store(finished, 0)
        tl.store(count, tl.load(count) + 1)
