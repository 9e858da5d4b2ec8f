"""Requests for texts as messages, and the tokens of their answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ladderstitch.client.messages import microseconds
from ladderstitch.v1 import generation_pb2

FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


class GenerateOptions(TypedDict, total=False):
    """The options of `generate`: the keyword parameters of `generate_request`."""

    model: str
    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float | None
    seed: int | None
    stop: Sequence[str]
    budget_s: float | None
    hard: bool
    first_token_budget_s: float | None
    token_budget_s: float | None
    min_quality: float | None
    variant: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    min_tokens: int
    stop_token_ids: Sequence[int]
    ignore_end_tokens: bool
    json_schema: str | Mapping[str, Any] | None
    regex: str | None


def generate_request(
    prompt: str | Sequence[int],
    *,
    model: str = "",
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    budget_s: float | None = None,
    hard: bool = False,
    first_token_budget_s: float | None = None,
    token_budget_s: float | None = None,
    min_quality: float | None = None,
    variant: int | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    min_p: float = 0.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    min_tokens: int = 0,
    stop_token_ids: Sequence[int] = (),
    ignore_end_tokens: bool = False,
    json_schema: str | Mapping[str, Any] | None = None,
    regex: str | None = None,
) -> generation_pb2.GenerateRequest:
    """Return the message of a `generate` call; the prompt is a text or a sequence of tokens.

    Budgets are in seconds: `budget_s` for the whole answer, a hard deadline if `hard`,
    `first_token_budget_s` for the first token, `token_budget_s` for the mean time between the
    tokens after the first. `variant` is the id of the variant to run. `logprobs` is the number of
    alternatives to report for each token, 0 to 20, `prompt_logprobs` the same for the prompt.

    `min_p`, the penalties and `logit_bias` (token to bias, -100 to 100) change what is sampled as
    in OpenAI's API. The answer does not end before `min_tokens`; `stop_token_ids` end it as the
    model's end tokens do, which `ignore_end_tokens` ignores. The answer matches `json_schema`, a
    schema or its text (`{"type": "object"}`: any object), or `regex`.

    Raises `ValueError` for both `json_schema` and `regex`. The server checks all other values.
    """
    if json_schema is not None and regex is not None:
        raise ValueError("regex: expected none along with json_schema, got both")
    bias = (logit_bias or {}).items()
    request = generation_pb2.GenerateRequest(
        model_name=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        hard_deadline=hard,
        latency_budget_us=microseconds(budget_s),
        first_token_budget_us=microseconds(first_token_budget_s),
        token_budget_us=microseconds(token_budget_s),
        min_quality=min_quality,
        variant_id=variant,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        logit_bias=[generation_pb2.TokenBias(token_id=token, bias=value) for token, value in bias],
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
        ignore_end_tokens=ignore_end_tokens,
    )
    if json_schema is not None:
        text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
        request.json_schema = text
    if regex is not None:
        request.regex = regex
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.ids.extend(prompt)
    return request


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of a prompt; `logprob` is None for the first one.

    `alternatives` are the (token, logprob) pairs of the most likely tokens in its place.
    """

    token: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]

    @classmethod
    def from_message(cls, message: generation_pb2.PromptToken) -> PromptToken:
        """Return the token in a message."""
        return cls(
            token=message.token_id,
            logprob=message.logprob if message.HasField("logprob") else None,
            alternatives=tuple((top.token_id, top.logprob) for top in message.top_logprobs),
        )


@dataclass(frozen=True, slots=True)
class TextChunk:
    """One token of an answer; `finish` and `accounting` are None except in the last one.

    `logprob` is None and `alternatives`, the (token, logprob) pairs of the most likely tokens, are
    empty unless `logprobs` was set. `prompt` is empty except in the first one of a request with
    `prompt_logprobs`.
    """

    index: int
    token: int
    text: str
    finish: str | None
    accounting: generation_pb2.GenerationAccounting | None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    prompt: tuple[PromptToken, ...] = ()

    @classmethod
    def from_response(cls, response: generation_pb2.GenerateResponse) -> TextChunk:
        """Return the token in a response."""
        ended = response.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED
        return cls(
            index=response.index,
            token=response.token_id,
            text=response.text,
            finish=FINISH_REASONS[response.finish_reason] if ended else None,
            accounting=response.accounting if ended else None,
            logprob=response.logprob if response.HasField("logprob") else None,
            alternatives=tuple((top.token_id, top.logprob) for top in response.top_logprobs),
            prompt=tuple(map(PromptToken.from_message, response.prompt_tokens)),
        )
