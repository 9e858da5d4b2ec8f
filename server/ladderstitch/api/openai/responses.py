"""The responses of OpenAI's API: whole answers, chunks of a stream, and errors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence

from fastapi.exceptions import RequestValidationError

from ladderstitch.api.native.generation import quality_metric
from ladderstitch.api.openai.choices import ChoiceBuilder
from ladderstitch.api.openai.errors import BODY, Body, error_body
from ladderstitch.api.openai.event_marks import AnswerName
from ladderstitch.api.openai.requests import AcceptedRequest
from ladderstitch.errors import InvalidArgument, RequestError
from ladderstitch.hosting.registry import TextModel
from ladderstitch.scheduling.generation import TokenChunk, TokenSpan

TYPES = ("bool", "float", "int", "str")
DONE = "data: [DONE]\n\n"
"""The last event of a stream that was completed."""


class ResponseBuilder:
    """The answer to one request: `chat` messages or text, whole or in chunks."""

    def __init__(
        self,
        model: TextModel,
        accepted: AcceptedRequest,
        chat: bool,
        name: str,
        answer: AnswerName,
    ) -> None:
        """`name` is that of the model in the request."""
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{answer.digits}"
        self.created = answer.created
        self._model, self._accepted, self._chat, self._name = model, accepted, chat, name
        self._choices: dict[int, ChoiceBuilder] = {}
        self._last: dict[int, TokenChunk] = {}

    def replay(self, chunks: Iterable[TokenChunk]) -> None:
        """Take over the tokens of the only generation that the caller has."""
        for chunk in chunks:
            self.chunk(0, chunk)

    def chunk(self, number: int, chunk: TokenChunk) -> Body:
        """Return one chunk of a stream, of the generation with this number."""
        if number not in self._choices:
            self._choices[number] = self._choice(number, number)
        if chunk.usage is not None:
            self._last[number] = chunk
        return self._envelope([self._choices[number].part(chunk)], streamed=True)

    def usage_chunk(self) -> Body:
        """Return the chunk that reports the usage after the last token of a stream."""
        return self._envelope([], streamed=True) | self._usage(list(self._last.values()))

    def full_response(self, generations: Sequence[Sequence[TokenChunk]]) -> Body:
        """Return a whole answer; of more generations than choices, it has the likeliest ones."""
        accepted, choices = self._accepted, list[Body]()
        for first in range(0, len(generations), accepted.best_of):
            numbers = list(range(first, first + accepted.best_of))
            if accepted.best_of > accepted.n:
                numbers.sort(key=lambda number: -_mean_logprob(generations[number]))
            for number in numbers[: accepted.n]:
                choice = self._choice(len(choices), number).whole(generations[number])
                if len(generations) > 1:
                    choice["ladderstitch"] = self._describe(generations[number][-1])
                choices.append(choice)
        usage = self._usage([chunks[-1] for chunks in generations])
        return self._envelope(choices, streamed=False) | usage

    def _choice(self, index: int, generation: int) -> ChoiceBuilder:
        return ChoiceBuilder(index, self._accepted, generation, self._model, self._chat)

    def _envelope(self, choices: list[Body], *, streamed: bool) -> Body:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self._name,
            "choices": choices,
        }

    def _usage(self, last: Sequence[TokenChunk]) -> Body:
        """Return OpenAI's `usage`, and of one choice the extension `ladderstitch`."""
        prompt_tokens = sum(len(prompt.tokens) for prompt in self._accepted.prompts)
        generated = sum(chunk.index + 1 for chunk in last)
        if self._accepted.only_echo:
            generated = 0
        reused = sum(chunk.answer.reused_tokens for chunk in last)
        usage: Body = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": min(reused, prompt_tokens)},
        }
        described = {"ladderstitch": self._describe(last[0])} if len(last) == 1 else {}
        return {"usage": usage} | described

    def _describe(self, last: TokenChunk) -> Body:
        """Return the variant, the quality and the times of a generation."""
        info, quality, usage = last.answer, last.answer.quality, last.usage
        assert usage is not None, "the last chunk has it"
        return {
            "variant_name": info.name,
            "variant_id": info.variant,
            "spans": [_describe_span(span) for span in info.spans],
            "quality": quality.value if quality else None,
            "quality_metric": quality_metric(self._model.bundle.quality),
            "perplexity": quality.perplexity if quality else None,
            "queue_ms": _milliseconds(usage.queue_s),
            "first_token_ms": _milliseconds(usage.first_token_s),
            "mean_token_ms": _milliseconds(usage.mean_token_s),
            "total_ms": _milliseconds(usage.total_s),
            "budgets_met": usage.met,
        }


def _mean_logprob(chunks: Sequence[TokenChunk]) -> float:
    return sum(chunk.logprob or 0.0 for chunk in chunks) / len(chunks)


def server_sent_event(body: Body) -> str:
    """Return a body as a server-sent event."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def named_event(body: Body) -> str:
    """Return a body with a `type` as a server-sent event of that name."""
    return f"event: {body['type']}\n{server_sent_event(body)}"


def error_event(error: RequestError) -> Body:
    """Return the event that ends a response with an error."""
    described = error_body(error)["error"]
    return {
        "type": "error",
        "code": described["code"],
        "message": described["message"],
        "param": described["param"],
        "sequence_number": -1,
    }


def malformed_body(error: RequestValidationError) -> InvalidArgument:
    """Return the error of a body that lacks a field or has a wrong one.

    Of a field of several types, pydantic also names the type in which it found the error.
    """
    first = error.errors()[0]
    names = itertools.takewhile(_is_name, first["loc"][1:])
    field = ".".join(map(str, names)) or BODY
    return InvalidArgument(field, first["msg"].removeprefix("Value error, "))


def _is_name(part: str | int) -> bool:
    """Return whether a part of a place is a field or an index, and no type."""
    return isinstance(part, int) or (part.islower() and part.isidentifier() and part not in TYPES)


def _describe_span(span: TokenSpan) -> dict[str, object]:
    """Return a span of an answer; one after a change also says how it found the cache."""
    fields = {"variant_name": span.name, "variant_id": span.variant, "tokens": span.num_tokens}
    return (
        fields | {"cache": span.cache, "penalty_nats": span.penalty_nats} if span.cache else fields
    )


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)
