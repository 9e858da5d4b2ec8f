"""Mixed load for a while: images and text, cancels, bad input, killed workers, reloaded models.

Ten seconds in `make test`; `make soak` makes it an hour (LADDERSTITCH_SOAK_S) and prints figures.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch_loadtest.malforming import memory_mb, process_tree
from tests.conftest import make_tiny_bundle
from tests.language.conftest import write_tiny
from tests.service.conftest import RunningServer, pixels, start_server, stop_server

SECONDS = float(os.environ.get("LADDERSTITCH_SOAK_S", "10"))
DISTURBED_EVERY_S = min(120.0, SECONDS / 5)
STUCK_S = 30.0
"""No request may take so long, whatever happens around it."""
ALLOWED = {
    "images": {"OK", "ENGINE_RESTARTING"},
    "hard": {"OK", "OVERLOADED", "BUDGET_INFEASIBLE", "EXPIRED_IN_QUEUE", "EXPIRED_IN_COMPUTE",
             "ENGINE_RESTARTING"},
    "text": {"OK"},
    "cancelled": {"cancelled", "OK"},
    "bad": {"BAD_INPUT", "MODEL_NOT_FOUND", "STITCH_NOT_FOUND", "QUALITY_UNAVAILABLE"},
}  # fmt: skip
SETTLED_MB = 40.0
"""Between the means of the second and the last quarter of a short run: caches still fill."""
SLOPE_MB_PER_HOUR = 20.0
"""Of a long run, over its second half."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    home = tmp_path / "home"
    make_tiny_bundle(home / "tiny")
    text = write_tiny(home / "text") / "model.yaml"
    text.write_text(yaml.safe_dump(yaml.safe_load(text.read_text()) | {"name": "text"}))
    running = start_server(
        home / "tiny", tmp_path / "log", environment={"LADDERSTITCH_HOME": str(home)}
    )
    yield running
    assert stop_server(running) == 0


class Soak:
    """Callers of five kinds, a disturber and an observer, until the time is up."""

    def __init__(self, server: RunningServer, client: AsyncClient) -> None:
        self.server, self.client = server, client
        self.ends: Counter[tuple[str, str]] = Counter()
        self.longest_s = 0.0
        self.memory_mb: list[float] = []
        self.disturbances = 0
        self._until = time.monotonic() + SECONDS

    async def run(self) -> None:
        await self.client.load_model("text")
        kinds: dict[str, Callable[[int], Awaitable[object]]] = {
            "images": lambda n: self.client.predict(
                pixels(1 + n % 3, n), model="tiny", budget_s=0.5, timeout_s=STUCK_S
            ),
            "hard": lambda n: self.client.predict(
                pixels(seed=n), model="tiny", budget_s=0.001 * (n % 9 + 1), hard=True
            ),
            "text": self._read,
            "cancelled": self._leave,
            "bad": self._blunder,
        }
        callers = [self._call(kind, ask) for kind, ask in kinds.items() for _ in range(3)]
        await asyncio.gather(*callers, self._disturb(), self._observe())

    async def _call(self, kind: str, ask: Callable[[int], Awaitable[object]]) -> None:
        number = 0
        while time.monotonic() < self._until:
            number += 1
            started = time.monotonic()
            try:
                end = await ask(number)
                end = end if isinstance(end, str) else "OK"
            except RequestFailed as error:
                end = error.reason or error.code.name
            self.longest_s = max(self.longest_s, time.monotonic() - started)
            self.ends[kind, end] += 1
            await asyncio.sleep(0.02)

    async def _read(self, number: int) -> None:
        tokens = 1 + number % 20
        stream = self.client.generate("a b c", model="text", max_tokens=tokens, timeout_s=STUCK_S)
        assert [piece async for piece in stream]

    async def _leave(self, number: int) -> str:
        """Ask, and be gone before the answer."""
        asking = asyncio.create_task(
            self.client.predict(pixels(4, number), model="tiny", timeout_s=STUCK_S)
        )
        await asyncio.sleep(0.001 * (number % 4))
        asking.cancel()
        (end,) = await asyncio.gather(asking, return_exceptions=True)
        if isinstance(end, RequestFailed):
            raise end
        return "cancelled" if isinstance(end, asyncio.CancelledError) else "OK"

    async def _blunder(self, number: int) -> object:
        match number % 4:
            case 0:
                return await self.client.predict(b"no picture", model="tiny")
            case 1:
                return await self.client.predict(pixels(), model="nobody")
            case 2:
                return await self.client.predict(pixels(), model="tiny", stitch=9999)
        return await self.client.predict(pixels(), model="tiny", min_quality=0.999)

    async def _disturb(self) -> None:
        """Kill the workers and ranks, and read the model anew, in turns."""
        while time.monotonic() + DISTURBED_EVERY_S < self._until:
            await asyncio.sleep(DISTURBED_EVERY_S)
            self.disturbances += 1
            if self.disturbances % 2:
                for pid in process_tree(self.server.process.pid)[1:]:
                    os.kill(pid, signal.SIGKILL)
            else:
                await self.client.load_model("tiny")

    async def _observe(self) -> None:
        while time.monotonic() < self._until:
            self.memory_mb.append(memory_mb([self.server.process.pid]))
            await asyncio.sleep(SECONDS / 200)


def waiting(server: RunningServer) -> float:
    """Requests that the server still has."""
    with urllib.request.urlopen(server.metrics) as page:
        families = text_string_to_metric_families(page.read().decode())
    wanted = {"ladderstitch_queue_requests", "ladderstitch_running_requests"}
    return sum(s.value for family in families if family.name in wanted for s in family.samples)


@pytest.mark.timeout(SECONDS + 120)
async def test_nothing_leaks_sticks_or_surprises(server: RunningServer) -> None:
    async with AsyncClient(server.address) as client:
        soak = Soak(server, client)
        await soak.run()
    ends: dict[str, dict[str, int]] = {}
    for (kind, end), count in sorted(soak.ends.items()):
        ends.setdefault(kind, {})[end] = count
    memory = np.array(soak.memory_mb)
    quarter = len(memory) // 4
    grown_mb = memory[-quarter:].mean() - memory[quarter : 2 * quarter].mean()
    hours = np.linspace(SECONDS / 2, SECONDS, len(memory) - 2 * quarter) / 3600
    slope = np.polyfit(hours, memory[2 * quarter :], 1)[0]
    sys.stderr.write(
        f"\n{SECONDS:.0f} s, {sum(soak.ends.values())} requests, {soak.disturbances} disturbances, "
        f"longest {soak.longest_s:.2f} s, memory {memory.mean():.0f} MB, "
        f"{slope:+.1f} MB/h in the second half\n{ends}\n"
    )
    assert ends.keys() == ALLOWED.keys()
    assert {kind: ends[kind].keys() - ALLOWED[kind] for kind in ends} == {k: set() for k in ends}
    assert soak.disturbances >= 2
    assert soak.longest_s < STUCK_S
    assert waiting(server) == 0
    if SECONDS < 600:
        assert grown_mb < SETTLED_MB
    else:
        assert slope < SLOPE_MB_PER_HOUR
