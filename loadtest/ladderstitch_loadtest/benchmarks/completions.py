"""Timed answers of OpenAI's completion API: one stream, a long prompt, and eight streams."""

from __future__ import annotations

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

from ladderstitch_loadtest.servers.peer_packages import PeerError

ANSWER_TOKENS = 96
STREAMS = 8
PROMPT = "The history of the city of London begins with the Romans, who founded"
PROMPT_WORDS = 480
"""Words of the long prompt, which are about 512 tokens."""
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Stream:
    """A streamed answer: its tokens, and seconds from the call to its first and last chunk.

    The tokens are those of all prompts of the request.
    """

    tokens: int
    first_s: float
    last_s: float


def measure_server(
    address: str,
    model: str,
    number: int,
    *,
    tokens: int = ANSWER_TOKENS,
    batched: bool = False,
) -> dict[str, float]:
    """Return the quantities of one round against one server; `number` makes prompts differ.

    Eight streams are eight concurrent requests, or with `batched` one request of eight prompts.
    """
    one = stream(address, model, PROMPT, tokens)
    long = stream(address, model, long_prompt(number), 1)
    prompts = [f"{number}.{caller} {PROMPT}" for caller in range(STREAMS)]
    started = time.perf_counter()
    if batched:
        answers = [stream(address, model, prompts, tokens)]
    else:
        with ThreadPoolExecutor(STREAMS) as callers:
            answers = list(callers.map(lambda p: stream(address, model, p, tokens), prompts))
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


def stream(address: str, model: str, prompt: str | list[str], max_tokens: int) -> Stream:
    """Return the greedy answer to one request. Raises `PeerError` if it fails."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with closing(http.client.HTTPConnection(address, timeout=TIMEOUT_S)) as connection:
        started = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        with connection.getresponse() as reply:
            if reply.status != http.client.OK:
                raise PeerError(f"{address}: status {reply.status}: {reply.read(500)!r}")
            return _read_stream(reply, address, started)


def _read_stream(reply: http.client.HTTPResponse, address: str, started: float) -> Stream:
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
    if not tokens:
        raise PeerError(f"{address}: expected the number of tokens with the last chunk, got none")
    return Stream(tokens, first_s, last_s)
