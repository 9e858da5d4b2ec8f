"""Callers whose answers are known: images as pixels and as files, streams of tokens, chats."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from PIL import Image

from ladderstitch.client import AsyncClient, RequestFailed
from ladderstitch_loadtest.faults.fuzzing.good_callers import is_same
from ladderstitch_loadtest.faults.fuzzing.http_sender import HttpSender
from ladderstitch_loadtest.faults.stops.report import RequestEnd
from ladderstitch_loadtest.servers.processes import StartError

IMAGES, TEXT = "fashion-mnist", "tiny"
"""The model that replicas start with, and the one that each of them loads afterwards."""
QUESTIONS = 20
"""Distinct requests of each kind, all with different answers."""
CALLERS = {"pixels": 5, "files": 3, "streams": 3, "chats": 2}
"""Callers of each kind. Those of images all want one variant, so that they share batches."""
TEXT_LETTERS = 12
TRIES = 50
"""Texts that are drawn for a question until one has an answer of its own."""
PAUSE_S = 0.03
"""Pause between two requests of a caller."""
DEADLINES_S = (3.0, 8.0, 20.0)
"""Deadlines from which each request gets a random one."""
QUIET_DEADLINE_S = 300.0
MAX_TOKENS, CHAT_TOKENS = 24, 8
DIFFERENCE = 0.05
"""Smallest difference of the logits of two images, far above that of rounding."""
HTTP_REASONS = {"503": "UNAVAILABLE", "504": "DEADLINE_EXCEEDED", "hang": "DEADLINE_EXCEEDED"}
"""Reasons of gRPC for statuses of HTTP, and for a chat that was not answered in time."""
SIDE = 460
"""Side in pixels of image files, which are too costly to be decoded on the event loop."""

Ask = Callable[[int, float], Awaitable[Any]]
"""A function of a question's number and a deadline in seconds that returns the answer."""


class WrongAnswer(Exception):
    """A part of an answer that the right answer does not have, before a failure."""


