"""Prompts of every protocol: text to tokens, and what is too long."""

from __future__ import annotations

from ladderstitch.errors import BadInput
from ladderstitch.hosting.registry import HostedGenerator

DEFAULT_MAX_TOKENS = 128
MAX_STOPS = 16
MAX_CHARACTERS_A_TOKEN = 64
"""Longer texts are refused before they are tokenised, on the event loop."""


def tokenise(text: str, model: HostedGenerator, field: str) -> tuple[int, ...]:
    """A prompt's tokens; raises `BadInput` for one that is too long."""
    most = MAX_CHARACTERS_A_TOKEN * model.max_prompt_tokens
    if len(text) > most:
        raise BadInput(field, f"expected at most {most} characters, got {len(text)}")
    return fitting(tuple(model.generator.tokenizer.encode(text)), model)


def fitting(tokens: tuple[int, ...], model: HostedGenerator) -> tuple[int, ...]:
    """The tokens; raises `BadInput` if a prompt may not have so many."""
    if len(tokens) > model.max_prompt_tokens:
        raise BadInput(
            "prompt", f"expected at most {model.max_prompt_tokens} tokens, got {len(tokens)}"
        )
    return tokens
