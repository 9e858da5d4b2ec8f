"""The requests of OpenAI's API, and their translation to generation requests.

An option that is not supported is rejected if it would change the answer. Fields that do not change
the answer (`user`, `metadata`) and unknown ones are ignored, as other servers of this API do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ladderstitch.api.deadlines import (
    LATENCY_BUDGET_KEY,
    TPOT_BUDGET_KEY,
    TTFT_BUDGET_KEY,
    seconds_from_ms,
)
from ladderstitch.api.native.generation import MAX_STOPS
from ladderstitch.api.openai.models import NamedModel
from ladderstitch.api.openai.options import UNSUPPORTED
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import TextModel
from ladderstitch.scheduling.requests import GREEDY, GenerationRequest, Sampling, TokenBudget
from ladderstitch.text.bundle import SamplingDefaults
from ladderstitch.text.chat_template import Message

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions; the answer of a chat may fill the context."""

RANDOM_SEED, ALL_TOKENS = -1, -1
"""The seed that stands for none."""

HARD_DEADLINE_KEY = "x-deadline-ms"
"""Header of a hard deadline, after which the answer ends with an error."""


def _check_unicode(text: str) -> str:
    """Return the text; raises `ValueError` for a lone surrogate.

    JSON's escapes can spell one, but no tokenizer accepts it.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("expected Unicode text, got a lone surrogate")
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]


class OpenFields(BaseModel):
    """A part of a request that may have more fields than are supported."""

    model_config = ConfigDict(extra="allow")

    def check_unsupported(self, path: str = "") -> None:
        """Raise `InvalidArgument` if an unsupported option would change the answer.

        `path` precedes the names of the fields.
        """
        for field, value in (self.model_extra or {}).items():
            neutral = UNSUPPORTED.get(path + field)
            if neutral is None or value is None or value in neutral:
                continue
            expected = " or ".join([*map(repr, neutral), "no value"])
            raise InvalidArgument(path + field, f"expected {expected}, got {repr(value)[:60]}")


class StreamOptions(OpenFields):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class SamplingFields(OpenFields):
    """The fields of completion and chat requests; `min_quality` and `variant_id` are extensions."""

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    min_quality: float | None = Field(None, ge=0, le=1)
    variant_id: int | None = None

    def check_unsupported(self, path: str = "") -> None:
        """Raise `InvalidArgument` if an unsupported option would change the answer."""
        super().check_unsupported(path)
        if self.stream_options is not None:
            self.stream_options.check_unsupported("stream_options.")

    def stop_texts(self) -> tuple[str, ...]:
        """Return the stop texts; raises `InvalidArgument` for more than 16."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS:
            raise InvalidArgument("stop", f"expected at most {MAX_STOPS} texts, got {len(stops)}")
        return stops

    def sampling(self, defaults: SamplingDefaults) -> Sampling:
        """Return the sampling parameters; values that other servers accept mean what they do there.

        Options that are not stated have the model's `defaults`. `top_p` 0 keeps only the likeliest
        token, `top_k` -1 keeps all and `seed` -1 is random. Raises `InvalidArgument` for another
        negative seed.
        """
        if self.seed is not None and self.seed < RANDOM_SEED:
            raise InvalidArgument("seed", f"expected -1 (random) or more, got {self.seed}")
        sampling = Sampling(
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_k={None: defaults.top_k, ALL_TOKENS: 0}.get(self.top_k, self.top_k or 0),
            top_p=defaults.top_p if self.top_p is None else self.top_p or 1.0,
            seed=None if self.seed == RANDOM_SEED else self.seed,
        )
        if self.top_p != 0:
            return sampling
        sampling.check()  # other fields are checked, although greedy decoding needs none
        return GREEDY


