"""The verdicts of `stops`: which ends of requests and which health samples are allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest

from ladderstitch.replica import watchdog
from ladderstitch.text.engine.liveness import Liveness
from ladderstitch.vision.engine.base import BEAT_S
from ladderstitch.vision.engine.process import SILENT_BEATS
from ladderstitch_loadtest.faults.stops.injector import LONGEST_STOP_S, plan_faults
from ladderstitch_loadtest.faults.stops.report import (
    ALARM_S,
    Fault,
    HealthSample,
    RequestEnd,
    StopsReport,
    explain,
)


def fault(at_s: float, recovered_s: float, **fields: object) -> Fault:
    """Return a fault of the engine of the first replica."""
    values = {"replica": 0, "kind": "engine", "signal": "SIGKILL", "replaced": True} | fields
    return Fault(at_s=at_s, recovered_s=recovered_s, **values)  # type: ignore[arg-type] # mixed types


def samples(*changes: tuple[float, bool | None], end_s: float = 100.0) -> list[HealthSample]:
    """Return a sample every 0.1 s; each change is a time and the health from then on."""
    found, health = [], True
    for tick in range(round(10 * end_s)):
        for at_s, changed in changes:
            health = changed if tick == round(10 * at_s) else health
        found.append(HealthSample(tick / 10, health))
    return found


def failures(
    faults: Iterable[Fault],
    health: list[HealthSample],
    gateway: Iterable[HealthSample] = (),
    ends: Iterable[RequestEnd] = (),
) -> list[str]:
    """Return what a report of one replica lists."""
    report = StopsReport(
        "test", 100.0, list(faults), list(ends), {(0, "gRPC"): health}, list(gateway)
    )
    assert report.to_dict()["failures"] == report.list_failures()
    return report.list_failures()


def request(end: str, took_s: float = 1.0, started_s: float = 10.0) -> RequestEnd:
    """Return the end of a request with a deadline of 3 s."""
    return RequestEnd("pixels", started_s, took_s, 3.0, end)


@pytest.mark.parametrize(
    ("end", "is_allowed"),
    [
        (request("OK"), True),
        (request("OK", 4.1), False),
        (request("WRONG"), False),
        (request("DEADLINE_EXCEEDED", 3.0), True),
        (request("EXPIRED_IN_COMPUTE", 2.99), True),
        (request("DEADLINE_EXCEEDED", 2.0), False),
        (request("DEADLINE_EXCEEDED", 4.1), False),
        (request("ENGINE_RESTARTING"), True),
        (request("UNAVAILABLE", 0.5, started_s=14.5), True),
        (request("UNAVAILABLE", 0.5, started_s=16.5), False),
        (request("UNAVAILABLE", 0.5, started_s=5.0), False),
        (request("INTERNAL"), False),
        (request("INVALID_ARGUMENT"), False),
        (request("reset"), False),
    ],
)
def test_explain_end_near_a_fault(end: RequestEnd, is_allowed: bool) -> None:
    found = explain(end, [fault(10.5, 15.0)])
    assert (found == "") == is_allowed
    assert bool(failures([fault(10.5, 15.0)], samples((11, False), (15, True)), (), [end])) == (
        not is_allowed
    )


def test_gateway_may_have_no_replica_only_while_all_have_trouble() -> None:
    first, second = fault(10.5, 15.0), fault(30.0, 35.0, replica=1)
    assert explain(request("NOT_READY"), [first, second])
    assert explain(request("NOT_READY"), [first, fault(10.6, 12.0, replica=1)]) == ""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([(11.9, False), (20.2, True)], ""),
        ([(12.2, False), (20.2, True)], "NOT_SERVING after 2.2 s"),
        ([], "NOT_SERVING after inf s"),
        ([(10.5, False), (25.2, True)], "not SERVING 5 s after the end of trouble"),
        ([(10.5, False)], "not SERVING 5 s after the end of trouble"),
        ([(10.5, False), (20.2, True), (50.0, None), (50.2, True)], "2 checks were not answered"),
    ],
)
def test_health_of_lasting_trouble(changes: list[tuple[float, bool]], expected: str) -> None:
    found = failures([fault(10.0, 20.0)], samples(*changes))
    assert len(found) == bool(expected)
    assert all(expected in line for line in found)


def test_health_that_returns_while_a_process_is_stopped_is_wrong() -> None:
    stopped = fault(10.0, 20.0, signal="SIGSTOP", held_s=10.0, replaced=False)
    flapping = samples((11, False), (15, True), (15.5, False), (20.2, True))
    assert "SERVING 5.0 s later (5 times)" in failures([stopped], flapping)[0]
    assert failures([stopped], samples((11, False), (20.2, True))) == []


def test_short_trouble_and_that_of_a_process_that_starts_on_demand_need_no_alarm() -> None:
    assert failures([fault(10.0, 11.9)], samples()) == []
    assert failures([fault(10.0, 30.0, kind="decode")], samples()) == []


def test_all_clear_is_not_expected_between_troubles_that_overlap() -> None:
    faults = [fault(10.0, 20.0), fault(19.0, 30.0), fault(33.0, 40.0)]
    health = samples((10.5, False), (40.5, True))
    assert failures(faults, health) == []
    report = StopsReport("test", 100.0, faults, [], {(0, "gRPC"): health})
    assert report.all_clears_s() == pytest.approx([0.5])


def test_gateway_serves_while_one_replica_is_well() -> None:
    faults = [fault(10.0, 20.0), fault(40.0, 50.0, replica=1), fault(41.0, 50.0)]
    health = samples((11, False), (20.5, True), (42, False), (50.5, True))
    assert failures(faults, health, samples((42, False), (50.5, True))) == []
    (line,) = failures(faults, health, samples((12, False), (13, True)))
    assert "gateway: NOT_SERVING while a replica was well, 10 times" in line


def test_trouble_without_end_is_wrong() -> None:
    found = failures([fault(10.0, math.inf)], samples((10.5, False)))
    assert [line for line in found if "no recovery" in line]


def test_plan_is_seeded_and_has_all_kinds() -> None:
    first, second = (plan_faults(20, 10, np.random.default_rng(3)) for _ in range(2))
    assert first == second != plan_faults(20, 10, np.random.default_rng(4))
    held = [planned.held_s for planned in first if planned.held_s]
    assert len(first) == 30
    assert len(held) == 10
    assert max(held) <= LONGEST_STOP_S
    for is_stop in (True, False):
        kinds = {planned.kind for planned in first if bool(planned.held_s) == is_stop}
        assert kinds == {"engine", "rank", "decode", "template"}


def test_limits_of_the_server_report_a_stop_in_time() -> None:
    """A beat or a check may have been answered just before the stop."""
    assert (SILENT_BEATS + 1) * BEAT_S + watchdog.INTERVAL_S < ALARM_S
    liveness = Liveness()
    assert liveness.idle_check_s + liveness.slow_s + watchdog.INTERVAL_S < ALARM_S
