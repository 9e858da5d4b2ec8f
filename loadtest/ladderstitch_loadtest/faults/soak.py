"""Mixed load for a long while: images, text, cancels, bad input, replicas and workers that die.

Two replicas behind a gateway. One is restarted again and again, by `kill -9` and by SIGTERM in
turns; the other and the gateway live on, and their memory is watched.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch.scheduling.requests import Pixels
from ladderstitch_loadtest.faults.fuzz_runner import memory_mb, process_tree
from ladderstitch_loadtest.faults.soak_result import Sample, SoakResult
from ladderstitch_loadtest.servers.process_supervisor import Process

IMAGES, TEXT = "fashion-mnist", "tiny"
"""The model that replicas start with, and the one that each is then asked to load."""
CALLERS = 3
"""Of each kind."""
PAUSE_S = 0.08
"""Between two requests of a caller."""
STUCK_S = 30.0
"""Deadline of every request, whatever happens around it."""
DISTURBED_EVERY_S = 60.0
"""Every second disturbance is the restart of a replica."""
RECOVERY_S = 600.0
"""A replica that does not answer by then has failed."""
SAMPLES = 400

ALLOWED = {
    "images": {"OK"},
    "hard": {"OK", "OVERLOADED", "BUDGET_INFEASIBLE", "EXPIRED_IN_QUEUE", "EXPIRED_IN_COMPUTE"},
    "text": {"OK"},
    "left": {"left", "OK"},
    "cancelled": {"cancelled", "OK"},
    "bad": {"BAD_INPUT", "MODEL_NOT_FOUND", "VARIANT_NOT_FOUND", "QUALITY_UNAVAILABLE"},
}
AROUND_RESTARTS = {"ENGINE_RESTARTING", "UNAVAILABLE"}
"""Allowed for a request that overlaps a disturbance: its worker was lost twice, or its replica died
under a stream."""


class Soak:
    """Callers of six kinds, a disturber and an observer.

    `survivor` and `victim` are the replicas behind `gateway`; both can find the bundle `TEXT`. The
    run takes `seconds`, and longer where the machine needs longer for one disturbance of each kind.
    """

    def __init__(
        self,
        survivor: Process,
        victim: Process,
        gateway: Process,
        seconds: float,
        advance: Callable[[float], None] = lambda seconds: None,
        stuck_s: float = STUCK_S,
    ) -> None:
        self.survivor, self.victim, self.gateway = survivor, victim, gateway
        self.seconds, self.advance, self.stuck_s = seconds, advance, stuck_s
        self.result = SoakResult(seconds, {}, [], 0.0, [], 0.0)
        self._started = time.monotonic()
        self._disturbed = self._over = False
        self._calm_since_s = 0.0
        self._latencies: list[float] = []
        self._rng = np.random.default_rng(1)

    async def run(self) -> SoakResult:
        """Load until the end; raises what a replica says that cannot load the text model."""
        async with AsyncClient(self.gateway.address) as self.client:
            for replica in (self.survivor, self.victim):
                await self._load_text(replica)
            self._started = time.monotonic()
            kinds: dict[str, Callable[[int], Awaitable[str]]] = {
                "images": self._look,
                "hard": self._hurry,
                "text": self._read,
                "left": self._leave_stream,
                "cancelled": self._cancel,
                "bad": self._blunder,
            }
            callers = [self._call(kind, ask) for kind, ask in kinds.items() for _ in range(CALLERS)]
            await asyncio.gather(*callers, self._disturb(), self._observe())
        self.result.seconds = self._now_s
        pages = [self.survivor.metrics, self.victim.metrics]
        self.result.left_over = sum([await asyncio.to_thread(waiting, page) for page in pages])
        return self.result

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self._started

    async def _call(self, kind: str, ask: Callable[[int], Awaitable[str]]) -> None:
        for number in itertools.count(1):
            if self._over:
                return
            started_s = self._now_s
            try:
                end = await ask(number)
            except RequestFailed as error:
                end = error.reason or error.code.name
                self._judge(kind, end, started_s, error)
            took_s = self._now_s - started_s
            self.result.longest_s = max(self.result.longest_s, took_s)
            if kind == "images" and end == "OK":
                self._latencies.append(took_s)
            of_kind = self.result.ends.setdefault(kind, {})
            of_kind[end] = of_kind.get(end, 0) + 1
            await asyncio.sleep(PAUSE_S)

    def _judge(self, kind: str, end: str, started_s: float, error: RequestFailed) -> None:
        """Note a status that the request should not have had."""
        if end in ALLOWED[kind]:
            return
        overlaps = self._disturbed or started_s < self._calm_since_s
        if end in AROUND_RESTARTS and overlaps:
            return
        self.result.unexplained.append(f"{self._now_s:.1f} s, {kind}: {error}")

    def _pixels(self, rows: int = 1) -> Pixels:
        return self._rng.integers(0, 256, (rows, 1, 28, 28), np.uint8)

    async def _look(self, number: int) -> str:
        image = self._pixels(1 + number % 3)
        await self.client.predict(image, model=IMAGES, budget_s=0.5, timeout_s=self.stuck_s)
        return "OK"

    async def _hurry(self, number: int) -> str:
        budget_s = 0.001 * (1 + number % 9)
        await self.client.predict(
            self._pixels(), model=IMAGES, budget_s=budget_s, hard=True, timeout_s=self.stuck_s
        )
        return "OK"

    async def _read(self, number: int) -> str:
        stream = self.client.generate(
            "a b c", model=TEXT, max_tokens=1 + number % 20, timeout_s=self.stuck_s
        )
        pieces = [piece async for piece in stream]
        return "OK" if pieces and pieces[-1].finish else "cut short"

    async def _leave_stream(self, number: int) -> str:
        stream = self.client.generate("a b", model=TEXT, max_tokens=40, timeout_s=self.stuck_s)
        async for piece in stream:
            if piece.index >= number % 8:
                return "left"
        return "OK"

    async def _cancel(self, number: int) -> str:
        """Ask, and be gone before the answer."""
        asking = asyncio.create_task(
            self.client.predict(self._pixels(4), model=IMAGES, timeout_s=self.stuck_s)
        )
        await asyncio.sleep(0.001 * (number % 4))
        asking.cancel()
        (end,) = await asyncio.gather(asking, return_exceptions=True)
        if isinstance(end, RequestFailed):
            raise end
        return "cancelled" if isinstance(end, asyncio.CancelledError) else "OK"

    async def _blunder(self, number: int) -> str:
        pixels = self._pixels()
        match number % 6:
            case 0:
                await self.client.predict(b"no picture", model=IMAGES)
            case 1:
                await self.client.predict(pixels, model="nobody")
            case 2:
                await self.client.predict(pixels, model=IMAGES, variant=9999)
            case 3:
                await self.client.predict(pixels, model=IMAGES, min_quality=0.999)
            case 4:
                await self.client.predict(pixels[:, :, :9], model=IMAGES)
            case _:
                async for _ in self.client.generate("x" * 5000, model=TEXT):
                    pass
        return "answered"

    async def _disturb(self) -> None:
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "kill -9": self._kill,
            "workers": self._kill_workers,
            "SIGTERM": self._end,
            "reload": self._reload,
        }
        every_s = min(DISTURBED_EVERY_S, self.seconds / (2 * len(kinds)))
        for number, (name, disturb) in enumerate(itertools.cycle(kinds.items()), 1):
            await asyncio.sleep(number * every_s - self._now_s)
            if number > len(kinds) and self._now_s > self.seconds - every_s / 2:
                break
            self.result.disturbances.append((self._now_s, name))
            self._disturbed = True
            await disturb()
            self._disturbed, self._calm_since_s = False, self._now_s
        await asyncio.sleep(self.seconds - self._now_s)
        self._over = True

    async def _kill(self) -> None:
        starts = self.victim.starts
        self.victim.kill()
        await self._back(starts + 1)

    async def _end(self) -> None:
        starts = self.victim.starts
        self.victim.terminate()
        await self._back(starts + 1)

    async def _back(self, starts: int) -> None:
        """Until the victim is there again, text and all."""
        await asyncio.to_thread(self.victim.until_restarted, starts)
        await self._load_text(self.victim)

    async def _kill_workers(self) -> None:
        """Engine and rank of the survivor; returns when both answer again."""
        for pid in process_tree(self.survivor.pid)[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        end_s = self._now_s + RECOVERY_S
        async with AsyncClient(self.survivor.address) as client:
            while not await self._answers(client):
                if self._now_s > end_s:
                    raise TimeoutError(f"the survivor did not answer within {RECOVERY_S:.0f} s")
                await asyncio.sleep(0.1)

    async def _answers(self, client: AsyncClient) -> bool:
        try:
            await client.predict(self._pixels(), model=IMAGES, timeout_s=self.stuck_s)
            async for _ in client.generate("a b", model=TEXT, max_tokens=1, timeout_s=self.stuck_s):
                pass
        except RequestFailed:
            return False
        return True

    async def _reload(self) -> None:
        async with AsyncClient(self.survivor.address) as client:
            await client.load_model(IMAGES)

    async def _load_text(self, replica: Process) -> None:
        async with AsyncClient(replica.address) as client:
            await client.load_model(TEXT)

    async def _observe(self) -> None:
        every_s, ended = self.seconds / SAMPLES, 0
        while not self._over:
            latencies, self._latencies = self._latencies or [0.0], []
            total = self.result.requests
            p50, p99 = 1e3 * np.quantile(latencies, [0.5, 0.99])
            self.result.samples.append(
                Sample(
                    at_s=self._now_s,
                    gateway_mb=memory_mb([self.gateway.pid]),
                    survivor_mb=memory_mb([self.survivor.pid]),
                    callers_mb=memory_mb([os.getpid()]),
                    ended=total - ended,
                    image_p50_ms=float(p50),
                    image_p99_ms=float(p99),
                )
            )
            ended = total
            self.advance(self._now_s)
            await asyncio.sleep(every_s)


def waiting(metrics: str) -> float:
    """Requests that a replica still has, by its metrics page."""
    with urllib.request.urlopen(f"{metrics}/metrics", timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
    wanted = {"ladderstitch_queue_requests", "ladderstitch_running_requests"}
    return sum(s.value for family in families if family.name in wanted for s in family.samples)
