"""Calls of tools in answers: in each format, however the text arrives, and text that is none."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from ladderstitch.api.openai.tool_calls import ToolCallReader
from ladderstitch.api.openai.tools import (
    HERMES,
    LLAMA3,
    MISTRAL,
    Tool,
    ToolCallFields,
    ToolFormat,
    ToolUse,
    find_format,
)

TOOLS = tuple(
    Tool.model_validate({"type": "function", "function": {"name": name}}) for name in ("f", "g")
)
F = {"name": "f", "arguments": {"a": "</tool_call", "b": [1, {}]}}
G = {"name": "g", "arguments": {}}
LLAMA_F = {"name": "f", "parameters": F["arguments"]}


def use_of(format_: ToolFormat, *, is_forced: bool = False) -> ToolUse:
    """Return the use of two tools."""
    return ToolUse(format_, TOOLS, is_forced, True, ("f", "g"))


def read(use: ToolUse, text: str, size: int) -> tuple[str, list[tuple[str, Any]]]:
    """Return content and calls of a text that arrives in pieces of a size."""
    reader, content, calls = ToolCallReader(use), "", []
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    for found, new in [*(reader.add(part) for part in parts), reader.finish()]:
        content += found
        calls += [(call.name, json.loads(call.arguments)) for call in new]
        assert all(len(call.id) == 9 and call.id.isalnum() for call in new)
    return content, calls


CASES: list[tuple[ToolFormat, str, str, list[str]]] = [
    (HERMES, f"<tool_call>\n{json.dumps(F)}\n</tool_call>", "", ["f"]),
    (
        HERMES,
        f"so:<tool_call>{json.dumps(F)}</tool_call>\n<tool_call>{json.dumps(G)}</tool_call>!",
        "so:\n!",
        ["f", "g"],
    ),
    (HERMES, f"<tool_call>{json.dumps(F)}", "", ["f"]),  # the end token came first
    (HERMES, "a < b, <tool_cal", "a < b, <tool_cal", []),
    (HERMES, "<tool_call>{</tool_call> x", "<tool_call>{</tool_call> x", []),
    (HERMES, '<tool_call>{"name": "h"}</tool_call>', '<tool_call>{"name": "h"}</tool_call>', []),
    (HERMES, "<tool_call>[", "<tool_call>[", []),
    (HERMES, '{"name": "f"}', '{"name": "f"}', []),
    (MISTRAL, f"[TOOL_CALLS] [{json.dumps(F)}, {json.dumps(G)}]", "", ["f", "g"]),
    (MISTRAL, f"ok[TOOL_CALLS]{json.dumps(G)}", "ok", ["g"]),
    (MISTRAL, "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    (LLAMA3, json.dumps(LLAMA_F), "", ["f"]),
    (LLAMA3, f"<|python_tag|>{json.dumps(LLAMA_F)}; {json.dumps(LLAMA_F)}", "", ["f", "f"]),
    (LLAMA3, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA3, 'a set {"name": "f"}', 'a set {"name": "f"}', []),
    (LLAMA3, "<|python_tag|>print()", "<|python_tag|>print()", []),
]


@pytest.mark.parametrize(("format_", "text", "content", "names"), CASES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_read_however_the_text_arrives(
    format_: ToolFormat, text: str, content: str, names: list[str], size: int
) -> None:
    found, calls = read(use_of(format_), text, size)
    assert found == content
    assert [name for name, _ in calls] == names
    assert all(arguments in ({}, F["arguments"]) for _, arguments in calls)


@pytest.mark.parametrize("format_", [HERMES, MISTRAL, LLAMA3])
def test_forced_call_needs_no_marker(format_: ToolFormat) -> None:
    use = use_of(format_, is_forced=True)
    call = {"name": "f", format_.arguments: {"a": 1}}
    value: Any = [call] if format_.is_list else call
    assert use.schema is not None
    jsonschema.validate(value, json.loads(use.schema))
    for wrong in ({}, {"name": "h", format_.arguments: {}}, {"name": "f"}, [], [wrong_of(call)]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, json.loads(use.schema))
    assert read(use, json.dumps(value), 2) == ("", [("f", {"a": 1})])
    assert read(use, json.dumps(value)[:-3], 2)[1] == []
    assert use.beginning.strip() in ("", format_.begin)


def wrong_of(call: dict[str, Any]) -> dict[str, Any]:
    """Return a call with a field too many."""
    return call | {"more": 1}


@pytest.mark.parametrize(
    ("template", "format_"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{{ tools }}[TOOL_CALLS]", MISTRAL),
        ('{{ tools }}{"name": function name, "parameters": ...}', LLAMA3),
        ("{{ tools }}<|python_tag|>", LLAMA3),
        ("{{ messages }}<tool_call>", None),
        ("{{ tools }}", None),
        ("{{ tools }}<tool_call><function=f>", None),
        ("{{ tools }}[TOOL_CALLS]f[ARGS]{}", None),
    ],
)
def test_format_is_that_of_the_template(template: str, format_: ToolFormat | None) -> None:
    assert find_format(template) is format_


def test_forced_arguments_are_the_declared_ones() -> None:
    pet = {"type": "object", "properties": {"properties": {"type": "string"}}}
    free = {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}}
    parameters = {
        "type": "object",
        "$defs": {"pet": pet},
        "properties": {"pets": {"type": "array", "items": {"$ref": "#/$defs/pet"}}, "free": free},
    }
    function = {"name": "f", "parameters": parameters}
    tool = Tool.model_validate({"type": "function", "function": function})
    schema = json.loads(HERMES.schema([tool], parallel=False))["properties"]["arguments"]
    jsonschema.validate({"pets": [{"properties": "x"}], "free": {"a": 1, "b": 2}}, schema)
    for wrong in ({"more": 1}, {"pets": [{"kind": "x"}]}, {"free": {"b": "x"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
    assert tool.function.parameters == parameters


@pytest.mark.parametrize("arguments", ["[" * 200_000, "{", '{"a":' * 200_000])
def test_earlier_call_with_arguments_that_are_no_json_keeps_their_text(arguments: str) -> None:
    fields = {"function": {"name": "f", "arguments": arguments}}
    call = ToolCallFields.model_validate(fields).to_template()
    assert call["function"] == {"name": "f", "arguments": arguments}
