"""Hundreds of loads and unloads of models, many given up by their callers, next to good requests.

A server that starts with one model loads and unloads others again and again. What it holds is
compared before and after.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch.scheduling.requests import Pixels
from ladderstitch_loadtest.faults.fuzzing.observations import Footprint, footprint
from ladderstitch_loadtest.servers.processes import StartedServer

KEPT, IMAGES, TEXT = "fashion-mnist", "images", "tiny"
"""The model that stays loaded, and those that are loaded and unloaded in turn."""
PIXELS_SHAPE = (1, 28, 28)
PAUSE_S = 0.02
"""Pause between two good requests to the model that stays."""
DEADLINE_S = 300.0
"""Deadline of requests that have to be answered."""
LONGEST_UNLOAD_S = 0.4
"""Longest time after which the caller of an unload gives up."""
QUIET_TIMEOUT_S, POLL_S = 60.0, 0.5
MEMORY_TOLERANCE = 0.05
"""Share by which the memory may differ."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """What a server holds: memory, descriptors, processes, and series on its metrics page."""

    held: Footprint
    series: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """The numbers that have to be equal: descriptors, processes and series."""
        return self.held.descriptors, self.held.processes, self.series

    def to_dict(self) -> dict[str, object]:
        """Return the figures for a result file."""
        return self.held.to_dict() | {"series": self.series}


@dataclass(slots=True)
class LoadsResult:
    """The result of a run.

    `ends` counts loads and unloads by kind and end. `wrong` holds a line for each model that is
    neither loaded nor undone, and `lost` one for each good request without the right answer.
    """

    cycles: int
    seconds: float = 0.0
    before: ServerState | None = None
    after: ServerState | None = None
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    answers: int = 0
    slowest_ms: float = 0.0

    def failures(self, *, memory: bool = True) -> list[str]:
        """Return a line for each limit that the run exceeds; `memory` says whether it counts."""
        lines = []
        if self.wrong:
            lines.append(f"{len(self.wrong)} loads or unloads left a model in between")
        if self.lost:
            lines.append(f"{len(self.lost)} good requests got no right answer")
        if self.before is None or self.after is None:
            return [*lines, "the server was not measured"]
        names = ("descriptors", "processes", "series")
        for name, old, new in zip(names, self.before.counts, self.after.counts, strict=True):
            if old != new:
                lines.append(f"{name}: expected {old} as before the cycles, got {new}")
        old_mb, new_mb = self.before.held.memory_mb, self.after.held.memory_mb
        if memory and abs(new_mb - old_mb) > MEMORY_TOLERANCE * old_mb:
            lines.append(f"memory: expected {old_mb:.1f} MiB within 5 %, got {new_mb:.1f} MiB")
        return lines

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        states = {"before": self.before, "after": self.after}
        measured = {name: state.to_dict() for name, state in states.items() if state is not None}
        return asdict(replace(self, ends=Counter())) | measured | {"ends": dict(self.ends)}


class LoadCycles:
    """The cycles of loads and unloads, and the caller of the model that stays.

    `server` can find the bundles `IMAGES` and `TEXT`; equal seeds give up at equal moments.
    """

    def __init__(
        self, server: StartedServer, seed: int, advance: Callable[[], None] = lambda: None
    ) -> None:
        self.server, self.advance = server, advance
        self._rng = np.random.default_rng(seed)
        self._pixels: Pixels = self._rng.integers(0, 256, PIXELS_SHAPE, np.uint8)[None]
        self._longest_load_s = {IMAGES: 0.1, TEXT: 0.1}
        self._cycle = 0

    async def run(self, cycles: int, warm_up: int) -> LoadsResult:
        """Run the warm-up and the cycles, and return how they ended."""
        result = LoadsResult(cycles)
        async with AsyncClient(self.server.address, retry_policy=None) as self.client:
            await self._run_phase(warm_up, result)
            result.before = await self._settle(None)
            result.ends.clear()
            result.answers, result.slowest_ms, started = 0, 0.0, time.monotonic()
            await self._run_phase(cycles, result)
            result.seconds = time.monotonic() - started
            result.after = await self._settle(result.before)
        return result

    async def _run_phase(self, cycles: int, result: LoadsResult) -> None:
        """Run cycles while the model that stays gets good requests."""
        over = asyncio.Event()
        caller = asyncio.create_task(self._call_kept(over, result))
        try:
            for _ in range(cycles):
                await self._run_cycle(result)
                self.advance()
        finally:
            over.set()
            await caller

    async def _run_cycle(self, result: LoadsResult) -> None:
        """Load one model and unload it; every third load is given up, and every seventh unload."""
        number, self._cycle = self._cycle, self._cycle + 1
        name = (IMAGES, TEXT)[number % 2]
        load_s = self._longest_load_s[name] * 1.1 * self._rng.random()
        unload_s = LONGEST_UNLOAD_S * self._rng.random()
        by_deadline = bool(self._rng.integers(2))
        if number % 3 == 2:
            end = await self._give_up(
                lambda timeout_s: self.client.load_model(name, timeout_s=timeout_s),
                load_s,
                by_deadline=by_deadline,
            )
        else:
            started = time.monotonic()
            end = await self._end_of(self.client.load_model(name))
            took_s = time.monotonic() - started
            self._longest_load_s[name] = max(self._longest_load_s[name], took_s)
            if end != "OK":
                result.wrong.append(f"cycle {number}: load of {name} ended with {end}")
        result.ends[f"{name}: load {end}"] += 1
        if not await self._check_model(number, name, result):
            result.ends[f"{name}: undone"] += 1
            return
        await self._unload(number, name, result, unload_s, by_deadline=by_deadline)

    async def _unload(
        self, number: int, name: str, result: LoadsResult, after_s: float, *, by_deadline: bool
    ) -> None:
        """Unload a model; the caller gives up every seventh time, and then tries again."""
        if number % 7 == 6:
            end = await self._give_up(
                lambda timeout_s: self.client.unload_model(name, timeout_s=timeout_s),
                after_s,
                by_deadline=by_deadline,
            )
            result.ends[f"{name}: unload {end}"] += 1
            if not await self._check_model(number, name, result):
                return
        end = await self._end_of(self.client.unload_model(name, timeout_s=DEADLINE_S))
        result.ends[f"{name}: unload {end}"] += 1
        if end != "OK":
            result.wrong.append(f"cycle {number}: unload of {name} ended with {end}")

    async def _give_up(
        self, call: Callable[[float], Awaitable[object]], after_s: float, *, by_deadline: bool
    ) -> str:
        """Return the end of a call that gets a short deadline or is cancelled after a time."""
        if by_deadline:
            return await self._end_of(call(max(after_s, 0.001)))
        task = asyncio.ensure_future(self._end_of(call(DEADLINE_S)))
        await asyncio.wait([task], timeout=after_s)
        if task.done():
            return task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return "cancelled"

    async def _end_of(self, call: Awaitable[object]) -> str:
        try:
            await call
        except RequestFailed as error:
            return error.reason or error.code.name
        return "OK"

    async def _check_model(self, number: int, name: str, result: LoadsResult) -> bool:
        """Return whether the server has a model, and record any sign of the contrary.

        Changes of models run one after another, so that one that fails waits until the last one
        has ended.
        """
        await self._end_of(self.client.unload_model("not-loaded", timeout_s=DEADLINE_S))
        listed = {model.name for model in (await self.client.list_models()).models}
        expected = "OK" if name in listed else "MODEL_NOT_FOUND"
        answer = await self._end_of(self._request(name))
        if answer != expected:
            result.wrong.append(f"cycle {number}: {name} {expected=}, its request got {answer}")
        if name in listed and (health := await self.client.health(name)) != "SERVING":
            result.wrong.append(f"cycle {number}: {name} is loaded, its health is {health}")
        if name not in listed and KEPT not in listed:
            result.wrong.append(f"cycle {number}: {KEPT} has vanished")
        return name in listed

    async def _request(self, name: str) -> None:
        if name == TEXT:
            stream = self.client.generate("a b", model=TEXT, max_tokens=2, timeout_s=DEADLINE_S)
            async for _ in stream:
                pass
        else:
            await self.client.predict(self._pixels, model=name, timeout_s=DEADLINE_S)

    async def _call_kept(self, over: asyncio.Event, result: LoadsResult) -> None:
        """Send good requests until `over`, and compare each answer with the first one."""
        first = None
        while not over.is_set():
            started = time.monotonic()
            try:
                answer = await self.client.predict(
                    self._pixels, model=KEPT, variant=0, timeout_s=DEADLINE_S
                )
            except RequestFailed as error:
                result.lost.append(str(error))
                continue
            result.answers += 1
            result.slowest_ms = max(result.slowest_ms, 1e3 * (time.monotonic() - started))
            first = first or answer
            if not np.allclose(answer.logits, first.logits, atol=1e-3):
                result.lost.append(f"logits: expected {first.logits}, got {answer.logits}")
            await asyncio.sleep(PAUSE_S)

    async def _settle(self, expected: ServerState | None) -> ServerState:
        """Return the state when it has the expected counts, or has not changed for a second.

        After `QUIET_TIMEOUT_S` the state is returned as it is.
        """
        end = time.monotonic() + QUIET_TIMEOUT_S
        last, unchanged = await self._read_state(), 0
        while time.monotonic() < end:
            await asyncio.sleep(POLL_S)
            now = await self._read_state()
            unchanged = unchanged + 1 if now.counts == last.counts else 0
            last = now
            if unchanged >= 2 and (expected is None or now.counts == expected.counts):
                break
        return last

    async def _read_state(self) -> ServerState:
        held = footprint(self.server.pid)  # before a page is read, whose connection counts, too
        page = await asyncio.to_thread(self.server.read_metrics)
        series = sum(bool(line) and not line.startswith("#") for line in page.splitlines())
        return ServerState(held, series)