class ChatFailed(Exception):
    """A chat that ended with another status of HTTP than 200, or without one."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.reason = HTTP_REASONS.get(status, status)


class Load:
    """The callers of one address; chats go to the HTTP address of one of the replicas each.

    `learn` takes the answers of a quiet server as the right ones. `run` then sends requests until
    `stop`, and compares.
    """

    def __init__(
        self, address: str, http_addresses: list[str], seed: int, now_s: Callable[[], float]
    ) -> None:
        self.ends: list[RequestEnd] = []
        self._client = AsyncClient(address, retry_policy=None)
        self._http = http_addresses
        self._now_s, self._rng = now_s, np.random.default_rng(seed)
        self._pixels = draw_images(self._rng, QUESTIONS)
        self._files = [encode_file(pixels) for pixels in self._pixels]
        self._texts = draw_texts(self._rng, QUESTIONS)
        self._variant = 0
        self._right: dict[tuple[str, int], Any] = {}
        self._stopped = False
        self.kinds: dict[str, Ask] = {
            "pixels": self.ask_pixels,
            "files": self.ask_file,
            "streams": self.ask_stream,
            "chats": self.ask_chat,
        }

    async def learn(self) -> None:
        """Ask each question on the quiet server and keep its answer.

        A text whose answer another one has, too, which would hide a swap, is replaced. Raises
        `StartError` if that does not help.
        """
        model = await self._client.get_model(IMAGES)
        self._variant = model.frontier[-1]
        for number in range(QUESTIONS):
            for _ in range(TRIES):
                answers = {
                    kind: await ask(number, QUIET_DEADLINE_S) for kind, ask in self.kinds.items()
                }
                if not any(
                    is_close(answer, self._right[kind, n])
                    for kind, answer in answers.items()
                    for n in range(number)
                ):
                    break
                (self._texts[number],) = draw_texts(self._rng, 1)
            else:
                raise StartError("two of the questions have the same answer")
            self._right |= {(kind, number): answer for kind, answer in answers.items()}

    async def run(self) -> None:
        """Send requests of all kinds until `stop`."""
        callers = [self._call(kind) for kind, count in CALLERS.items() for _ in range(count)]
        await asyncio.gather(*callers)

    def stop(self) -> None:
        """Let each caller end after its request."""
        self._stopped = True

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _call(self, kind: str) -> None:
        while not self._stopped:
            number = int(self._rng.integers(QUESTIONS))
            deadline_s = float(self._rng.choice(DEADLINES_S))
            started_s = self._now_s()
            end, detail = await self._ask(kind, number, deadline_s)
            took_s = self._now_s() - started_s
            self.ends.append(RequestEnd(kind, started_s, took_s, deadline_s, end, detail))
            await asyncio.sleep(PAUSE_S)

    async def _ask(self, kind: str, number: int, deadline_s: float) -> tuple[str, str]:
        """Return how a request ended, and more about that."""
        right = self._right[kind, number]
        try:
            answer = await self.kinds[kind](number, deadline_s)
        except WrongAnswer as error:
            return "WRONG", str(error)
        except RequestFailed as error:
            return error.reason or error.code.name, str(error)
        except ChatFailed as error:
            return error.reason, str(error)
        if not is_same(answer, right):
            return "WRONG", f"expected {str(right)[:200]}, got {str(answer)[:200]}"
        return "OK", ""

    async def ask_pixels(self, number: int, deadline_s: float) -> Any:
        """Return the logits of an image on the most accurate variant on the frontier."""
        return await self._predict(self._pixels[number], deadline_s)

    async def ask_file(self, number: int, deadline_s: float) -> Any:
        """Return the logits of an image file that a process decodes."""
        return await self._predict(self._files[number], deadline_s)

    async def _predict(self, image: Any, deadline_s: float) -> Any:
        reply = await self._client.predict(
            image, model=IMAGES, variant=self._variant, timeout_s=deadline_s
        )
        best = int(reply.logits[0].argmax())
        return np.array([*reply.logits[0], reply.probability, best], np.float32)

    async def ask_stream(self, number: int, deadline_s: float) -> Any:
        """Return the tokens of a greedy answer; raises `WrongAnswer` if they begin differently."""
        tokens: list[int] = []
        stream = self._client.generate(
            self._texts[number], model=TEXT, max_tokens=MAX_TOKENS, timeout_s=deadline_s
        )
        finish = None
        try:
            async for chunk in stream:
                tokens.append(chunk.token)
                finish = chunk.finish
        except RequestFailed as error:
            right = self._right.get(("streams", number), (tokens, finish))[0]
            if tokens != right[: len(tokens)]:
                raise WrongAnswer(f"expected {right}, got {tokens} before {error}") from error
            raise
        return tokens, finish

    async def ask_chat(self, number: int, deadline_s: float) -> Any:
        """Return the text and the finish of a chat; the deadline is that of the connection."""
        address = self._http[number % len(self._http)]
        message = {"role": "user", "content": self._texts[number]}
        body = {
            "model": TEXT,
            "messages": [message],
            "max_tokens": CHAT_TOKENS,
            "temperature": 0,
        }
        answer = await HttpSender(address, deadline_s).post(
            "/v1/chat/completions", json.dumps(body).encode()
        )
        if answer.status != "200":
            raise ChatFailed(answer.status, answer.message or str(answer.body)[:300])
        choice = json.loads(answer.body[0])["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]


def draw_images(rng: np.random.Generator, count: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Return images [1, 1, 28, 28] of random blocks."""
    blocks = rng.integers(0, 256, (count, 1, 1, 7, 7), np.uint8)
    return list(blocks.repeat(4, axis=3).repeat(4, axis=4))


def draw_texts(rng: np.random.Generator, count: int) -> list[str]:
    """Return texts of random letters."""
    return [bytes(rng.integers(97, 123, TEXT_LETTERS, np.uint8)).decode() for _ in range(count)]


def encode_file(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Return an image as a large PNG file."""
    file = io.BytesIO()
    large = Image.fromarray(pixels[0, 0]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    large.save(file, "PNG")
    return file.getvalue()


def is_close(one: Any, other: Any) -> bool:
    """Return whether two answers are nearly the same."""
    if isinstance(one, np.ndarray):
        return bool(np.abs(one - other).max() < DIFFERENCE)
    return bool(one == other)
