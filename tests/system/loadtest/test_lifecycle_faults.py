"""Short runs of the benchmarks of loads that are given up, and of restarts after a death."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ladderstitch.bundles import EMBEDDED
from ladderstitch.cli.supervisor import BEAT_S, LOST_BEATS
from ladderstitch_loadtest.cli import app
from ladderstitch_loadtest.faults.fuzzing.observations import Footprint
from ladderstitch_loadtest.faults.loads import LoadsResult, ServerState
from ladderstitch_loadtest.faults.restarts import RestartCase, RestartTimes, time_restarts
from ladderstitch_loadtest.servers.tiny_language import write_tiny


def test_loads_short_run_leaves_nothing_behind(tmp_path: Path) -> None:
    options = ("--cycles", "6", "--warm-up", "2", "--no-memory", "--out", str(tmp_path))
    done = CliRunner().invoke(app, ["loads", *options])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "loads.json").read_text())
    for name in ("descriptors", "processes", "series"):
        assert found["before"][name] == found["after"][name] > 0
    assert found["wrong"] == found["lost"] == []
    assert found["answers"] > 0
    loads = {end: count for end, count in found["ends"].items() if ": load " in end}
    assert sum(loads.values()) == 6
    assert min(loads["images: load OK"], loads["tiny: load OK"]) >= 2  # some are not given up


@pytest.mark.parametrize(
    ("after", "failure"),
    [
        (ServerState(Footprint(104.0, 20, 1), 300), ""),
        (ServerState(Footprint(106.0, 20, 1), 300), "memory"),
        (ServerState(Footprint(94.0, 20, 1), 300), "memory"),
        (ServerState(Footprint(100.0, 21, 1), 300), "descriptors"),
        (ServerState(Footprint(100.0, 20, 2), 300), "processes"),
        (ServerState(Footprint(100.0, 20, 1), 301), "series"),
    ],
)
def test_loads_names_what_a_run_left_behind(after: ServerState, failure: str) -> None:
    found = LoadsResult(1, before=ServerState(Footprint(100.0, 20, 1), 300), after=after)
    assert [line.partition(":")[0] for line in found.failures()] == ([failure] if failure else [])
    found.lost.append("UNAVAILABLE")
    assert len(found.failures(memory=False)) == 1 + (failure not in ("", "memory"))


def test_restarts_spare_starts_a_language_model_again(tmp_path: Path) -> None:
    case = RestartCase(write_tiny(tmp_path / "tiny"), spare=True, signal=signal.SIGKILL)
    steps: list[None] = []
    found = time_restarts(case, 1, lambda: steps.append(None), pause_s=0.0)
    assert found.to_dict()["case"] == "language, spare, SIGKILL"
    assert len(found.seconds) == len(found.imports) == len(steps) == 1


def test_restarts_limits_follow_the_import_of_torch() -> None:
    noticed_s = (LOST_BEATS + 1) * BEAT_S
    for spare, number, limit_s in (
        (True, signal.SIGKILL, 4.0),
        (True, signal.SIGSTOP, 4.0 + noticed_s),
        (False, signal.SIGKILL, 8.0),
    ):
        case = RestartCase(EMBEDDED, spare, number)
        for median_s, passed in ((limit_s - 0.01, True), (limit_s + 0.01, False)):
            found = RestartTimes(case, [0.1, 99.0, median_s], [0.1, 99.0, 2.0])
            assert found.limit_s == pytest.approx(limit_s)
            assert found.passed == passed
