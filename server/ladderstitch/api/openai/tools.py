"""Tools that a chat may call: their definitions, and the formats of calls.

The format is that of the model's chat template: `<tool_call>{json}</tool_call>` (Hermes, Qwen),
`[TOOL_CALLS] [{json}, ...]` (Mistral) or a JSON object with `parameters` (Llama 3). If a call is
required, the beginning of the format is part of the prompt, and a JSON schema holds for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from ladderstitch.api.openai.schemas import close_objects
from ladderstitch.errors import InvalidArgument
from ladderstitch.text.chat_template import ChatTemplate

MAX_TOOLS = 128

ToolName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(BaseModel):
    """A function that a chat may call."""

    model_config = ConfigDict(extra="allow")

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(BaseModel):
    """The name of a function."""

    name: str


class NamedTool(BaseModel):
    """The choice of one tool."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(BaseModel):
    """The call of a function in an earlier answer; the arguments are JSON."""

    name: str
    arguments: str


class ToolCallFields(BaseModel):
    """A call of a tool in an earlier answer."""

    model_config = ConfigDict(extra="allow")

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def to_template(self) -> dict[str, Any]:
        """Return the call with its arguments as an object, which templates expect."""
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The format of calls: text before each, or before all of them, and after each."""

    name: str
    begin: str
    end: str = ""
    arguments: str = "arguments"
    """The key of the arguments."""
    is_list: bool = False

    def schema(self, tools: Sequence[Tool], *, parallel: bool) -> str:
        """Return the JSON schema of a call of one of the tools, or of a list of calls."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    self.arguments: close_objects(
                        "tools", tool.function.parameters or {"type": "object"}
                    ),
                },
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        call = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if not self.is_list:
            return json.dumps(call)
        limits = {"minItems": 1} if parallel else {"minItems": 1, "maxItems": 1}
        return json.dumps({"type": "array", "items": call} | limits)


HERMES = ToolFormat("Hermes", "<tool_call>", "</tool_call>")
MISTRAL = ToolFormat("Mistral", "[TOOL_CALLS]", is_list=True)
LLAMA3 = ToolFormat("Llama 3", "<|python_tag|>", arguments="parameters")


def find_format(template: str) -> ToolFormat | None:
    """Return the format of calls of a chat template; None if it has no tools or another format."""
    if "tools" not in template or "<function=" in template or "[ARGS]" in template:
        return None
    if HERMES.begin in template:
        return HERMES
    if MISTRAL.begin in template:
        return MISTRAL
    return LLAMA3 if LLAMA3.begin in template or '"parameters"' in template else None


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How an answer may call tools."""

    format: ToolFormat
    tools: tuple[Tool, ...]
    is_forced: bool
    """Whether the answer must be a call."""
    parallel: bool
    names: tuple[str, ...]
    """The tools that the answer may call."""

    @property
    def definitions(self) -> list[dict[str, Any]]:
        """The tools as a chat template reads them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    def beginning(self) -> str:
        """The text with which an answer that must be a call begins; the prompt has it."""
        if not self.is_forced or self.format is LLAMA3:
            return ""
        return self.format.begin + ("\n" if self.format is HERMES else "")

    @property
    def schema(self) -> str | None:
        """The JSON schema of an answer that must be a call; None for another one."""
        if not self.is_forced:
            return None
        chosen = [tool for tool in self.tools if tool.function.name in self.names]
        return self.format.schema(chosen, parallel=self.parallel)


def tool_use(
    template: ChatTemplate | None,
    tools: Sequence[Tool],
    choice: ToolChoice | None,
    *,
    parallel: bool,
    was_used: bool,
) -> ToolUse | None:
    """Return how an answer may call tools; None if it may not.

    `was_used` says whether earlier messages have calls or their results. Raises `InvalidArgument`
    if the tools or the choice are not valid, or if the template has no tools.
    """
    names = tuple(tool.function.name for tool in tools)
    if len(tools) > MAX_TOOLS:
        raise InvalidArgument("tools", f"expected at most {MAX_TOOLS}, got {len(tools)}")
    if len(set(names)) < len(names):
        raise InvalidArgument("tools", "expected different names, got one twice")
    if choice not in (None, "none", "auto") and not tools:
        raise InvalidArgument("tool_choice", "expected tools along with it, got none")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        known = ", ".join(names[:5])
        raise InvalidArgument(
            "tool_choice", f"expected one of {known}, got {choice.function.name!r:.70}"
        )
    is_used = bool(tools) and choice != "none"
    if template is None or not (is_used or was_used):
        return None  # without a template, the chat itself is rejected
    found = find_format(template.source)
    if found is None:
        problem = "expected none, as this model's chat template has no tools in a known format"
        raise InvalidArgument("tools" if is_used else "messages", f"{problem}, got some")
    if not is_used:
        return None
    if isinstance(choice, NamedTool):
        names = (choice.function.name,)
    return ToolUse(found, tuple(tools), choice not in (None, "auto"), parallel, names)
