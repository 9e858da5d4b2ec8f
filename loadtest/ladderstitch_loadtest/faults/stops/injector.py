"""Signals to the workers of a replica at random moments, and when the trouble is over."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ladderstitch_loadtest.faults.fuzz_runner import process_tree
from ladderstitch_loadtest.faults.stops.report import VITAL, Fault
from ladderstitch_loadtest.servers.processes import StartError, command_line

MODULES = {
    "engine": "ladderstitch.vision.engine.worker",
    "rank": "ladderstitch.text.engine.rank",
    "decode": "ladderstitch.vision.images.worker",
    "template": "ladderstitch.text.template_worker",
}
"""The module that a process of each kind runs."""
KINDS = ("engine", "rank", "engine", "rank", "decode", "template")
"""The kinds of victims in turn."""
SHORTEST_STOP_S, LONGEST_STOP_S = 0.3, 30.0
MEAN_PAUSE_S = 0.7
OVERLAP = 0.25
"""Share of the faults that do not wait until the one before is over."""
LAST_WORDS_S = 0.5
"""Seconds after SIGCONT in which a process that was killed before has ended."""
RECOVERY_LIMIT_S = 90.0
"""Seconds after which trouble counts as not ended."""
VICTIM_LIMIT_S = 60.0

Probe = Callable[[str], Awaitable[None]]
"""Waits until the replica has answered a request that needs a process of this kind."""


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """A fault to come; `held_s` is 0 for SIGKILL."""

    kind: str
    held_s: float
    pause_s: float
    overlaps: bool


def plan_faults(kills: int, stops: int, rng: np.random.Generator) -> list[PlannedFault]:
    """Return kills and stops in random order; the lengths of the stops are log-uniform."""
    longest, shortest = math.log(LONGEST_STOP_S), math.log(SHORTEST_STOP_S)
    held = [0.0] * kills + [math.exp(s) for s in rng.uniform(shortest, longest, stops)]
    planned = [
        PlannedFault(
            KINDS[number % len(KINDS)],
            held_s,
            float(rng.exponential(MEAN_PAUSE_S)),
            bool(rng.random() < OVERLAP),
        )
        for number, held_s in enumerate(held)
    ]
    return [planned[i] for i in rng.permutation(len(planned))]


class Injector:
    """The faults of one replica, one after another, some of which overlap."""

    def __init__(
        self,
        replica: int,
        pid: int,
        probe: Probe,
        rng: np.random.Generator,
        now_s: Callable[[], float],
        advance: Callable[[], None],
    ) -> None:
        self.faults: list[Fault] = []
        self._replica, self._pid, self._probe, self._rng = replica, pid, probe, rng
        self._now_s, self._advance = now_s, advance

    async def run(self, planned: list[PlannedFault]) -> None:
        """Inject the faults, and return when all trouble is over."""
        running: set[asyncio.Task[None]] = set()
        for fault in planned:
            if not fault.overlaps and running:
                await asyncio.wait(running)
            await asyncio.sleep(fault.pause_s)
            task = asyncio.create_task(self._inject(fault), name="fault")
            running.add(task)
        await asyncio.gather(*running)

    async def _inject(self, planned: PlannedFault) -> None:
        pid = await self._find_victim(planned.kind)
        at_s = self._now_s()
        name = signal.SIGSTOP if planned.held_s else signal.SIGKILL
        os.kill(pid, name)
        probing = asyncio.create_task(self._wait_for_recovery(planned.kind))
        recovered_s, replaced = math.inf, True
        if planned.held_s:
            recovered_s, replaced = await self._continue_later(pid, planned.held_s)
        if replaced:
            recovered_s = await probing
        else:
            probing.cancel()
        self.faults.append(
            Fault(
                self._replica, planned.kind, name.name, at_s, recovered_s, planned.held_s, replaced
            )
        )
        self._advance()

    async def _continue_later(self, pid: int, held_s: float) -> tuple[float, bool]:
        """Return when the process was continued, and whether it had to be replaced."""
        end_s = self._now_s() + held_s
        while (left_s := end_s - self._now_s()) > 0:
            await asyncio.sleep(min(0.05, left_s))
            if not is_alive(pid):
                return self._now_s(), True
        continued_s = self._now_s()
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(LAST_WORDS_S)
        return continued_s, not is_alive(pid)

    async def _wait_for_recovery(self, kind: str) -> float:
        """Return when a request that needs such a process has been answered."""
        if kind not in VITAL:
            return self._now_s()
        try:
            async with asyncio.timeout(RECOVERY_LIMIT_S):
                await self._probe(kind)
        except TimeoutError:
            return math.inf
        return self._now_s()

    async def _find_victim(self, kind: str) -> int:
        """Return a random running process of a kind, and wait for one if there is none.

        Raises `StartError` if there is none within `VICTIM_LIMIT_S`.
        """
        end = time.monotonic() + VICTIM_LIMIT_S
        while time.monotonic() < end:
            found = sorted(find_processes(self._pid, kind))
            if found:
                return int(self._rng.choice(found))
            await asyncio.sleep(0.05)
        raise StartError(f"replica {self._replica}: no process of kind {kind}")


def find_processes(replica: int, kind: str) -> list[int]:
    """Return the processes of a kind below a replica that run and are not stopped."""
    return [
        pid
        for pid in process_tree(replica)[1:]
        if MODULES[kind] in command_line(pid) and process_state(pid) in "RSD"
    ]


def process_state(pid: int) -> str:
    """Return the state of a process as one letter; X if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def is_alive(pid: int) -> bool:
    """Return whether a process has not ended."""
    return process_state(pid) not in "XZ"
