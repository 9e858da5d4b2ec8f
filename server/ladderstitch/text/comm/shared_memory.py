"""The communicator of ranks on one machine: slots in shared memory, each with one writer.

A rank starts a reduction: it writes its partial into its own slot, then the slot's sequence number.
Peers poll that number. Two reductions may be in flight, and only a peer's reduction e + 2 proves
that the peer has read e. Four rotating slots are therefore needed: with three, slow readers would
see later data.

An optional `EmulatedLink` delays messages: each becomes readable at
t_start + latency + bytes / bandwidth. During that time, no rank copies the message and only its
readers wait. Figures measured that way are those of an *emulated link*.
"""

from __future__ import annotations

import logging
import mmap
import os
import platform
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.text.comm.base import PEER_TIMEOUT_S, PeerLost, Work, sum_in_rank_order

log = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
SLOTS = 4
CACHE_LINE = 64

SPINS = 200
"""Polls before the reader yields its core to other processes between two polls."""

SLEEP_THRESHOLD_S = 0.0003
"""Waits of an emulated link that are longer than this sleep, and end this many seconds early.

The kernel wakes a sleeping process up to 0.1 ms late.
"""


@dataclass(frozen=True, slots=True)
class EmulatedLink:
    """Latency (seconds) and bandwidth (bytes per second) to emulate; the default delays nothing."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")

    def delay_ns(self, size: int) -> int:
        """Return the nanoseconds after which a message of `size` bytes becomes readable."""
        return round(1e9 * (self.latency_s + size / self.bytes_per_s))


def create_shared_file(size: int, purpose: str) -> Path:
    """Return a new file of zeros for a mapping, in /dev/shm if that has room for it.

    All of its memory is reserved now: a process that writes to a page for which there is no room is
    killed (SIGBUS). Raises `ConfigError` if no folder has room.
    """
    refusals = []
    for folder in (FOLDER, Path(tempfile.gettempdir())):
        path = folder / f"ladderstitch-{secrets.token_hex(8)}"
        try:
            _create_file(path, size)
        except OSError as error:
            free = _free_mib(folder)
            refusals.append(f"{folder}: expected {_mib(size)} MiB, got {free} MiB ({error})")
            continue
        if refusals:
            log.warning("shared memory of %s is in %s, as %s", purpose, folder, refusals[0])
        return path
    raise ConfigError(
        f"shared memory of {purpose}: {'; '.join(refusals)}; enlarge /dev/shm (docker run "
        "--shm-size=1g; in Kubernetes a Memory volume at /dev/shm), or use the link tcp"
    )


def _create_file(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS: the memory is reserved when it is written
            os.ftruncate(descriptor, size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def _free_mib(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / (1 << 20):.1f}"
    except OSError:
        return "0"


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f}"


class SharedRegion:
    """The shared memory of one group; the group creates it and the ranks map it by its path."""

    def __init__(self, ranks: int, slot_bytes: int) -> None:
        """Create memory of zeros; `slot_bytes` is the size of the largest partial.

        If /dev/shm has no room, the memory is a file of the folder for temporary files. Raises
        `ConfigError` if that has none either.
        """
        self.slot_bytes = -(-slot_bytes // CACHE_LINE) * CACHE_LINE
        lines = ranks * SLOTS
        size = (1 + lines) * CACHE_LINE + lines * self.slot_bytes
        self.path = create_shared_file(size, f"{ranks} ranks")
        with self.path.open("r+b") as file:
            self._flag = mmap.mmap(file.fileno(), CACHE_LINE)

    def abort(self) -> None:
        """Make every current and later `wait` on this memory raise `PeerLost`."""
        self._flag[0] = 1

    def unlink(self) -> None:
        """Remove the file; the memory is freed when its last user unmaps it."""
        self.path.unlink(missing_ok=True)


class SharedMemoryCommunicator:
    """One rank's end of a `SharedRegion`.

    Raises `ConfigError` on other machines than x86-64.
    """

    def __init__(
        self, path: Path, rank: int, ranks: int, slot_bytes: int, link: EmulatedLink | None = None
    ) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            # Stores become visible in program order on x86 only.
            raise ConfigError(
                f"link: shared_memory: expected an x86-64 machine, got {platform.machine()}; "
                "use tcp"
            )
        self.rank, self.ranks = rank, ranks
        self.link = link or EmulatedLink()
        self._started = 0
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        lines = ranks * SLOTS
        # [1 + rank * SLOTS + slot][sequence number, readable from (ns), ...]; line 0: abort flag
        self._words = memoryview(self._memory).cast("q")[: (1 + lines) * CACHE_LINE // 8]
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        data = whole[(1 + lines) * CACHE_LINE :].view(ranks, SLOTS, slot_bytes)
        self._slots = [[data[r, s] for s in range(SLOTS)] for r in range(ranks)]
        self._slot_bytes = slot_bytes
        self._shape: tuple[torch.Size, torch.dtype] | None = None
        self._views: list[list[Tensor]] = []

    def all_reduce_async(self, partial: Tensor) -> Work:
        """Write the partial into this rank's next slot.

        Raises `ValueError` if the partial is larger than a slot.
        """
        if (partial.shape, partial.dtype) != self._shape:
            self._reshape(partial)
        slot = self._started % SLOTS
        self._started += 1
        views = self._views[slot]
        views[self.rank].copy_(partial)
        line = self._line(self.rank, slot)
        self._words[line + 1] = time.monotonic_ns() + self.link.delay_ns(partial.nbytes)
        self._words[line] = self._started
        return self._started, slot, views

    def wait(self, work: Work) -> Tensor:
        """Return the sum; raises `PeerLost` after an abort, or after `PEER_TIMEOUT_S`."""
        number, slot, views = work
        for peer in range(self.ranks):
            if peer != self.rank:
                self._await_line(self._line(peer, slot), number)
        return sum_in_rank_order(views)

    def close(self) -> None:
        """Abort the group, since this rank takes part in no further reduction."""
        self._words[0] = 1

    def _line(self, rank: int, slot: int) -> int:
        return (1 + rank * SLOTS + slot) * (CACHE_LINE // 8)

    def _reshape(self, like: Tensor) -> None:
        """View the slots as tensors of this shape; all decode steps have the same shape."""
        if like.nbytes > self._slot_bytes:
            raise ValueError(
                f"partial: expected at most {self._slot_bytes} bytes, got {like.nbytes}"
            )
        self._shape = (like.shape, like.dtype)
        self._views = [
            [ranks[slot][: like.nbytes].view(like.dtype).view(like.shape) for ranks in self._slots]
            for slot in range(SLOTS)
        ]

    def _await_line(self, line: int, number: int) -> None:
        words, spins = self._words, 0
        while words[line] != number:
            spins += 1
            if spins > SPINS:
                self._check_peer(spins, line, number)
        readable = words[line + 1]
        while (left := readable - time.monotonic_ns()) > 0:
            if left > 1e9 * SLEEP_THRESHOLD_S:
                time.sleep(left / 1e9 - SLEEP_THRESHOLD_S)

    def _check_peer(self, spins: int, line: int, number: int) -> None:
        """Raise `PeerLost` between the polls of a long wait if the wait cannot succeed."""
        if self._words[0]:
            raise PeerLost("the group was aborted")
        if self._words[line] > number:
            raise PeerLost(f"slot of reduction {number} was used again before it was read")
        if spins == SPINS + 1:
            self._wait_until = time.monotonic() + PEER_TIMEOUT_S
        elif time.monotonic() > self._wait_until:
            raise PeerLost(f"a peer did not send its partial within {PEER_TIMEOUT_S:.0f} s")
        os.sched_yield()
