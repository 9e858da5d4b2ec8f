"""Log probabilities: every token once, with its own bytes, and numbers that JSON has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import Tokenizer

from ladderstitch.api.openai import answers
from ladderstitch.api.openai.bodies import Prompt
from ladderstitch.api.openai.event_marks import AnswerName
from ladderstitch.api.openai.logprobs import LEAST_LOGPROB, LogprobWriter
from ladderstitch.api.openai.requests import AcceptedRequest
from ladderstitch.api.openai.responses import ResponseBuilder
from ladderstitch.hosting.registry import TextModel
from ladderstitch.scheduling.generation import (
    GenerationInfo,
    GenerationRequest,
    TokenChunk,
    TokenSpan,
)
from ladderstitch.text.tokenizer import TextStream, TextTokenizer
from tests.api.openai.served_model import AsgiCall, ServedModel, write_chat_bundle
from tests.text.tokenizer_kinds import KINDS, tokenizer_of

LIMIT_S = 300.0
INFO = GenerationInfo((TokenSpan(0, "standard", 1),), None, 0.0, 0)


class OneTokenizer:
    """A model of which responses need the tokenizer only."""

    name = "m"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = TextTokenizer(tokenizer)

    @property
    def scheduler(self) -> OneTokenizer:
        """The holder of the tokenizer."""
        return self


def builder_of(kind: str, *, chat: bool) -> ResponseBuilder:
    """Return a builder of responses with log probabilities."""
    model = cast("TextModel", OneTokenizer(tokenizer_of(kind)))
    generations = (GenerationRequest((1,), 0.0),)
    accepted = AcceptedRequest(generations, (Prompt((1,)),), reports_logprobs=True)
    return ResponseBuilder(model, accepted, chat, "tiny", AnswerName.new())


def chunk_of(
    token: int, text: str = "", alternatives: Iterable[tuple[int, float]] = (), index: int = 0
) -> TokenChunk:
    """Return a chunk of a token with log probability -1."""
    return TokenChunk(index, token, text, INFO, None, -1.0, tuple(alternatives))


def chunks_of(tokenizer: TextTokenizer, prompt: str, tokens: Sequence[int]) -> list[TokenChunk]:
    """Return the chunks of an answer."""
    stream = TextStream(tokenizer, tokenizer.encode(prompt))
    chunks = [chunk_of(token, stream.add(token), (), n) for n, token in enumerate(tokens)]
    return [*chunks, chunk_of(tokenizer.size, stream.finish(), (), len(tokens))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [" fox 🚲 東京", "naïve\n  façade", "🚲"])
def test_bytes_of_chat_tokens_make_up_the_content(kind: str, text: str) -> None:
    builder = builder_of(kind, chat=True)
    tokenizer = TextTokenizer(tokenizer_of(kind))
    tokens = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    choices = [builder.chunk(0, c)["choices"][0] for c in chunks_of(tokenizer, "The dog", tokens)]
    content = "".join(choice["delta"]["content"] for choice in choices)
    entries = [choice["logprobs"]["content"][0] for choice in choices]
    assert len(entries) == len(tokens) + 1
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == content
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(entry["token"] for entry in entries)
    end = entries[-2]
    assert (end["token"], end["bytes"]) == ("<|im_end|>", [])


def test_part_of_a_character_is_written_as_bytes() -> None:
    builder = builder_of("sentencepiece-bpe", chat=True)
    token = tokenizer_of("sentencepiece-bpe").token_to_id("<0xF0>")
    (entry,) = builder.chunk(0, chunk_of(token))["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("bytes:\\xf0", [0xF0])
    letter = tokenizer_of("sentencepiece-bpe").token_to_id("<0x41>")
    (entry,) = builder.chunk(0, chunk_of(letter))["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("A", [0x41])


def completion_logprobs(kind: str, chunk: TokenChunk) -> dict[str, Any]:
    """Return the log probabilities of a chunk of a completion."""
    choice = builder_of(kind, chat=False).chunk(0, chunk)["choices"][0]
    return cast("dict[str, Any]", choice["logprobs"])


def test_drawn_token_is_among_the_best_although_it_is_not() -> None:
    found = completion_logprobs("byte-level", chunk_of(70, "", [(71, -0.1), (72, -0.2)]))
    (best,) = found["top_logprobs"]
    assert len(best) == 3
    assert best[found["tokens"][0]] == found["token_logprobs"][0] == -1.0
    (alone,) = completion_logprobs("byte-level", chunk_of(70))["top_logprobs"]
    assert list(alone.values()) == [-1.0]


def test_tokens_with_one_text_are_all_reported() -> None:
    tokenizer = tokenizer_of("sentencepiece-bpe")
    letter, byte, other = (tokenizer.token_to_id(name) for name in ("a", "<0x61>", "<0x62>"))
    for drawn in (letter, byte):
        alternatives = [(letter, -0.5), (byte, -0.6), (other, -0.7)]
        logprob = dict(alternatives)[drawn]
        chunk = TokenChunk(0, drawn, "", INFO, None, logprob, tuple(alternatives))
        (best,) = completion_logprobs("sentencepiece-bpe", chunk)["top_logprobs"]
        rest = letter if drawn == byte else byte
        assert best == {"a": logprob, f"token_id:{rest}": dict(alternatives)[rest], "b": -0.7}


def test_special_and_half_characters_are_told_apart() -> None:
    tokenizer = tokenizer_of("byte-level")
    special = [tokenizer.token_to_id(name) for name in ("<s>", "</s>", "<|im_end|>")]
    halves = [tokenizer.token_to_id(name) for name in ("Ã", "Ä", "Å")]
    tokens = [*special, *halves]
    chunk = chunk_of(special[0], "", [(token, -1.0) for token in tokens])
    (best,) = completion_logprobs("byte-level", chunk)["top_logprobs"]
    assert len(best) == len(tokens)
    assert {"<s>", "</s>", "<|im_end|>", "bytes:\\xc3"} <= set(best)


def test_impossible_tokens_have_a_finite_logprob() -> None:
    chunk = TokenChunk(0, 70, "", INFO, None, -np.inf, ((71, 0.0), (72, float("-inf"))))
    found = completion_logprobs("byte-level", chunk)
    assert found["token_logprobs"] == [LEAST_LOGPROB]
    assert min(found["top_logprobs"][0].values()) == LEAST_LOGPROB


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_reports_each_token_over_http(tmp_path: Path, stream: bool) -> None:
    served = ServedModel(write_chat_bundle(tmp_path))
    served.scheduler.steps.release()
    call = AsgiCall(False, temperature=1, seed=7, max_tokens=12, logprobs=3, stream=stream)
    await call.run(served, lambda message: None)
    await served.scheduler.close()
    headers = dict(call.sent[0]["headers"])
    assert call.sent[0]["status"] == 200
    body = b"".join(m.get("body", b"") for m in call.sent).decode()
    if stream:
        assert headers[b"x-accel-buffering"] == b"no"
        assert headers[b"cache-control"] == b"no-cache"
    assert body.count('"top_logprobs"') == (12 if stream else 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_other_requests_run_while_log_probabilities_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    served = ServedModel(write_chat_bundle(tmp_path))
    writing, released = threading.Event(), threading.Event()

    def write_later(self: LogprobWriter, *parts: Any) -> dict[str, Any]:
        writing.set()
        assert released.wait(LIMIT_S)  # only the loop that it must not hold sets it
        return write(self, *parts)

    write = LogprobWriter.of_completion
    monkeypatch.setattr(LogprobWriter, "of_completion", write_later)
    monkeypatch.setattr(answers, "MAX_PROMPT_AT_ONCE", -1)  # no prompt is short
    served.scheduler.steps.release()
    call = AsgiCall(False, max_tokens=1, logprobs=1, stream=stream)
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(call.run(served, lambda message: None))
        assert await asyncio.to_thread(writing.wait, LIMIT_S)
        released.set()
    await served.scheduler.close()
    assert b'"token_logprobs"' in b"".join(m.get("body", b"") for m in call.sent)
