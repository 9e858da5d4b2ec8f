"""Soak test: hours of mixed load while replicas and workers are killed.

The load is images, text, cancelled requests and bad input. Two replicas run behind a gateway. The
victim is restarted again and again, by SIGKILL and by SIGTERM in turn; in between, the workers of
the survivor are killed or stopped, and its models are loaded again, to the end or not. The survivor
and the gateway are never restarted, and their memory is measured.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import struct
import time
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress

import numpy as np

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch.scheduling.requests import Pixels
from ladderstitch_loadtest.faults.fuzz_runner import memory_mb, process_tree
from ladderstitch_loadtest.faults.soak_result import (
    ALLOWED,
    ALLOWED_AROUND_RESTARTS,
    SoakResult,
    SoakSample,
)
from ladderstitch_loadtest.servers.process_supervisor import SupervisedProcess, count_requests

IMAGES, TEXT = "fashion-mnist", "tiny"
"""The model that replicas start with, and the one that each of them loads afterwards."""
CALLERS_PER_KIND = 3
PAUSE_S = 0.08
"""Pause between two requests of a caller."""
DEADLINE_S = 30.0
"""Deadline of every request, also during disturbances."""
DISTURBANCE_INTERVAL_S = 60.0
"""Time between disturbances; every second one restarts a replica."""
STOP_S = 5.0
"""Time for which workers are stopped."""
GIVEN_UP_LOADS = 8
RECOVERY_TIMEOUT_S = 600.0
"""Limit for a replica's recovery, generous enough for the slowest machine."""
SAMPLES = 400


