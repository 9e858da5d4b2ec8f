# /// script
# dependencies = ["aiperf==0.13.0"]
#
# [tool.ladderstitch]
# package = "aiperf"
# ///
"""AIPerf, NVIDIA's load generator for language models, with the tokenizer of the bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = os.environ["LADDERSTITCH_TEXT_MODEL"]
BUNDLE, URL = os.environ["LADDERSTITCH_TEXT_BUNDLE"], os.environ["LADDERSTITCH_HTTP"]
REQUESTS, TOKENS = 12, 8
LENGTHS = ["--isl", "32", "--osl", str(TOKENS), "--extra-inputs", "ignore_eos:true"]


def profile(folder: Path, *options: str) -> dict[str, dict[str, float]]:
    """Run a benchmark; return its figures by their names."""
    command = [
        sys.executable,
        "-m",
        "aiperf",
        "profile",
        "-m",
        MODEL,
        "--url",
        URL.removesuffix("/v1"),
    ]
    command += ["--tokenizer", BUNDLE, "--request-count", str(REQUESTS), "--ui", "none"]
    done = subprocess.run(
        [*command, *LENGTHS, "--artifact-dir", str(folder), *options],
        env=os.environ | {"HOME": str(folder), "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    figures = json.loads((folder / "profile_export_aiperf.json").read_text())
    assert figures["request_count"]["avg"] == REQUESTS, figures.get("error_summary")
    assert figures["usage_completion_tokens"]["avg"] == TOKENS
    assert "ladderstitch" in (folder / "server_metrics_export.json").read_text()
    return figures  # type: ignore[no-any-return]


def run(what: str, *options: str, streaming: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = profile(Path(folder), *options)
    assert ("time_to_first_token" in figures) == streaming
    if "completions" in options:  # the prompt is not part of a template
        own, servers = figures["input_sequence_length"], figures["usage_prompt_tokens"]
        assert own["avg"] == servers["avg"], "other tokens than the server's"
    print(f"ok {what}")


if __name__ == "__main__":
    load = ["--concurrency", "2"]
    run("completions", "--endpoint-type", "completions", *load, streaming=False)
    completions = ["--endpoint-type", "completions", "--streaming"]
    run("streams of completions", *completions, *load, streaming=True)
    run("streams at a rate", *completions, "--request-rate", "5", streaming=True)
    run("streams of chats", "--endpoint-type", "chat", "--streaming", *load, streaming=True)
    run("responses", "--endpoint-type", "responses", *load, streaming=False)
