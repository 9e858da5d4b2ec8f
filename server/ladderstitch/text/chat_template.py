"""A conversation as one prompt, by the template that comes with a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Never, TypedDict

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ladderstitch.errors import BadInput


class Message(TypedDict):
    role: str
    content: str


class TemplateRefused(TemplateError):
    """A template does not take these messages, and says why."""


def _refuse(message: str) -> Never:
    raise TemplateRefused(message)


def render_chat(template: str | None, messages: Sequence[Message]) -> str:
    """The prompt that the model's next turn follows.

    Templates are Jinja in a sandbox, as they come with checkpoints. Raises `BadInput` for messages
    that a template refuses, and for a model without one.
    """
    if template is None:
        raise BadInput("messages", "this model has no chat template; use completions")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, bos_token="", eos_token=""
        )
    except (TemplateError, TypeError) as error:
        raise BadInput("messages", f"the model's chat template refuses them: {error}") from error
