"""The closed loop: its result, the files of h2load, and the generator against the echo."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ladderstitch_loadtest.benchmarks.echo import METHOD
from ladderstitch_loadtest.load import closed_loop
from ladderstitch_loadtest.load.closed_loop import (
    Generator,
    LoopError,
    LoopTarget,
    find_generator,
    format_h2load,
    parse_calls,
    run_loop,
    summarise,
)
from ladderstitch_loadtest.servers.processes import echo_server

needs_h2load = pytest.mark.skipif(not shutil.which("h2load"), reason="h2load is not installed")


def test_summarise_does_not_count_the_warm_up() -> None:
    calls = [(10.0, 0.2), (10.2, 0.3), (10.5, 0.1), (10.6, 0.7)]  # the warm-up ends at 10.3
    found = summarise(calls)
    assert found.answers == 3
    assert found.mean_ms == pytest.approx(1100 / 3)
    assert found.p50_ms == pytest.approx(300)
    assert found.answers_per_s == pytest.approx(3)  # the last call ends 1 s after the warm-up


def test_summarise_without_a_counted_call_fails() -> None:
    for calls in ([], [(10.0, 0.1)]):
        with pytest.raises(LoopError, match="no call ended after the warm-up"):
            summarise(calls)


def test_parse_calls_reads_seconds_and_drops_cut_off_calls() -> None:
    log = "1000000\t200\t250\n1000300\t200\t500\n1000900\t-1\t7\n"
    assert parse_calls(log) == [(1.0, 0.00025), (1.0003, 0.0005)]


def test_parse_calls_with_another_status_fails() -> None:
    with pytest.raises(LoopError, match="expected HTTP status 200, got 503"):
        parse_calls("1000000\t503\t250\n")


def test_format_h2load_has_one_call_in_flight_per_caller() -> None:
    command = format_h2load(LoopTarget("127.0.0.1:9", METHOD, b""), 8, 1.5, Path("/folder"))
    assert command[-1] == f"http://127.0.0.1:9{METHOD}"
    line = " ".join(command)
    for part in ("--clients 8", "--max-concurrent-streams 1", "--duration 1500ms"):
        assert part in line
    for part in ("--data /folder/message", "--log-file /folder/calls", "application/grpc"):
        assert part in line


def test_find_generator_takes_h2load_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_loop.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert find_generator() == "h2load"
    monkeypatch.setattr(closed_loop.shutil, "which", lambda name: None)
    assert find_generator() == "grpc"


@pytest.mark.parametrize("generator", ["grpc", pytest.param("h2load", marks=needs_h2load)])
def test_run_loop_measures_the_echo(generator: Generator) -> None:
    with echo_server() as address:
        found = run_loop(LoopTarget(address, METHOD, b"message"), 3, 0.2, generator)
    assert found.answers > 0
    assert found.mean_ms > 0
    assert found.answers_per_s > 0


def test_run_loop_of_an_unknown_method_fails() -> None:
    with echo_server() as address, pytest.raises(LoopError, match=r"/a\.B/C failed"):
        run_loop(LoopTarget(address, "/a.B/C", b""), 1, 0.2, "grpc")
