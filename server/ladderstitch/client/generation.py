"""Prompts as messages, and the pieces of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ladderstitch.v1 import generation_pb2

FINISH = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class TextPiece:
    """One token of an answer; `finish` and `accounting` are set in the last one.

    `logprob` and `alternatives` (token, logprob) are there if they were asked for.
    """

    index: int
    token: int
    text: str
    finish: str | None
    accounting: generation_pb2.GenerationAccounting | None
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, response: generation_pb2.GenerateResponse) -> TextPiece:
        ended = response.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED
        return cls(
            index=response.index,
            token=response.token_id,
            text=response.text,
            finish=FINISH[response.finish_reason] if ended else None,
            accounting=response.accounting if ended else None,
            logprob=response.logprob if response.HasField("logprob") else None,
            alternatives=tuple((top.token_id, top.logprob) for top in response.top_logprobs),
        )


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
    stitch: int | None = None,
    logprobs: int | None = None,
) -> generation_pb2.GenerateRequest:
    """The message of a `generate` call; the prompt is text or tokens.

    `budget_s` is for the whole answer, `token_budget_s` for the mean time between tokens after the
    first; `stitch` pins a path of the model.
    """
    request = generation_pb2.GenerateRequest(
        model_name=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        hard_deadline=hard,
        latency_budget_us=_microseconds(budget_s),
        first_token_budget_us=_microseconds(first_token_budget_s),
        token_budget_us=_microseconds(token_budget_s),
        min_quality=min_quality,
        stitch_id=stitch,
        logprobs=logprobs,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.ids.extend(prompt)
    return request


def _microseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(1e6 * seconds)
