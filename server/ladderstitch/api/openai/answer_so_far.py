"""The beginning of an answer that another replica gave, and its tokens as that one sent them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

from ladderstitch.scheduling.generation import (
    GenerationInfo,
    GenerationRequest,
    PromptToken,
    TokenChunk,
)
from ladderstitch.text.scheduler.sequence import answer_text
from ladderstitch.text.tokenizer import TextTokenizer


class AnswerSoFar(BaseModel):
    """The beginning of an answer that another replica gave, as in a `GenerateRequest` of gRPC."""

    model_config = ConfigDict(extra="forbid")

    token_ids: list[Annotated[int, Strict()]] = Field(min_length=1)
    first_token_us: Annotated[int, Strict()] | None = None


def chunks_so_far(request: GenerationRequest, tokenizer: TextTokenizer) -> Iterator[TokenChunk]:
    """Yield the tokens that the caller has as the chunks that another replica made of them."""
    text = answer_text(request, tokenizer)
    info = GenerationInfo((), None, 0.0, 0)
    prompt: tuple[PromptToken, ...] = ()
    if request.prompt_logprobs is not None:
        prompt = tuple(map(PromptToken, request.tokens))
    for index, token in enumerate(request.answered):
        yield TokenChunk(index, token, text.add(token), info, prompt=() if index else prompt)
