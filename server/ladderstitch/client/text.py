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
    """One token of an answer; `finish` and `accounting` are set in the last one."""

    index: int
    token: int
    text: str
    finish: str | None
    accounting: generation_pb2.GenerationAccounting | None

    @classmethod
    def of(cls, response: generation_pb2.GenerateResponse) -> TextPiece:
        ended = response.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED
        return cls(
            index=response.index,
            token=response.token_id,
            text=response.text,
            finish=FINISH[response.finish_reason] if ended else None,
            accounting=response.accounting if ended else None,
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
) -> generation_pb2.GenerateRequest:
    """The message of a `generate` call; the prompt is text or tokens."""
    request = generation_pb2.GenerateRequest(
        model_name=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        hard_deadline=hard,
    )
    if budget_s is not None:
        request.latency_budget_us = round(1e6 * budget_s)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokens.ids.extend(prompt)
    return request
