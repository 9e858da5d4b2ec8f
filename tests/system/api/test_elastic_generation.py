"""A served family of decoders: an operator's pin changes the stitch of an answer in progress."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ladderstitch.cli.app import app
from ladderstitch.client import Client
from ladderstitch.text.bundle import TextBundle
from tests.support.elastic_models import write_elastic
from tests.support.servers import RunningServer, start_server, stop_server

SMALL, LARGE = 0, 4
MAX_TOKENS = 1800
"""Enough for the pin to arrive before the last one."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """Return a calibrated family."""
    path = write_elastic(tmp_path_factory.mktemp("models") / "elastic", positions=2048)
    text = path / "held-out.txt"
    text.write_text("a text of bytes that no one has written before, " * 12)
    result = CliRunner().invoke(app, ["calibrate", str(path), "--text", str(text)])
    assert result.exit_code == 0, result.output
    return TextBundle.load(path)


@pytest.fixture(scope="module")
def server(bundle: TextBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    running = start_server(bundle.path, log, "--cache-mode", "project")
    yield running
    assert stop_server(running) == 0


def read_metric(server: RunningServer, name: str) -> float:
    """Return the sum of all series of a counter."""
    with urllib.request.urlopen(server.metrics, timeout=60) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def test_answer_reports_spans_cache_and_penalty(server: RunningServer, bundle: TextBundle) -> None:
    with Client(server.address) as client:
        client.update_scheduling(pinned_variant=SMALL)
        chunks = []
        for chunk in client.generate("a prompt", max_tokens=MAX_TOKENS):
            chunks.append(chunk)
            if chunk.index == 5:
                client.update_scheduling(pinned_variant=LARGE)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    accounting = chunks[-1].accounting
    assert accounting is not None
    first, second = accounting.spans
    assert (first.variant_name, second.variant_name) == ("small", "large")
    assert first.tokens + second.tokens == len(chunks)
    assert (first.cache, second.cache) == ("", "projected")
    assert bundle.switches is not None
    assert second.penalty_nats == bundle.switches.nats(SMALL, LARGE)
    assert read_metric(server, "ladderstitch_variant_changes_total") == 1
    assert read_metric(server, "ladderstitch_variant_tokens_total") == len(chunks)
    translated = read_metric(server, "ladderstitch_translated_tokens_total")
    assert translated == len("a prompt") + first.tokens - 1


def test_profile_and_frontier_draw_the_paths(bundle: TextBundle, tmp_path: Path) -> None:
    runner, plot = CliRunner(), tmp_path / "frontier.png"
    early = runner.invoke(app, ["frontier", str(bundle.path), "--plot", str(plot)])
    assert early.exit_code == 2
    assert "not profiled; run `ladderstitch profile" in " ".join(early.output.split())
    assert runner.invoke(app, ["profile", str(bundle.path), "--rounds", "2"]).exit_code == 0
    drawn = runner.invoke(app, ["frontier", str(bundle.path), "--plot", str(plot)])
    assert drawn.exit_code == 0, drawn.output
    assert all(variant.name in drawn.output for variant in bundle.manifest.variants)
    assert plot.read_bytes().startswith(b"\x89PNG")
