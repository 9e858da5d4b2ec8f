"""One language model behind llama.cpp's server and behind ladderstitch, over the same HTTP API."""

from __future__ import annotations

import http.client
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from ladderstitch.importers.fetch import download
from ladderstitch_loadtest.servers import llama_cpp
from ladderstitch_loadtest.servers.peer_packages import LLAMA_CPP, PeerError, installed_packages
from ladderstitch_loadtest.servers.processes import (
    OPENAI_URL,
    ladderstitch_server,
    port_server,
)

ANSWER_TOKENS = 96
STREAMS = 8
PROMPT = "The history of the city of London begins with the Romans, who founded"
PROMPT_WORDS = 480
"""Words of the long prompt, which are about 512 tokens."""
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")
TIMEOUT_S = 120.0
LADDERSTITCH, OTHER = "ladderstitch", "llama.cpp"


@dataclass(frozen=True, slots=True)
class Stream:
    """One streamed answer: its tokens, and seconds from the call to its first and last one."""

    tokens: int
    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class LanguageFigure:
    """One quantity on a number of threads: medians over the rounds by server.

    `ratio` is the median of ladderstitch's value over llama.cpp's in each round.
    """

    threads: int
    quantity: str
    values: dict[str, float]
    ratio: float


@dataclass(frozen=True, slots=True)
class LanguageComparison:
    """All figures, with what they depend on."""

    figures: list[LanguageFigure]
    file: str
    path: str
    packages: tuple[str, ...]
    rounds: int
    load_before: float

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


def compare(
    model: str, path: str, threads: Sequence[int], rounds: int, advance: Callable[[str], None]
) -> LanguageComparison:
    """Measure both servers on the same GGUF file, interleaved, for each number of threads.

    `model` is the name of a fetched model, and `path` the one that ladderstitch loads. Raises
    `PeerError` or `StartError` if a server cannot be started or an answer fails.
    """
    load = os.getloadavg()[0]
    advance("installing")
    packages = installed_packages(LLAMA_CPP)
    figures: list[LanguageFigure] = []
    with tempfile.TemporaryDirectory(prefix="ladderstitch-") as folder:
        file = download(model, Path(folder))
        for count in threads:
            advance(f"{count} threads: starting")
            with _servers(packages, file, model, path, count) as addresses:
                found = _measure(addresses, model, rounds, advance)
            figures += _summarise(count, found)
    return LanguageComparison(figures, file.name, path, LLAMA_CPP, rounds, round(load, 2))


@contextmanager
def _servers(
    packages: Path, file: Path, model: str, path: str, threads: int
) -> Iterator[dict[str, str]]:
    """Run both servers; yield the HTTP address of each."""
    ours = ("--no-ray", "--model", model, "--path", path, "--http-port", "0")
    theirs = [sys.executable, "-P", llama_cpp.__file__, str(file), str(threads), str(STREAMS)]
    with (
        port_server(theirs, packages) as other,
        ladderstitch_server(*ours, "--threads", str(threads)) as server,
    ):
        found = OPENAI_URL.search(server.ready_line)
        if found is None:
            raise PeerError(f"expected an HTTP address in {server.ready_line!r}")
        yield {LADDERSTITCH: found[1], OTHER: other}


Runs = dict[str, dict[str, list[float]]]
"""The values of each round, by quantity and server."""


def _measure(
    addresses: Mapping[str, str], model: str, rounds: int, advance: Callable[[str], None]
) -> Runs:
    """Return the figures of all rounds; the first round, which warms up, is dropped."""
    found: Runs = {}
    names = list(addresses)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            advance(f"round {number} of {rounds}: {name}")
            for quantity, value in measure_server(addresses[name], model, number).items():
                found.setdefault(quantity, {}).setdefault(name, []).append(value)
    return {q: {n: v[1:] for n, v in by_name.items()} for q, by_name in found.items()}


def measure_server(address: str, model: str, number: int) -> dict[str, float]:
    """Return the quantities of one round against one server; `number` makes prompts differ."""
    one = stream(address, model, PROMPT, ANSWER_TOKENS)
    long = stream(address, model, long_prompt(number), 1)
    prompts = [f"{number}.{caller} {PROMPT}" for caller in range(STREAMS)]
    started = time.perf_counter()
    with ThreadPoolExecutor(STREAMS) as callers:
        answers = list(callers.map(lambda p: stream(address, model, p, ANSWER_TOKENS), prompts))
    seconds = time.perf_counter() - started
    return {
        "one stream, tokens/s": (one.tokens - 1) / (one.last_s - one.first_s),
        "first token of a long prompt, ms": 1e3 * long.first_s,
        f"{STREAMS} streams, tokens/s": sum(a.tokens for a in answers) / seconds,
    }


def long_prompt(number: int) -> str:
    """Return a prompt that shares no prefix with that of another number."""
    words = [WORDS[(number * 7 + i * (number + 3)) % len(WORDS)] for i in range(PROMPT_WORDS)]
    return f"{number} " + " ".join(words)


def stream(address: str, model: str, prompt: str, max_tokens: int) -> Stream:
    """Return one greedy answer of OpenAI's completion API. Raises `PeerError` if it fails."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    started = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    reply = connection.getresponse()
    if reply.status != http.client.OK:
        raise PeerError(f"{address}: status {reply.status}: {reply.read(500)!r}")
    first_s = last_s = 0.0
    tokens = 0
    for line in reply:
        event = line.removeprefix(b"data: ").strip()
        if event in (b"", b"[DONE]"):
            continue
        chunk = json.loads(event)
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
        if chunk["choices"]:
            last_s = time.perf_counter() - started
            first_s = first_s or last_s
    connection.close()
    if not tokens:
        raise PeerError(f"{address}: expected the number of tokens with the last chunk, got none")
    return Stream(tokens, first_s, last_s)


def _summarise(threads: int, found: Runs) -> list[LanguageFigure]:
    figures = []
    for quantity, by_name in found.items():
        ratios = [
            ours / other for ours, other in zip(by_name[LADDERSTITCH], by_name[OTHER], strict=True)
        ]
        values = {name: round(median(values), 1) for name, values in by_name.items()}
        figures.append(LanguageFigure(threads, quantity, values, round(median(ratios), 3)))
    return figures
