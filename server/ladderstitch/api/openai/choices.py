"""The choices of one answer: their generations, run at once, and the parts of each choice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ladderstitch.api.openai.logprobs import LogprobWriter
from ladderstitch.api.openai.requests import AcceptedRequest
from ladderstitch.api.openai.tool_calls import ToolCall, ToolCallReader
from ladderstitch.hosting.registry import TextModel
from ladderstitch.scheduling.generation import GenerationRequest, TokenChunk
from ladderstitch.text.scheduler.scheduler import TextScheduler
from ladderstitch.text.scheduler.token_stream import TokenStream
from ladderstitch.text.tokenizer import TextTokenizer

Body = dict[str, Any]
NumberedChunk = tuple[int, TokenChunk]
"""The number of a generation, and its next chunk."""


class MergedStreams:
    """The streams of several generations as one asynchronous iterator of numbered chunks.

    An error of one of them ends all; `aclose` frees what has not ended.
    """

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        self._streams = list(streams)
        self._open = dict(enumerate(self._streams))
        self._tasks: dict[asyncio.Task[TokenChunk], int] = {}

    @classmethod
    async def open(
        cls, scheduler: TextScheduler, requests: Sequence[GenerationRequest]
    ) -> MergedStreams:
        """Submit all requests; raise what `TextScheduler.generate` does if one is rejected."""
        merged = cls([])
        try:
            for request in requests:
                merged._streams.append(scheduler.generate(request))
        except BaseException:
            await merged.aclose()
            raise
        return cls(merged._streams)

    def __aiter__(self) -> MergedStreams:
        return self

    async def __anext__(self) -> NumberedChunk:
        """Return the next chunk of any generation; raise the error of the first one that failed."""
        if not self._open:
            raise StopAsyncIteration
        if len(self._streams) == 1:
            number, chunk = 0, await anext(self._streams[0])
        else:
            number, chunk = await self._next_of_several()
        if chunk.usage is not None:
            del self._open[number]
        return number, chunk

    async def aclose(self) -> None:
        """End all generations; closing again changes nothing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for stream in self._streams:
            await stream.aclose()

    async def _next_of_several(self) -> NumberedChunk:
        waited_for = set(self._tasks.values())
        for number, stream in self._open.items():
            if number not in waited_for:
                self._tasks[asyncio.create_task(_next_chunk(stream))] = number
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        first = min(done, key=self._tasks.__getitem__)
        number = self._tasks.pop(first)
        return number, first.result()


async def _next_chunk(stream: TokenStream) -> TokenChunk:
    return await anext(stream)


class ChoiceBuilder:
    """The parts of one choice, of a chat message or of a text, as its tokens arrive."""

    def __init__(
        self, index: int, accepted: AcceptedRequest, generation: int, model: TextModel, chat: bool
    ) -> None:
        """`index` numbers the choice in the answer, `generation` its generation."""
        self._index, self._chat = index, chat
        self._accepted, self._prompt = accepted, accepted.prompt_of(generation)
        self._reports = accepted.reports_logprobs
        self._writer = LogprobWriter(model.scheduler.tokenizer)
        self._tokenizer: TextTokenizer = model.scheduler.tokenizer
        self._calls = ToolCallReader(accepted.tools) if accepted.tools else None
        self._num_calls = 0
        self._is_first = True

    def whole(self, chunks: Sequence[TokenChunk]) -> Body:
        """Return the whole choice."""
        choice: Body = {"index": self._index}
        if self._chat:
            content, calls = self._read(chunks)
            message: Body = {"role": "assistant", "content": content, "refusal": None}
            if calls:
                message |= {"content": content or None}
                message["tool_calls"] = [call.to_json() for call in calls]
            choice["message"] = message
        else:
            choice["text"] = self._text(chunks)
        choice["logprobs"] = self._logprobs(chunks)
        return choice | {"finish_reason": self._finish_reason(chunks[-1])}

    def part(self, chunk: TokenChunk) -> Body:
        """Return the part of a chunk of a stream."""
        choice: Body = {"index": self._index}
        if self._chat:
            content, calls = self._read([chunk])
            delta: Body = {} if calls and not content else {"content": content}
            if calls:
                numbered = enumerate(calls, self._num_calls - len(calls))
                delta["tool_calls"] = [call.to_json(number) for number, call in numbered]
            choice["delta"] = {"role": "assistant"} | delta if self._is_first else delta
        else:
            choice["text"] = self._text([chunk])
        choice["logprobs"] = self._logprobs([chunk])
        self._is_first = False
        return choice | {"finish_reason": self._finish_reason(chunk)}

    def _text(self, chunks: Sequence[TokenChunk]) -> str:
        accepted = self._accepted
        prompt = self._prompt.text if accepted.echo and self._is_first else ""
        return prompt + ("" if accepted.only_echo else "".join(chunk.text for chunk in chunks))

    def _read(self, chunks: Sequence[TokenChunk]) -> tuple[str, list[ToolCall]]:
        """Return the content and the calls of chunks."""
        if self._calls is None:
            return "".join(chunk.text for chunk in chunks), []
        content, calls = "", list[ToolCall]()
        for chunk in chunks:
            text = chunk.text
            is_special = self._tokenizer.is_special(chunk.token)
            if is_special and self._tokenizer.token(chunk.token) == self._calls.marker:
                text = self._calls.marker + text
            parts = [self._calls.add(text)]
            if chunk.finish is not None:
                parts.append(self._calls.finish())
            for more, found in parts:
                content += more
                calls += found
        self._num_calls += len(calls)
        return content, calls

    def _finish_reason(self, chunk: TokenChunk) -> str | None:
        if chunk.finish is not None and self._accepted.only_echo:
            return "length"
        return "tool_calls" if chunk.finish == "stop" and self._num_calls else chunk.finish

    def _logprobs(self, chunks: Sequence[TokenChunk]) -> Body | None:
        if not self._reports:
            return None
        if self._chat:
            return self._writer.of_chat(chunks)
        prompt = chunks[0].prompt if self._is_first else ()
        return self._writer.of_completion(() if self._accepted.only_echo else chunks, prompt)
