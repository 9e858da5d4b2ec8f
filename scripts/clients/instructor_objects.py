# /// script
# dependencies = ["instructor==1.17.0"]
#
# [tool.ladderstitch]
# package = "instructor"
# ///
"""Instructor: objects of a class by tools and by JSON schema."""

from __future__ import annotations

import os
from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field

URL, MODEL = os.environ["LADDERSTITCH_HTTP"], os.environ["LADDERSTITCH_TEXT_MODEL"]


class Pet(BaseModel):
    """A pet."""

    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)


def extract(mode: instructor.Mode) -> object:
    """Ask for an object of a class."""
    own = openai.OpenAI(base_url=URL, api_key="x", max_retries=0)
    pet = instructor.from_openai(own, mode=mode).chat.completions.create(
        model=MODEL,
        response_model=Pet,
        messages=[{"role": "user", "content": "A pet"}],
        temperature=0.5,
        seed=1,
        max_retries=1,
    )
    assert isinstance(pet, Pet)
    return pet


if __name__ == "__main__":
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        print(f"ok {mode.name}:", extract(mode))
