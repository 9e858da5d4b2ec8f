"""`/v1/responses`: text in, text out, whole or as events; nothing is stored between requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from ladderstitch.api.openai.answer_so_far import AnswerSoFar
from ladderstitch.api.openai.bodies import ChatRequest
from ladderstitch.api.openai.event_marks import AnswerName
from ladderstitch.api.openai.fields import Flag, Integer, JsonSchema, OpenFields, Text
from ladderstitch.errors import InvalidArgument
from ladderstitch.scheduling.generation import TokenChunk

Body = dict[str, Any]

STATEFUL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
}
"""Options of this interface that are not supported, and their values that change nothing."""
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""The fields of this interface by those of chats."""


class InputPart(BaseModel):
    """A part of the content of a message."""

    type: Literal["input_text", "output_text", "text"]
    text: Text


class InputMessage(BaseModel):
    """A message of the conversation."""

    type: Literal["message"] = "message"
    role: Text
    content: Text | list[InputPart]


class TextFormat(JsonSchema):
    """The format of the answer; the fields of the schema are next to its type."""

    type: Literal["text", "json_object", "json_schema"]


class TextOptions(OpenFields):
    """Options of the answer's text."""

    format: TextFormat | None = None


class ResponseRequest(OpenFields):
    """The body of `/v1/responses`."""

    model: Text
    input: Text | list[InputMessage] = Field(min_length=1)
    instructions: Text | None = None
    max_output_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: Flag | None = None
    text: TextOptions | None = None
    answer_so_far: AnswerSoFar | None = None

    def to_chat(self) -> ChatRequest:
        """Return the chat that this request is.

        Raises `InvalidArgument` for options that would need a state or tools.
        """
        self.check_unsupported()
        for field, value in (self.model_extra or {}).items():
            neutral = STATEFUL.get(field)
            if neutral is not None and value is not None and value not in neutral:
                problem = f"expected none, as responses are not stored, got {value!r:.40}"
                raise InvalidArgument(field, problem)
        messages: list[Body] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        given = self.input
        if isinstance(given, str):
            given = [InputMessage(role="user", content=given)]
        messages += [{"role": m.role, "content": _plain(m.content)} for m in given]
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": messages,
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "stream": self.stream,
                "response_format": self._format(),
                "answer_so_far": self.answer_so_far,
            }
        )

    def _format(self) -> Body | None:
        if self.text is None or self.text.format is None:
            return None
        described = self.text.format
        schema = {"name": described.name, "schema": described.schema_}
        return {"type": described.type, "json_schema": schema}


def _plain(content: str | Sequence[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def rename_field(error: InvalidArgument) -> InvalidArgument:
    """Return an error about a field of a chat as one about a field of this interface."""
    field = NAMES.get(error.field)
    if field is None:
        return error
    return InvalidArgument(field, str(error).removeprefix(f"{error.field}: "))


class ResponseWriter:
    """One response, and the events that announce its parts."""

    def __init__(self, request: ResponseRequest, answer: AnswerName) -> None:
        self._request = request
        self._id, self._item_id = f"resp_{answer.digits}", f"msg_{answer.digits}"
        self._created = answer.created
        self._text: list[str] = []
        self._last: TokenChunk | None = None
        self._number = -1

    def add(self, chunk: TokenChunk) -> None:
        """Append a token to the answer."""
        self._text.append(chunk.text)
        self._last = chunk

    def whole(self) -> Body:
        """Return the response as far as it is known."""
        last = self._last if self._last is not None and self._last.usage is not None else None
        is_cut = last is not None and last.finish == "length"
        status = "in_progress" if last is None else "incomplete" if is_cut else "completed"
        request = self._request
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": request.model,
            "output": [] if last is None else [self._item(status)],
            "parallel_tool_calls": True,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": request.top_p,
            "usage": None if last is None else self._usage(last),
        }

    def replay(self, chunks: Iterable[TokenChunk]) -> None:
        """Take over the tokens that the caller has, and the events before them."""
        for _ in self.begin():
            pass
        for chunk in chunks:
            self.delta(chunk)

    def begin(self) -> Iterator[Body]:
        """Yield the events before the first token; none if they were yielded before."""
        if self._number >= 0:
            return
        yield self._event("response.created", response=self.whole())
        yield self._event("response.in_progress", response=self.whole())
        item = self._item("in_progress") | {"content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._part_event("response.content_part.added", part=self._part(""))

    def delta(self, chunk: TokenChunk) -> Body:
        """Return the event of a token."""
        self.add(chunk)
        return self._part_event("response.output_text.delta", delta=chunk.text, logprobs=[])

    def end(self) -> Iterator[Body]:
        """Yield the events after the last token."""
        text, whole = "".join(self._text), self.whole()
        yield self._part_event("response.output_text.done", text=text, logprobs=[])
        yield self._part_event("response.content_part.done", part=self._part(text))
        item = self._item(whole["status"])
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def _item(self, status: str) -> Body:
        content = [self._part("".join(self._text))]
        described = {"type": "message", "id": self._item_id, "status": status}
        return described | {"role": "assistant", "content": content}

    def _part(self, text: str) -> Body:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _part_event(self, kind: str, **fields: Any) -> Body:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> Body:
        self._number += 1
        return {"type": kind, "sequence_number": self._number} | fields

    def _usage(self, last: TokenChunk) -> Body:
        usage = last.usage
        assert usage is not None, "checked by the caller"
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": last.answer.reused_tokens},
            "output_tokens": usage.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.generated_tokens,
        }
