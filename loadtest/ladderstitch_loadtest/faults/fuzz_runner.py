"""Malformed requests by the thousand, each with the status that it must get."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc

from ladderstitch.client import RequestFailed

BAD_INPUT = (grpc.StatusCode.INVALID_ARGUMENT, "BAD_INPUT")
NO_MODEL = (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
NO_VARIANT = (grpc.StatusCode.NOT_FOUND, "VARIANT_NOT_FOUND")
INFEASIBLE = (grpc.StatusCode.FAILED_PRECONDITION, "BUDGET_INFEASIBLE")
NO_QUALITY = (grpc.StatusCode.FAILED_PRECONDITION, "QUALITY_UNAVAILABLE")
Expected = tuple[grpc.StatusCode, str]
ANSWERED: Expected = (grpc.StatusCode.OK, "")


@dataclass(frozen=True, slots=True)
class Case:
    kind: str
    request: Any
    expected: Expected | frozenset[Expected]
    metadata: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 30.0
    leave_after: int | None = None  # pieces after which the caller cancels

    def allows(self, got: Expected) -> bool:
        return got in (self.expected if isinstance(self.expected, frozenset) else (self.expected,))


class FuzzCases(Protocol):
    """Makes cases for one model, by seed, and sends them."""

    def case(self, index: int) -> Case: ...

    async def send(self, case: Case) -> None:
        """Raises `grpc.aio.AioRpcError`, or `CancelledError` where the caller left."""

    async def send_good(self) -> None:
        """A request that must be answered."""


@dataclass(slots=True)
class FuzzOutcome:
    """What came of a run; `wrong` holds a line for each answer that was not the right one."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    good_answers: int = 0
    memory_before_mb: float = 0.0
    memory_after_mb: float = 0.0


async def run(
    malformer: FuzzCases, pids: list[int], requests: int, advance: Callable[[], None]
) -> FuzzOutcome:
    """Send so many malformed requests, 16 at a time, with a good one after every tenth."""
    outcome = FuzzOutcome()
    await _batch(malformer, range(400), FuzzOutcome(), lambda: None)  # warms caches
    outcome.memory_before_mb = memory_mb(pids)
    for start in range(0, requests, 16):
        indices = range(start, min(requests, start + 16))
        await _batch(malformer, indices, outcome, advance)
    await asyncio.sleep(1.0)
    outcome.memory_after_mb = memory_mb(pids)
    return outcome


async def _batch(
    malformer: FuzzCases, indices: range, outcome: FuzzOutcome, advance: Callable[[], None]
) -> None:
    async def one(index: int) -> None:
        case = malformer.case(index)
        outcome.kinds[case.kind] += 1
        got = ANSWERED
        try:
            await malformer.send(case)
        except grpc.aio.AioRpcError as error:
            got = (error.code(), RequestFailed(error).reason)
        if not case.allows(got):
            outcome.wrong.append(f"{case.kind}: expected {case.expected}, got {got}")
        advance()
        if index % 10 == 0:
            await malformer.send_good()
            outcome.good_answers += 1

    await asyncio.gather(*(one(index) for index in indices))


def memory_mb(pids: list[int]) -> float:
    """Unshared resident memory of processes, MiB."""
    kilobytes = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                kilobytes += int(line.split()[1])
    return kilobytes / 1024


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(p for child in children for p in process_tree(int(child)))]
