# /// script
# dependencies = ["litellm==1.110.2"]
#
# [tool.ladderstitch]
# package = "litellm"
# ///
"""LiteLLM: chats, streams, prompt lists, JSON schema and tools."""

from __future__ import annotations

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would download prices

import litellm

URL, MODEL = os.environ["LADDERSTITCH_HTTP"], os.environ["LADDERSTITCH_TEXT_MODEL"]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "maximum": 30}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}


def ask(**options: object) -> object:
    """Return an answer to a chat."""
    return litellm.completion(
        model=f"openai/{MODEL}",
        api_base=URL,
        api_key="x",
        messages=[{"role": "user", "content": "A pet"}],
        temperature=0.5,
        seed=1,
        **options,
    )


def chat() -> object:
    """Ask for three answers."""
    answer = ask(max_tokens=5, n=3, logprobs=True, top_logprobs=2)
    assert len(answer.choices) == 3
    return f"{answer.usage.completion_tokens} tokens in 3 choices"


def stream() -> object:
    """Stream an answer."""
    return f"{len(list(ask(max_tokens=5, stream=True)))} chunks"


def text() -> object:
    """Complete two prompts."""
    answer = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=URL,
        api_key="x",
        prompt=["one", "two"],
        max_tokens=5,
    )
    assert len(answer.choices) == 2
    return "2 choices"


def schema() -> object:
    """Ask for JSON of a schema."""
    format_ = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}}
    return json.loads(ask(response_format=format_).choices[0].message.content)


def tools() -> object:
    """Let the model call a tool."""
    (call,) = ask(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls
    return json.loads(call.function.arguments)


if __name__ == "__main__":
    print("ok chat:", chat())
    print("ok stream:", stream())
    print("ok prompt list:", text())
    print("ok JSON schema:", schema())
    print("ok tools:", tools())
