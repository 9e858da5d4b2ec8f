"""Tests of the replay of a scheduler's record."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest

from ladderstitch.errors import DataError, RequestError
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.model_metrics import VisionMetrics
from ladderstitch.vision.engine.base import EngineDied
from ladderstitch.vision.scheduler.scheduler import Scheduler
from ladderstitch_loadtest.simulation.replay import replay
from tests.support.image_scheduling import (
    QUALITY,
    FakeClock,
    ScriptedEngine,
    make_profile,
    make_request,
)


async def record(path: Path) -> float:
    """Record forty requests, some rejected or cancelled, one batch lost; return their quality."""
    clock = FakeClock()
    engine = ScriptedEngine(clock)
    batches = 0

    def die_on_the_third(images: object, variant: int) -> None:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise EngineDied("killed")

    engine.script = die_on_the_third
    with path.open("w") as file:
        scheduler = Scheduler(
            engine,
            QUALITY,
            make_profile(),
            SchedulerSettings(overhead_s=0.0),
            VisionMetrics(Metrics(), "m", QUALITY),
            clock,
            record=file,
        )
        ends: list[object] = []
        for wave in range(8):
            tasks, budgets = [], {}
            for k in range(5):
                budget_s = (0.0005, 0.004, 0.02, 0.1, math.inf)[k]
                hard = clock.now + budget_s if k % 2 == 0 else math.inf
                request = make_request(clock.now + budget_s, arrival=clock.now, hard=hard)
                task = asyncio.create_task(scheduler.submit(request))
                tasks.append(task)
                budgets[task] = request.deadlines.soft
            if wave == 4:
                await asyncio.sleep(0)
                tasks[3].cancel()
                scheduler.configure(SchedulerSettings(policy="slackfit"))
            ends += await asyncio.gather(*tasks, return_exceptions=True)
        await scheduler.close()
    assert any(isinstance(end, RequestError) for end in ends)
    return sum(getattr(end, "quality", 0.0) for end in ends)


async def test_replay_repeats_every_decision(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    earned = await record(path)
    found = replay(path)
    assert found.exact, found.differences
    assert (found.admissions, len(found.offered)) == (40, 40)
    assert found.decisions > 8
    best = max(QUALITY.values())  # a request cancelled during compute may count
    assert 0 < found.recorded.effective_quality * 40 <= earned + best
    assert 0.5 < found.simulate("slackfit").attainment < 1.0
    assert found.simulate("fixed 0") != found.simulate("fixed 2")


async def test_replay_names_a_decision_that_differs(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    await record(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    decided = next(line for line in lines[1:] if line[0] == "decide")
    decided[2] = 4
    path.write_text("\n".join(map(json.dumps, lines)))
    found = replay(path)
    assert not found.exact
    assert "on 4, replayed" in found.differences[0]


@pytest.mark.parametrize(
    ("text", "message"), [("", "expected a record"), ('{"format": 2}\n[]', "expected format 1")]
)
def test_replay_of_another_file_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        replay(path)