class CompletionRequest(SamplingFields):
    """The body of `/v1/completions`."""

    prompt: Text | list[int] | list[Text] | list[list[int]]
    logprobs: int | None = None

    async def prompt_tokens(self, model: TextModel) -> tuple[int, ...]:
        """Return the tokens of the prompt.

        Raises `InvalidArgument` for more than one prompt, or for one that is too long.
        """
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise InvalidArgument("prompt", f"expected one prompt, got {len(prompt)}")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return model.tokenise("prompt", prompt)
        tokens = tuple(token for token in prompt if isinstance(token, int))
        model.check_prompt_length(tokens)
        return tokens

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives to report for each token; None for no log probabilities."""
        return self.logprobs

    def max_new_tokens(self, available: int) -> int:
        """Return the maximum number of tokens to generate; `available` ones fit the context."""
        if self.max_tokens is not None:
            return self.max_tokens
        return min(DEFAULT_COMPLETION_TOKENS, available)


class TextPart(BaseModel):
    """A part of a chat message's content."""

    type: str
    text: Text | None = None


class ChatMessage(OpenFields):
    """A message of a chat."""

    role: Text
    content: Text | list[TextPart] | None = None

    def to_template(self) -> Message:
        """Return the message for a chat template, with plain text and with its other fields.

        Raises `InvalidArgument` for content that is not text.
        """
        content = self.content or ""
        if isinstance(content, list):
            if wrong := [part.type for part in content if part.type != "text"]:
                raise InvalidArgument(
                    "messages", f"expected content of type text, got {wrong[0]!r:.40}"
                )
            content = "".join(part.text or "" for part in content)
        others = {k: v for k, v in (self.model_extra or {}).items() if v not in (None, [])}
        return others | {"role": self.role, "content": content}


class ChatRequest(SamplingFields):
    """The body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_special_tokens: Literal[False] | None = None  # in a chat, the template adds them
    allow_control_tokens: bool | None = None

    def check_unsupported(self, path: str = "") -> None:
        """Raise `InvalidArgument` if an unsupported option would change the answer."""
        super().check_unsupported(path)
        for message in self.messages:
            message.check_unsupported("messages.")

    async def prompt_tokens(self, model: TextModel) -> tuple[int, ...]:
        """Return the tokens of the chat, rendered by the model's chat template.

        Raises `InvalidArgument` if the model has no template, or if its template raises an error.
        """
        messages = [message.to_template() for message in self.messages]
        return await model.tokenise_chat(
            messages, allow_control_tokens=bool(self.allow_control_tokens)
        )

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives to report for each token; None for no log probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidArgument("top_logprobs", "expected logprobs to be true along with it")
        return (self.top_logprobs or 0) if self.logprobs else None

    def max_new_tokens(self, available: int) -> int:
        """Return the maximum number of tokens to generate; `available` ones fit the context."""
        limits = (self.max_completion_tokens, self.max_tokens, available)
        return next(limit for limit in limits if limit is not None)


async def build_generation_request(
    body: CompletionRequest | ChatRequest,
    named: NamedModel,
    headers: Mapping[str, str],
    arrival: float,
    tenant: str,
) -> GenerationRequest:
    """Return the request for the scheduler.

    Raises `InvalidArgument` that names the wrong field or header.
    """
    body.check_unsupported()
    model, variant = named.model, named.variant
    if variant is not None and body.variant_id not in (None, variant):
        raise InvalidArgument(
            "variant_id", f"expected {variant}, that of {named.id}, got {body.variant_id}"
        )
    tokens = await body.prompt_tokens(model)
    limit_s = _read_budget(headers, HARD_DEADLINE_KEY)
    answer_s = min(_read_budget(headers, LATENCY_BUDGET_KEY), limit_s)
    return GenerationRequest(
        tokens=tokens,
        arrival=arrival,
        max_tokens=body.max_new_tokens(model.scheduler.max_tokens - len(tokens)),
        sampling=body.sampling(model.bundle.manifest.sampling),
        stop=body.stop_texts(),
        hard_deadline=arrival + limit_s,
        budget=TokenBudget(
            _read_budget(headers, TTFT_BUDGET_KEY),
            _read_budget(headers, TPOT_BUDGET_KEY),
            answer_s,
        ),
        min_quality=body.min_quality or 0.0,
        variant=body.variant_id if variant is None else variant,
        logprobs=body.num_logprobs,
        tenant=tenant,
    )


def _read_budget(headers: Mapping[str, str], key: str) -> float:
    """Return the seconds of a budget in the headers, or infinity without one."""
    return seconds_from_ms(key, headers[key]) if key in headers else math.inf
