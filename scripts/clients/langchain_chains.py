# /// script
# dependencies = ["langchain-openai==1.7.4"]
#
# [tool.ladderstitch]
# package = "langchain-openai"
# ///
"""LangChain: prompt lists, chats, structured output and tools."""

from __future__ import annotations

import os
from typing import Literal

from langchain_core.messages import ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

URL, MODEL = os.environ["LADDERSTITCH_HTTP"], os.environ["LADDERSTITCH_TEXT_MODEL"]


class Pet(BaseModel):
    """A pet."""

    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)


def chat(**options: object) -> ChatOpenAI:
    """Return the chat model."""
    settings = {"temperature": 0.5, "seed": 1, "max_retries": 0} | options
    return ChatOpenAI(base_url=URL, api_key="x", model=MODEL, **settings)


def prompt_list() -> object:
    """Complete two prompts in one request."""
    model = OpenAI(base_url=URL, api_key="x", model=MODEL, max_tokens=5, n=2, best_of=2)
    found = model.generate(["one", "two"])
    assert [len(answers) for answers in found.generations] == [2, 2]
    return f"{len(found.generations)} prompts, 2 answers each"


def invoke() -> object:
    """Ask for one answer."""
    answer = chat(max_tokens=5).invoke("Hello")
    assert answer.usage_metadata["output_tokens"] == 5
    return "5 tokens"


def stream() -> object:
    """Stream an answer."""
    chunks = list(chat(max_tokens=5, stream_usage=True).stream("Hello"))
    assert chunks[-1].usage_metadata or any(chunk.usage_metadata for chunk in chunks)
    return f"{len(chunks)} chunks"


def structured(method: str) -> object:
    """Ask for an object of a class."""
    answer = chat().with_structured_output(Pet, method=method).invoke("A pet, as JSON")
    assert isinstance(answer, Pet), answer
    return answer


def tools() -> object:
    """Let the model call a tool, and give it the result."""
    model = chat().bind_tools([Pet], tool_choice="required")
    answer = model.invoke("A pet")
    (call,) = answer.tool_calls
    Pet(**call["args"])
    result = ToolMessage("noted", tool_call_id=call["id"])
    after = chat(max_tokens=5).bind_tools([Pet]).invoke([("user", "A pet"), answer, result])
    assert after.response_metadata["finish_reason"] in ("length", "stop", "tool_calls")
    return call["args"]


if __name__ == "__main__":
    print("ok prompt lists:", prompt_list())
    print("ok chat:", invoke())
    print("ok stream:", stream())
    for method in ("json_schema", "function_calling"):
        print(f"ok structured output by {method}:", structured(method))
    print("ok tools:", tools())
