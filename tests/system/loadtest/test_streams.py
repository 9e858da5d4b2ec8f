"""Open-loop streams against a real server: both APIs, a trace file, minimums."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ladderstitch_loadtest.cli import app
from ladderstitch_loadtest.load.prompts import StreamTrace, TokenClass, draw_lengths, fit_context
from ladderstitch_loadtest.load.targets import TargetKind
from ladderstitch_loadtest.load.text_load import StreamResult, StreamRun, measure_streams
from ladderstitch_loadtest.load.text_targets import ServerReport, find_text_target
from ladderstitch_loadtest.load.traces import poisson
from ladderstitch_loadtest.servers.tiny_language import write_tiny
from tests.support.servers import RunningServer, start_server, stop_server

CLASSES = [TokenClass("tight", 5.0, 1.0), TokenClass("relaxed", 20.0, 5.0, 3)]


@pytest.fixture(scope="module")
def text_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("text")
    running = start_server(write_tiny(folder / "tiny"), folder / "log")
    yield running
    assert stop_server(running) == 0


def short_trace(answer: str) -> StreamTrace:
    rng = np.random.default_rng(1)
    times = poisson(30.0, 0.8, rng)
    lengths = draw_lengths("3-9", len(times), rng), draw_lengths(answer, len(times), rng)
    return StreamTrace.draw("short", times, CLASSES, *lengths, rng)


@pytest.mark.parametrize(("kind", "model"), [("ladderstitch", ""), ("oip", "tiny")])
def test_measure_streams_two_processes_reads_every_stream(
    text_server: RunningServer, kind: TargetKind, model: str
) -> None:
    trace = short_trace("2-7")
    target = find_text_target(text_server.address, kind, model)
    run = measure_streams(text_server.address, target, trace, processes=2)
    summary = run.summary()
    assert summary.statuses == {"OK": len(trace)}
    assert [result.tokens for result in run.results] == trace.answer_tokens.tolist()
    assert all(0 <= result.lag_s <= result.first_s <= result.total_s for result in run.results)
    assert summary.attainment == 1.0
    assert [one.offered for one in summary.classes] == np.bincount(trace.picks).tolist()
    if kind == "ladderstitch":
        assert summary.variants == {"standard": len(trace)}
        assert {one.server_attainment for one in summary.classes} == {1.0}


def test_stream_writes_json_and_html_and_checks_minimums(
    text_server: RunningServer, tmp_path: Path
) -> None:
    command = [
        "stream",
        text_server.address,
        "--rate",
        "20",
        "--seconds",
        "0.6",
        "--answer-tokens",
        "4",
        "--prompt-tokens",
        "2-6",
        "--budget",
        "a:9000:4000",
        "--out",
        str(tmp_path),
    ]
    passed = CliRunner().invoke(app, [*command, "--min-attainment", "0.5"])
    assert passed.exit_code == 0, passed.output
    found = json.loads((tmp_path / "streams.json").read_text())
    assert found["summary"]["attainment"] == 1.0
    assert found["summary"]["tokens_per_s"] == found["summary"]["goodput_tokens_per_s"]
    page = (tmp_path / "streams.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    missed = CliRunner().invoke(app, [*command, "--min-goodput", "1e9"])
    assert missed.exit_code == 1
    assert "goodput: expected at least 1e+09" in missed.output


def test_stream_replay_takes_lengths_from_azure_trace(
    text_server: RunningServer, tmp_path: Path
) -> None:
    file = tmp_path / "azure.csv"
    file.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,3\n"
        "2023-11-16 18:15:46.9951690,20,5\n"
        "2023-11-16 18:15:47.2000000,7,900\n"
    )
    command = ["stream", text_server.address, "--arrivals", "replay", "--file", str(file)]
    command += ["--rate", "3", "--seconds", "1.1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    load = json.loads((tmp_path / "streams.json").read_text())["load"]
    assert load["prompt tokens"] == "7 to 253, mean 93"  # the context holds 256
    assert load["answer tokens"] == "3 to 128, mean 45"


@pytest.mark.parametrize("text", ["a", "a:1", "a:1:b", "a:1:0", "a:1:1:1:1"])
def test_stream_malformed_budget_exits_with_2(text_server: RunningServer, text: str) -> None:
    result = CliRunner().invoke(app, ["stream", text_server.address, "--budget", text])
    assert result.exit_code == 2
    assert "expected" in result.output


def test_attainment_requires_both_budgets_and_a_complete_stream() -> None:
    """Five streams: on time, first token late, slow, cut off, rejected."""
    budgets = TokenClass("a", first_s=1.0, per_token_s=0.1)
    ladder = ServerReport(met=True, variant="ladder", quality=0.8)
    standard = ServerReport(met=False, variant="standard", quality=0.9)
    results = [
        StreamResult("OK", 0.0, 0.9, 1.3, 5, ladder),
        StreamResult("OK", 0.0, 1.1, 1.5, 5, ladder),
        StreamResult("OK", 0.0, 0.5, 1.0, 5, standard),
        StreamResult("UNAVAILABLE", 0.0, 0.5, 0.6, 2),
        StreamResult("RESOURCE_EXHAUSTED"),
    ]
    trace = StreamTrace(
        "by hand", np.zeros(5), np.zeros(5, np.int64), (budgets,), *np.ones((2, 5), np.int64)
    )
    summary = StreamRun(trace, results).summary()
    assert summary.attainment == pytest.approx(0.2)
    assert summary.effective_quality == pytest.approx(0.8 / 5)
    assert summary.tokens_per_s == pytest.approx(17 / 1.5)
    assert summary.goodput_tokens_per_s == pytest.approx(5 / 1.5)
    assert summary.classes[0].server_attainment == pytest.approx(2 / 3)


def test_lengths_are_parsed_and_cut_to_the_context() -> None:
    prompt, answer = fit_context(np.array([10, 300, 90]), np.array([5, 5, 200]), 100)
    assert prompt.tolist() == [10, 95, 50]
    assert answer.tolist() == [5, 5, 50]
    assert draw_lengths("7", 3, np.random.default_rng(0)).tolist() == [7, 7, 7]
    for text in ("0", "5-2", "x", "-3"):
        with pytest.raises(ValueError, match="expected tokens"):
            draw_lengths(text, 1, np.random.default_rng(0))
