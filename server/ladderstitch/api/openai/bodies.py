"""The bodies of completion and chat requests, and the prompts that they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from ladderstitch.api.openai.fields import (
    MAX_CHOICES,
    Flag,
    Integer,
    OpenFields,
    SamplingFields,
    Text,
)
from ladderstitch.api.openai.tools import Tool, ToolCallFields, ToolChoice, ToolUse, tool_use
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import TextModel
from ladderstitch.scheduling.generation import MAX_LOGPROBS
from ladderstitch.scheduling.sampling import check_range
from ladderstitch.text.chat_template import Message

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions; the answer of a chat may fill the context."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request: its tokens, and its text if a caller may want to read it."""

    tokens: tuple[int, ...]
    text: str = ""


class CompletionRequest(SamplingFields):
    """The body of `/v1/completions`."""

    prompt: Text | list[int] | list[Text] | list[list[int]]
    logprobs: int | None = None
    echo: Flag | None = None
    best_of: Integer | None = Field(None, ge=1, le=MAX_CHOICES)

    async def read_prompts(self, model: TextModel) -> list[Prompt]:
        """Return the prompts.

        Raises `InvalidArgument` for a prompt that is too long, or for too many of them.
        """
        prompts: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if all(isinstance(part, int) for part in prompts):
            prompts = [prompts]  # one prompt of tokens, maybe of none
        if len(prompts) > MAX_CHOICES:
            raise InvalidArgument(
                "prompt", f"expected at most {MAX_CHOICES} prompts, got {len(prompts)}"
            )
        return [self._read_prompt(prompt, model) for prompt in prompts]

    def _read_prompt(self, prompt: Any, model: TextModel) -> Prompt:
        if isinstance(prompt, str):
            return Prompt(model.tokenise("prompt", prompt), prompt)
        tokens = tuple(prompt)
        model.check_prompt_length(tokens)
        if not self.echo:
            return Prompt(tokens)
        known = range(model.bundle.manifest.config.vocab_size)
        return Prompt(tokens, model.scheduler.tokenizer.decode([t for t in tokens if t in known]))

    @property
    def num_candidates(self) -> int:
        """The number of generations of each prompt."""
        best_of, n = self.best_of or self.n or 1, self.n or 1
        if best_of < n:
            raise InvalidArgument("best_of", f"expected at least n, which is {n}, got {best_of}")
        if best_of > n and self.stream:
            raise InvalidArgument("best_of", f"expected n ({n}) in a stream, got {best_of}")
        return best_of

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives to report for each token; None for no log probabilities."""
        return self.logprobs

    @property
    def only_echo(self) -> bool:
        """Whether the prompt alone is asked for."""
        return bool(self.echo) and self.max_tokens == 0

    def max_new_tokens(self, available: int) -> int:
        """Return the maximum number of tokens to generate; `available` ones fit the context."""
        if self.only_echo:
            return 1
        if self.max_tokens is not None:
            return self.max_tokens
        return min(DEFAULT_COMPLETION_TOKENS, available)

    def tool_use(self, model: TextModel) -> None:
        """Return nothing: completions have no tools."""


class TextPart(BaseModel):
    """A part of a chat message's content."""

    type: str
    text: Text | None = None


class ChatMessage(OpenFields):
    """A message of a chat."""

    role: Text
    content: Text | list[TextPart] | None = None
    tool_calls: list[ToolCallFields] | None = None
    tool_call_id: Text | None = None

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
        if self.tool_calls:
            others["tool_calls"] = [call.to_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            others["tool_call_id"] = self.tool_call_id
        return others | {"role": self.role, "content": content}


class ChatRequest(SamplingFields):
    """The body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Flag | None = None
    add_special_tokens: Literal[False] | None = None  # in a chat, the template adds them
    allow_control_tokens: bool | None = None

    def check_unsupported(self, path: str = "") -> None:
        """Raise `InvalidArgument` if an unsupported option would change the answer."""
        super().check_unsupported(path)
        for message in self.messages:
            message.check_unsupported("messages.")

    def tool_use(self, model: TextModel) -> ToolUse | None:
        """Return how the answer may call tools; None if it may not.

        Raises `InvalidArgument` if the model's chat template has no tools.
        """
        was_used = any(message.tool_calls or message.tool_call_id for message in self.messages)
        used = tool_use(
            model.chat_template,
            self.tools or [],
            self.tool_choice,
            parallel=self.parallel_tool_calls is not False,
            was_used=was_used,
        )
        text_only = self.response_format is None or self.response_format.type == "text"
        if used is not None and not text_only:
            raise InvalidArgument("response_format", "expected text along with tools, got JSON")
        return used

    @property
    def num_candidates(self) -> int:
        """The number of generations of the prompt."""
        return self.n or 1

    async def read_prompts(self, model: TextModel) -> list[Prompt]:
        """Return the chat as one prompt, rendered by the model's chat template.

        Raises `InvalidArgument` if the model has no template, or if its template raises an error.
        """
        used = self.tool_use(model)
        messages = [message.to_template() for message in self.messages]
        tokens = await model.tokenise_chat(
            messages,
            allow_control_tokens=bool(self.allow_control_tokens),
            tools=used.definitions if used else None,
            beginning=used.beginning if used else "",
        )
        return [Prompt(tokens)]

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives to report for each token; None for no log probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidArgument("top_logprobs", "expected logprobs to be true along with it")
        if self.top_logprobs is not None:
            check_range("top_logprobs", self.top_logprobs, 0, MAX_LOGPROBS)
        return (self.top_logprobs or 0) if self.logprobs else None

    def max_new_tokens(self, available: int) -> int:
        """Return the maximum number of tokens to generate; `available` ones fit the context."""
        limits = (self.max_completion_tokens, self.max_tokens, available)
        return next(limit for limit in limits if limit is not None)
