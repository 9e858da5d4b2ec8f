"""What clients of OpenAI's API send, and what of it becomes a generation request.

Fields that would change an answer in a way that is not built here are refused unless they are
neutral; unknown ones are ignored, as they are elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ladderstitch.api.deadlines import FIRST_TOKEN_KEY, METADATA_KEY, TOKEN_KEY, seconds_from_ms
from ladderstitch.api.validation import MAX_STOPS, fitting, tokenise
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import TextModel
from ladderstitch.scheduling.requests import GenerationRequest, Sampling, TokenBudget
from ladderstitch.text.tokenizer import ChatTurn, render_chat

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
"""Fields that are not built, and the values at which they ask for nothing."""

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own default for completions; a chat's answer may fill the context."""

LIMIT_KEY = "x-deadline-ms"
"""Our header for a hard limit: past it the answer ends with an error."""


def _encodable(text: str) -> str:
    """JSON's escapes can spell half a character, which no tokenizer takes."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("expected Unicode text, got a lone surrogate")
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class SamplingFields(BaseModel):
    """What both kinds of requests share; `min_quality` and `variant_id` are ours."""

    model_config = ConfigDict(extra="allow", strict=False)

    model: Text
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    min_quality: float = Field(0.0, ge=0, le=1)
    variant_id: int | None = None

    def check_extras(self) -> None:
        """Raises `InvalidArgument` for a field that asks for what is not built."""
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL and value not in NEUTRAL[name]:
                raise InvalidArgument(name, f"not supported here; leave it out, got {value!r:.60}")

    def stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS:
            raise InvalidArgument("stop", f"expected at most {MAX_STOPS} texts, got {len(stops)}")
        return stops

    def sampling(self) -> Sampling:
        if self.seed is not None and self.seed < 0:
            raise InvalidArgument("seed", f"expected 0 or more, got {self.seed}")
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
        )


class CompletionRequest(SamplingFields):
    prompt: Text | list[int] | list[Text] | list[list[int]]
    logprobs: int | None = None

    def tokens(self, model: TextModel) -> tuple[int, ...]:
        """Raises `InvalidArgument` for several prompts in one request, and for one that is too long."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise InvalidArgument("prompt", f"expected one prompt a request, got {len(prompt)}")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return tokenise(prompt, model, "prompt")
        return fitting(tuple(prompt), model)  # type: ignore[arg-type] # tokens by now

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def most_tokens(self, left: int) -> int:
        wanted = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return wanted if self.max_tokens is not None else min(wanted, left)


class TextPart(BaseModel):
    type: str
    text: Text = ""


class ChatMessage(BaseModel):
    role: Text
    content: Text | list[TextPart] | None = None

    def plain(self) -> ChatTurn:
        """Raises `InvalidArgument` for content that is no text."""
        if isinstance(self.content, list):
            if wrong := [part.type for part in self.content if part.type != "text"]:
                raise InvalidArgument(
                    "messages", f"expected content of type text, got {wrong[0]!r:.40}"
                )
            return {"role": self.role, "content": "".join(part.text for part in self.content)}
        return {"role": self.role, "content": self.content or ""}


class ChatRequest(SamplingFields):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    def tokens(self, model: TextModel) -> tuple[int, ...]:
        """By the model's chat template; raises `InvalidArgument` if it has none or refuses."""
        text = render_chat(
            model.bundle.manifest.chat_template, [message.plain() for message in self.messages]
        )
        return tokenise(text, model, "messages")

    @property
    def alternatives(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise InvalidArgument("top_logprobs", "expected logprobs to be true along with it")
        return (self.top_logprobs or 0) if self.logprobs else None

    def most_tokens(self, left: int) -> int:
        wanted = self.max_completion_tokens
        if wanted is None:
            wanted = self.max_tokens
        return left if wanted is None else wanted


def accept(
    wishes: CompletionRequest | ChatRequest,
    model: TextModel,
    headers: Mapping[str, str],
    arrival: float,
    tenant: str,
) -> GenerationRequest:
    """The request as the generator takes it; raises `InvalidArgument` naming the field or header."""
    wishes.check_extras()
    tokens = wishes.tokens(model)
    limit_s = _seconds(headers, LIMIT_KEY)
    answer_s = min(_seconds(headers, METADATA_KEY), limit_s)
    return GenerationRequest(
        tokens=tokens,
        arrival=arrival,
        max_tokens=wishes.most_tokens(model.scheduler.max_tokens - len(tokens)),
        sampling=wishes.sampling(),
        stop=wishes.stops(),
        hard_deadline=arrival + limit_s,
        budget=TokenBudget(
            _seconds(headers, FIRST_TOKEN_KEY),
            _seconds(headers, TOKEN_KEY),
            answer_s,
        ),
        min_quality=wishes.min_quality,
        variant=wishes.variant_id,
        logprobs=wishes.alternatives,
        tenant=tenant,
    )


def _seconds(headers: Mapping[str, str], key: str) -> float:
    return seconds_from_ms(key, headers[key]) if key in headers else math.inf
