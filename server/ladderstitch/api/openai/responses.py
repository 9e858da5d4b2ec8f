"""The responses of OpenAI's API: whole answers, chunks of a stream, and errors."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from ladderstitch.api.native.generation import quality_metric
from ladderstitch.errors import InvalidArgument, Overloaded, RequestError, Unauthenticated
from ladderstitch.hosting.registry import TextModel
from ladderstitch.scheduling.requests import GenerationUsage, TokenChunk, TokenSpan
from ladderstitch.text.tokenizer import TextTokenizer

Body = dict[str, Any]
DONE = "data: [DONE]\n\n"
"""The last event of a stream that was completed."""

HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""HTTP status by the name of the gRPC status."""
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
"""The `type` of an error by its HTTP status."""


BODY = "body"
"""The field of errors that concern the whole body."""

LEAST_LOGPROB = -9999.0
"""The log probability of a token that is impossible."""


@dataclass(slots=True)
class ResponseBuilder:
    """The format of one request's answer: `chat` messages or text, with log probabilities or not.

    A builder serves one answer: it counts the characters of the answer for `text_offset`.
    """

    model: TextModel
    chat: bool
    logprobs: bool
    name: str
    """The name of the model in the request."""
    id: str = field(init=False)
    created: int = field(init=False)
    _num_characters: int = 0

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def chunk(self, chunk: TokenChunk) -> Body:
        """Return one chunk of a stream."""
        choice: Body = {"index": 0, "finish_reason": chunk.finish}
        if self.chat:
            delta: Body = {"content": chunk.text}
            choice["delta"] = {"role": "assistant"} | delta if chunk.index == 0 else delta
        else:
            choice["text"] = chunk.text
        choice["logprobs"] = self._logprobs([chunk]) if self.logprobs else None
        return self._envelope([choice], streamed=True)

    def usage_chunk(self, usage: GenerationUsage, last: TokenChunk) -> Body:
        """Return the chunk that reports the usage after the last token of a stream."""
        return self._envelope([], streamed=True) | self._usage(usage, last)

    def full_response(self, chunks: Sequence[TokenChunk], usage: GenerationUsage) -> Body:
        """Return a whole answer."""
        text = "".join(chunk.text for chunk in chunks)
        choice: Body = {"index": 0, "finish_reason": chunks[-1].finish}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(chunks) if self.logprobs else None
        return self._envelope([choice], streamed=False) | self._usage(usage, chunks[-1])

    def _envelope(self, choices: list[Body], *, streamed: bool) -> Body:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.name,
            "choices": choices,
        }

    def _usage(self, usage: GenerationUsage, last: TokenChunk) -> Body:
        """Return OpenAI's `usage`, and the extension `ladderstitch` with times and variant."""
        info, quality = last.answer, last.answer.quality
        return {
            "usage": {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.generated_tokens,
                "total_tokens": usage.prompt_tokens + usage.generated_tokens,
                "prompt_tokens_details": {"cached_tokens": info.reused_tokens},
            },
            "ladderstitch": {
                "variant_name": info.name,
                "variant_id": info.variant,
                "spans": [_describe_span(span) for span in info.spans],
                "quality": quality.value if quality else None,
                "quality_metric": quality_metric(self.model.bundle.quality),
                "perplexity": quality.perplexity if quality else None,
                "queue_ms": _milliseconds(usage.queue_s),
                "first_token_ms": _milliseconds(usage.first_token_s),
                "mean_token_ms": _milliseconds(usage.mean_token_s),
                "total_ms": _milliseconds(usage.total_s),
                "budgets_met": usage.met,
            },
        }

    def _logprobs(self, chunks: Sequence[TokenChunk]) -> Body:
        if self.chat:
            return {"content": [self._chat_logprob(chunk) for chunk in chunks], "refusal": None}
        offsets = []
        for chunk in chunks:
            offsets.append(self._num_characters)
            self._num_characters += len(chunk.text)
        return {
            "tokens": [self._token_text(chunk.token) for chunk in chunks],
            "token_logprobs": [_finite(chunk.logprob) for chunk in chunks],
            "top_logprobs": [self._logprob_by_text(chunk) for chunk in chunks],
            "text_offset": offsets,
        }

    def _logprob_by_text(self, chunk: TokenChunk) -> dict[str, float | None]:
        """Return the log probabilities of the drawn token and of its alternatives, by text.

        The drawn token has its text. Another one whose text is taken is named `token_id:ID`.
        """
        found: dict[str, float | None] = {}
        for token, logprob in ((chunk.token, chunk.logprob), *chunk.alternatives):
            if token == chunk.token and found:
                continue
            text = self._token_text(token)
            found[f"token_id:{token}" if text in found else text] = _finite(logprob)
        return found

    def _chat_logprob(self, chunk: TokenChunk) -> Body:
        return self._token_logprob(chunk.token, chunk.logprob) | {
            "top_logprobs": [
                self._token_logprob(token, logprob) for token, logprob in chunk.alternatives
            ]
        }

    def _token_logprob(self, token: int, logprob: float | None) -> Body:
        own = self._tokenizer.token_bytes(token)
        text = self._token_text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(own)}

    def _token_text(self, token: int) -> str:
        """Return the text of a token as OpenAI writes it: bytes that are no text are escaped.

        Special tokens have their name, although they are no part of the answer.
        """
        if self._tokenizer.is_special(token):
            return self._tokenizer.token(token) or ""
        own = self._tokenizer.token_bytes(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    @property
    def _tokenizer(self) -> TextTokenizer:
        return self.model.scheduler.tokenizer


def server_sent_event(body: Body) -> str:
    """Return a body as a server-sent event."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def error_body(error: RequestError) -> Body:
    """Return `{"error": {...}}`; its `code` is the reason that gRPC callers get."""
    status = HTTP_STATUS[error.code]
    return {
        "error": {
            "message": str(error),
            "type": ERROR_TYPES.get(status, "server_error"),
            "param": _parameter(error),
            "code": error.reason,
        }
        | ({"metadata": error.metadata} if error.metadata else {})
    }


def _parameter(error: RequestError) -> str | None:
    """Return the field that an error is about; None if it is the whole body."""
    field = error.field if isinstance(error, InvalidArgument) else BODY
    return None if field == BODY else field


def error_response(error: RequestError) -> JSONResponse:
    """Return the HTTP response of an error, with the time to wait before a retry if it has one."""
    headers = {}
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
        headers["retry-after-ms"] = str(max(1, round(1e3 * error.retry_after_s)))
    return JSONResponse(error_body(error), HTTP_STATUS[error.code], headers)


def malformed_body(error: RequestValidationError) -> InvalidArgument:
    """Return the error of a body that lacks a field or has a wrong one."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or BODY
    return InvalidArgument(field, first["msg"])


def _finite(logprob: float | None) -> float | None:
    """Return a log probability as a number of JSON, which has no infinity."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def _describe_span(span: TokenSpan) -> dict[str, object]:
    """Return a span of an answer; one after a change also says how it found the cache."""
    fields = {"variant_name": span.name, "variant_id": span.variant, "tokens": span.num_tokens}
    return (
        fields | {"cache": span.cache, "penalty_nats": span.penalty_nats} if span.cache else fields
    )


def _milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)
