"""The requests of OpenAI's API, and their translation to generation requests.

An option that is not supported is rejected if it would change the answer. Fields that do not change
the answer (`user`, `metadata`) and unknown ones are ignored, as other servers of this API do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ladderstitch.api.deadlines import (
    LATENCY_BUDGET_KEY,
    TPOT_BUDGET_KEY,
    TTFT_BUDGET_KEY,
    seconds_from_ms,
)
from ladderstitch.api.native.generation import MAX_STOPS
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import TextModel
from ladderstitch.scheduling.requests import GenerationRequest, Sampling, TokenBudget
from ladderstitch.text.tokenizer import ChatTurn, render_chat

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "repetition_detection": (),
    "min_p": (0,),
    "typical_p": (1,),
    "watermarking": (False,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "max_completion_tokens": (),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "structural_tag": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "reasoning_effort": ("none",),
    "thinking_token_budget": (-1,),
    "verbosity": ("medium",),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "prompt_embeds": (),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_prompt_text": (False,),
    "stream_interval": (1,),
    "stream_options.continuous_usage_stats": (False,),
    "priority": (0,),
    "cache_salt": (),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "vllm_xargs": ({},),
    "messages.tool_calls": ([],),
    "messages.tool_call_id": (),
    "messages.function_call": (),
    "messages.audio": (),
}
"""The options of OpenAI's API and of vLLM that are not supported.

Each has the values that change nothing: these and null are accepted.
"""

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions; the answer of a chat may fill the context."""

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
    min_quality: float = Field(0.0, ge=0, le=1)
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

    def sampling(self) -> Sampling:
        """Return the sampling parameters; raises `InvalidArgument` for a negative seed."""
        if self.seed is not None and self.seed < 0:
            raise InvalidArgument("seed", f"expected 0 or more, got {self.seed}")
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=0 if self.top_k in (None, -1) else self.top_k,  # vLLM's default is -1
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
        )


class CompletionRequest(SamplingFields):
    """The body of `/v1/completions`."""

    prompt: Text | list[int] | list[Text] | list[list[int]]
    logprobs: int | None = None

    def prompt_tokens(self, model: TextModel) -> tuple[int, ...]:
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
    text: Text = ""


class ChatMessage(OpenFields):
    """A message of a chat."""

    role: Text
    content: Text | list[TextPart] | None = None

    def to_chat_turn(self) -> ChatTurn:
        """Return the message with plain text; raises `InvalidArgument` for other content."""
        if isinstance(self.content, list):
            if wrong := [part.type for part in self.content if part.type != "text"]:
                raise InvalidArgument(
                    "messages", f"expected content of type text, got {wrong[0]!r:.40}"
                )
            return {"role": self.role, "content": "".join(part.text for part in self.content)}
        return {"role": self.role, "content": self.content or ""}


class ChatRequest(SamplingFields):
    """The body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_special_tokens: Literal[False] | None = None  # in a chat, the template adds them

    def check_unsupported(self, path: str = "") -> None:
        """Raise `InvalidArgument` if an unsupported option would change the answer."""
        super().check_unsupported(path)
        for message in self.messages:
            message.check_unsupported("messages.")

    def prompt_tokens(self, model: TextModel) -> tuple[int, ...]:
        """Return the tokens of the chat, rendered by the model's chat template.

        Raises `InvalidArgument` if the model has no template, or if its template raises an error.
        """
        turns = [message.to_chat_turn() for message in self.messages]
        text = render_chat(model.bundle.manifest.chat_template, turns)
        return model.tokenise("messages", text)

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


def build_generation_request(
    body: CompletionRequest | ChatRequest,
    model: TextModel,
    headers: Mapping[str, str],
    arrival: float,
    tenant: str,
) -> GenerationRequest:
    """Return the request for the scheduler.

    Raises `InvalidArgument` that names the wrong field or header.
    """
    body.check_unsupported()
    tokens = body.prompt_tokens(model)
    limit_s = _read_budget(headers, HARD_DEADLINE_KEY)
    answer_s = min(_read_budget(headers, LATENCY_BUDGET_KEY), limit_s)
    return GenerationRequest(
        tokens=tokens,
        arrival=arrival,
        max_tokens=body.max_new_tokens(model.scheduler.max_tokens - len(tokens)),
        sampling=body.sampling(),
        stop=body.stop_texts(),
        hard_deadline=arrival + limit_s,
        budget=TokenBudget(
            _read_budget(headers, TTFT_BUDGET_KEY),
            _read_budget(headers, TPOT_BUDGET_KEY),
            answer_s,
        ),
        min_quality=body.min_quality,
        variant=body.variant_id,
        logprobs=body.num_logprobs,
        tenant=tenant,
    )


def _read_budget(headers: Mapping[str, str], key: str) -> float:
    """Return the seconds of a budget in the headers, or infinity without one."""
    return seconds_from_ms(key, headers[key]) if key in headers else math.inf
