"""The link of ranks on one machine: slots in shared memory, one writer each.

A rank posts by writing its partial into its own slot and then the slot's sequence number; peers
poll that number. Two reductions may be in flight, and a peer's post e + 2 is the first proof that
it has read e, so four rotating slots are needed (with three, slow readers see later data).

An optional link model makes it a slower link: a message is readable only at
t_posted + latency + bytes / bandwidth. Meanwhile nobody copies it and nobody waits for it but its
reader. Figures taken so are those of an *emulated link*.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.text.comm.base import PeerLost, Work, sum_in_rank_order

FOLDER = Path("/dev/shm")
SLOTS = 4
CACHE_LINE = 64
GIVE_UP_S = 60.0
SPINS = 200
"""Polls before the reader lets others have the core between two polls."""

NAP_FROM_S = 0.0003
"""Waits longer than this, on a slow emulated link, sleep; the scheduler wakes us 0.1 ms late."""


@dataclass(frozen=True, slots=True)
class LinkModel:
    """A slower link to emulate; the default adds nothing."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")

    def flight_ns(self, size: int) -> int:
        return round(1e9 * (self.latency_s + size / self.bytes_per_s))


class SharedRegion:
    """The memory of one group, made by whoever watches over it; ranks map it by its path."""

    def __init__(self, ranks: int, slot_bytes: int) -> None:
        """All zero; `slot_bytes` is the largest partial."""
        self.path = FOLDER / f"ladderstitch-{secrets.token_hex(8)}"
        self.slot_bytes = -(-slot_bytes // CACHE_LINE) * CACHE_LINE
        descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            lines = ranks * SLOTS
            os.ftruncate(descriptor, (1 + lines) * CACHE_LINE + lines * self.slot_bytes)
            self._flag = mmap.mmap(descriptor, CACHE_LINE)
        finally:
            os.close(descriptor)

    def abort(self) -> None:
        """Make every `wait` on this memory raise `PeerLost`, now and later."""
        self._flag[0] = 1

    def forget(self) -> None:
        """Remove the name; the memory goes with its last user."""
        self.path.unlink(missing_ok=True)


class SharedMemoryCommunicator:
    """One rank's end of a `SharedRegion`."""

    def __init__(
        self, path: Path, rank: int, ranks: int, slot_bytes: int, model: LinkModel | None = None
    ) -> None:
        if platform.machine() not in ("x86_64", "AMD64"):
            # Stores become visible in program order on x86 only.
            raise ConfigError("link: the shared-memory link needs x86-64; use tcp")
        self.rank, self.ranks = rank, ranks
        self.model = model or LinkModel()
        self._posted = 0
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

    def post(self, partial: Tensor) -> Work:
        if (partial.shape, partial.dtype) != self._shape:
            self._reshape(partial)
        slot = self._posted % SLOTS
        self._posted += 1
        views = self._views[slot]
        views[self.rank].copy_(partial)
        line = self._line(self.rank, slot)
        self._words[line + 1] = time.monotonic_ns() + self.model.flight_ns(partial.nbytes)
        self._words[line] = self._posted
        return self._posted, slot, views

    def wait(self, ticket: Work) -> Tensor:
        number, slot, views = ticket
        for peer in range(self.ranks):
            if peer != self.rank:
                self._await(self._line(peer, slot), number)
        return sum_in_rank_order(views)

    def close(self) -> None:
        self._words[0] = 1

    def _line(self, rank: int, slot: int) -> int:
        return (1 + rank * SLOTS + slot) * (CACHE_LINE // 8)

    def _reshape(self, like: Tensor) -> None:
        """See the slots as tensors like this one; decode steps all have one shape."""
        if like.nbytes > self._slot_bytes:
            raise ValueError(
                f"partial: expected at most {self._slot_bytes} bytes, got {like.nbytes}"
            )
        self._shape = (like.shape, like.dtype)
        self._views = [
            [ranks[slot][: like.nbytes].view(like.dtype).view(like.shape) for ranks in self._slots]
            for slot in range(SLOTS)
        ]

    def _await(self, line: int, number: int) -> None:
        words, spins = self._words, 0
        while words[line] != number:
            spins += 1
            if spins > SPINS:
                self._check(spins, line, number)
        readable = words[line + 1]
        while (left := readable - time.monotonic_ns()) > 0:
            if left > 1e9 * NAP_FROM_S:
                time.sleep(left / 1e9 - NAP_FROM_S)

    def _check(self, spins: int, line: int, number: int) -> None:
        """Between polls of a long wait: has the group ended? Is this worth waiting for?"""
        if self._words[0]:
            raise PeerLost("the group was told to stop")
        if self._words[line] > number:
            raise PeerLost(f"slot of reduction {number} was used again before it was read")
        if spins == SPINS + 1:
            self._patience = time.monotonic() + GIVE_UP_S
        elif time.monotonic() > self._patience:
            raise PeerLost(f"a peer has not answered for {GIVE_UP_S:.0f} s")
        os.sched_yield()