class Soak:
    """Callers of six kinds, a task that disturbs the replicas, and one that samples their state.

    `survivor` and `victim` are the replicas behind `gateway`, and both can find the bundle `TEXT`.
    The run takes `seconds`, and longer if the machine needs longer for one disturbance of each
    kind. `advance` gets the seconds since the start; `deadline_s` is that of every request.
    """

    def __init__(
        self,
        survivor: SupervisedProcess,
        victim: SupervisedProcess,
        gateway: SupervisedProcess,
        seconds: float,
        advance: Callable[[float], None] = lambda seconds: None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self.survivor, self.victim, self.gateway = survivor, victim, gateway
        self.seconds, self.advance, self.deadline_s = seconds, advance, deadline_s
        self.result = SoakResult(seconds, {}, [], 0.0, [], 0.0)
        self._started = time.monotonic()
        self._disturbed = self._over = False
        self._undisturbed_since_s = 0.0
        self._latencies: list[float] = []
        self._rng = np.random.default_rng(1)

    async def run(self) -> SoakResult:
        """Run callers, disturbances and sampling to the end and return the result.

        Raises `RequestFailed` if a replica cannot load the text model.
        """
        async with AsyncClient(self.gateway.address) as self.client:
            for replica in (self.survivor, self.victim):
                await self._load_text(replica)
            self._started = time.monotonic()
            kinds: dict[str, Callable[[int], Awaitable[str]]] = {
                "images": self._predict_image,
                "hard": self._predict_with_hard_budget,
                "text": self._read_stream,
                "abandoned": self._abandon_stream,
                "cancelled": self._cancel_request,
                "bad": self._send_bad_request,
            }
            callers = [
                self._call(kind, send)
                for kind, send in kinds.items()
                for _ in range(CALLERS_PER_KIND)
            ]
            await asyncio.gather(*callers, self._disturb(), self._sample())
        self.result.seconds = self._now_s
        urls = [self.survivor.metrics, self.victim.metrics]
        self.result.left_over = sum([await asyncio.to_thread(count_requests, u) for u in urls])
        return self.result

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self._started

    async def _call(self, kind: str, send: Callable[[int], Awaitable[str]]) -> None:
        """Send requests of one kind, one after another, and record how each ended."""
        for number in itertools.count(1):
            if self._over:
                return
            started_s = self._now_s
            try:
                end = await send(number)
                if end not in ALLOWED[kind]:
                    self.result.unexplained.append(f"{self._now_s:.1f} s, {kind}: {end}")
            except RequestFailed as error:
                end = error.reason or error.code.name
                self._check_failure(kind, end, started_s, error)
            took_s = self._now_s - started_s
            self.result.longest_s = max(self.result.longest_s, took_s)
            if kind == "images" and end == "OK":
                self._latencies.append(took_s)
            counts = self.result.ends.setdefault(kind, {})
            counts[end] = counts.get(end, 0) + 1
            await asyncio.sleep(PAUSE_S)

    def _check_failure(self, kind: str, end: str, started_s: float, error: RequestFailed) -> None:
        """Record a failure that is not allowed for the request."""
        if end in ALLOWED[kind]:
            return
        overlaps = self._disturbed or started_s < self._undisturbed_since_s
        if end in ALLOWED_AROUND_RESTARTS and overlaps:
            return
        self.result.unexplained.append(f"{self._now_s:.1f} s, {kind}: {error}")

    def _pixels(self, images: int = 1) -> Pixels:
        return self._rng.integers(0, 256, (images, 1, 28, 28), np.uint8)

    async def _predict_image(self, number: int) -> str:
        image = self._pixels(1 + number % 3)
        await self.client.predict(image, model=IMAGES, budget_s=0.5, timeout_s=self.deadline_s)
        return "OK"

    async def _predict_with_hard_budget(self, number: int) -> str:
        budget_s = 0.001 * (1 + number % 9)
        await self.client.predict(
            self._pixels(), model=IMAGES, budget_s=budget_s, hard=True, timeout_s=self.deadline_s
        )
        return "OK"

    async def _read_stream(self, number: int) -> str:
        stream = self.client.generate(
            "a b c", model=TEXT, max_tokens=1 + number % 20, timeout_s=self.deadline_s
        )
        chunks = [chunk async for chunk in stream]
        return "OK" if chunks and chunks[-1].finish else "incomplete"

    async def _abandon_stream(self, number: int) -> str:
        """Stop reading a stream after at most eight chunks."""
        stream = self.client.generate("a b", model=TEXT, max_tokens=40, timeout_s=self.deadline_s)
        async for chunk in stream:
            if chunk.index >= number % 8:
                return "abandoned"
        return "OK"

    async def _cancel_request(self, number: int) -> str:
        """Send images and cancel the request within 3 ms."""
        request = asyncio.create_task(
            self.client.predict(self._pixels(4), model=IMAGES, timeout_s=self.deadline_s)
        )
        await asyncio.sleep(0.001 * (number % 4))
        request.cancel()
        (end,) = await asyncio.gather(request, return_exceptions=True)
        if isinstance(end, RequestFailed):
            raise end
        return "cancelled" if isinstance(end, asyncio.CancelledError) else "OK"

    async def _send_bad_request(self, number: int) -> str:
        """Send one of nine malformed requests; a return means that the server accepted it."""
        pixels = self._pixels()
        match number % 9:
            case 0:
                await self.client.predict(b"not an image", model=IMAGES)
            case 1:
                await self.client.predict(pixels, model="unknown")
            case 2:
                await self.client.predict(pixels, model=IMAGES, variant=9999)
            case 3:
                await self.client.predict(pixels, model=IMAGES, min_quality=0.999)
            case 4:
                await self.client.predict(pixels[:, :, :9], model=IMAGES)
            case 5:
                await self.client.predict(png_of_size(30_000, 30_000), model=IMAGES)
            case 6:
                await self.client.predict(png_of_size(28, 28)[:-30], model=IMAGES)
            case 7:
                async for _ in self.client.generate("a", model=TEXT, stop=["x"] * 40):
                    pass
            case _:
                async for _ in self.client.generate("x" * 5000, model=TEXT):
                    pass
        return "answered"

    async def _disturb(self) -> None:
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "kill -9": self._kill,
            "workers": self._kill_workers,
            "SIGTERM": self._terminate,
            "reload": self._reload,
            "SIGSTOP": self._stop_workers,
            "given up": self._give_up_loads,
        }
        every_s = min(DISTURBANCE_INTERVAL_S, self.seconds / (2 * len(kinds)))
        for number, (name, disturb) in enumerate(itertools.cycle(kinds.items()), 1):
            await asyncio.sleep(number * every_s - self._now_s)
            if number > len(kinds) and self._now_s > self.seconds - every_s / 2:
                break
            self.result.disturbances.append((self._now_s, name))
            self._disturbed = True
            await disturb()
            self._disturbed, self._undisturbed_since_s = False, self._now_s
        await asyncio.sleep(self.seconds - self._now_s)
        self._over = True

    async def _kill(self) -> None:
        starts = self.victim.starts
        self.victim.kill()
        await self._wait_for_victim(starts + 1)

    async def _terminate(self) -> None:
        starts = self.victim.starts
        self.victim.terminate()
        await self._wait_for_victim(starts + 1)

    async def _wait_for_victim(self, starts: int) -> None:
        """Wait until the victim is ready again and has loaded the text model."""
        await asyncio.to_thread(self.victim.wait_until_restarted, starts)
        await self._load_text(self.victim)

    async def _kill_workers(self) -> None:
        """Kill engine and rank of the survivor and wait until both answer again."""
        self._signal_workers(signal.SIGKILL)
        await self._wait_for_survivor()

    async def _stop_workers(self) -> None:
        """Stop engine and rank of the survivor for some seconds, and wait until both answer."""
        self._signal_workers(signal.SIGSTOP)
        await asyncio.sleep(STOP_S)
        self._signal_workers(signal.SIGCONT)
        await self._wait_for_survivor()

    def _signal_workers(self, number: signal.Signals) -> None:
        for pid in process_tree(self.survivor.pid)[1:]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    async def _wait_for_survivor(self) -> None:
        end_s = self._now_s + RECOVERY_TIMEOUT_S
        async with AsyncClient(self.survivor.address) as client:
            while not await self._answers(client):
                if self._now_s > end_s:
                    raise TimeoutError(f"no answer of the survivor in {RECOVERY_TIMEOUT_S:.0f} s")
                await asyncio.sleep(0.1)

    async def _answers(self, client: AsyncClient) -> bool:
        try:
            await client.predict(self._pixels(), model=IMAGES, timeout_s=self.deadline_s)
            stream = client.generate("a b", model=TEXT, max_tokens=1, timeout_s=self.deadline_s)
            async for _ in stream:
                pass
        except RequestFailed:
            return False
        return True

    async def _reload(self) -> None:
        async with AsyncClient(self.survivor.address) as client:
            await client.load_model(IMAGES)

    async def _give_up_loads(self) -> None:
        """Load models again and give up after some milliseconds; the last load goes to its end."""
        async with AsyncClient(self.survivor.address) as client:
            for number in range(GIVEN_UP_LOADS):
                with suppress(RequestFailed):
                    await client.load_model((IMAGES, TEXT)[number % 2], timeout_s=0.02 * number)
            for model in (IMAGES, TEXT):
                await client.load_model(model)

    async def _load_text(self, replica: SupervisedProcess) -> None:
        async with AsyncClient(replica.address) as client:
            await client.load_model(TEXT)

    async def _sample(self) -> None:
        every_s, ended = self.seconds / SAMPLES, 0
        while not self._over:
            latencies, self._latencies = self._latencies or [0.0], []
            total = self.result.requests
            p50, p99 = 1e3 * np.quantile(latencies, [0.5, 0.99])
            self.result.samples.append(
                SoakSample(
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


def png_of_size(width: int, height: int) -> bytes:
    """Return a grey PNG file that claims a size, and has the data of 28 x 28 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(29 * 28))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
