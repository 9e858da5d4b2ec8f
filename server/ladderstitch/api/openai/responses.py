"""Answers in the form that clients of OpenAI's API expect, whole or as a stream of events."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse

from ladderstitch.api.native.generation import quality_metric
from ladderstitch.errors import InvalidArgument, Overloaded, RequestError, Unauthenticated
from ladderstitch.hosting.registry import TextModel
from ladderstitch.hosting.streaming import GenerationUsage
from ladderstitch.scheduling.requests import TokenChunk

Body = dict[str, Any]
DONE = "data: [DONE]\n\n"


def event(body: Body) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


@dataclass(slots=True)
class ResponseBuilder:
    """How one request's answer looks: `chat` messages or plain text, with logprobs or without."""

    model: TextModel
    chat: bool
    logprobs: bool
    id: str = field(init=False)
    created: int = field(init=False)
    _offset: int = 0  # characters of the answer so far

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def chunk(self, piece: TokenChunk) -> Body:
        """One piece of a stream."""
        choice: Body = {"index": 0, "finish_reason": piece.finish}
        if self.chat:
            delta: Body = {"content": piece.text}
            choice["delta"] = {"role": "assistant"} | delta if piece.index == 0 else delta
        else:
            choice["text"] = piece.text
        choice["logprobs"] = self._likelihoods([piece]) if self.logprobs else None
        return self._frame([choice], streamed=True)

    def last(self, account: GenerationUsage, piece: TokenChunk) -> Body:
        """After the last chunk of a stream whose caller wants the usage."""
        return self._frame([], streamed=True) | self._cost(account, piece)

    def whole(self, pieces: Sequence[TokenChunk], account: GenerationUsage) -> Body:
        """An answer in one."""
        text = "".join(piece.text for piece in pieces)
        choice: Body = {"index": 0, "finish_reason": pieces[-1].finish}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._likelihoods(pieces) if self.logprobs else None
        return self._frame([choice], streamed=False) | self._cost(account, pieces[-1])

    def _frame(self, choices: list[Body], *, streamed: bool) -> Body:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }

    def _cost(self, account: GenerationUsage, last: TokenChunk) -> Body:
        """OpenAI's usage, and our own account beside it."""
        answer, quality = last.answer, last.answer.quality
        return {
            "usage": {
                "prompt_tokens": account.prompt_tokens,
                "completion_tokens": account.generated_tokens,
                "total_tokens": account.prompt_tokens + account.generated_tokens,
                "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
            },
            "ladderstitch": {
                "path": answer.name,
                "variant_id": answer.path,
                "quality": quality.value if quality else None,
                "quality_metric": quality_metric(self.model.bundle.quality),
                "perplexity": quality.perplexity if quality else None,
                "queue_ms": _ms(account.queue_s),
                "first_token_ms": _ms(account.first_token_s),
                "mean_token_ms": _ms(account.mean_token_s),
                "total_ms": _ms(account.total_s),
                "budgets_met": account.met,
            },
        }

    def _likelihoods(self, pieces: Sequence[TokenChunk]) -> Body:
        if self.chat:
            return {"content": [self._chat_token(piece) for piece in pieces], "refusal": None}
        offsets = []
        for piece in pieces:
            offsets.append(self._offset)
            self._offset += len(piece.text)
        return {
            "tokens": [self._text(piece.token) for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [
                {self._text(token): logprob for token, logprob in piece.alternatives}
                for piece in pieces
            ],
            "text_offset": offsets,
        }

    def _chat_token(self, piece: TokenChunk) -> Body:
        return self._token(piece.token, piece.logprob) | {
            "top_logprobs": [self._token(*alternative) for alternative in piece.alternatives]
        }

    def _token(self, token: int, logprob: float | None) -> Body:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return self.model.scheduler.tokenizer.decode([token])


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""gRPC status -> HTTP status."""
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}


def body_of(error: RequestError) -> dict[str, Any]:
    """`{"error": {...}}`; `code` is the reason that gRPC callers get."""
    status = STATUS[error.code]
    return {
        "error": {
            "message": str(error),
            "type": KINDS.get(status, "server_error"),
            "param": error.field if isinstance(error, InvalidArgument) else None,
            "code": error.reason,
        }
        | ({"metadata": error.metadata} if error.metadata else {})
    }


def response_to(error: RequestError) -> JSONResponse:
    headers = {}
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
        headers["retry-after-ms"] = str(max(1, round(1e3 * error.retry_after_s)))
    return JSONResponse(body_of(error), STATUS[error.code], headers)
