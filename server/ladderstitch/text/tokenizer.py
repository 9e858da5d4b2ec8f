"""Text to tokens and back, also piece by piece while an answer is being made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Never, TypedDict

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ladderstitch.errors import BundleError, InvalidArgument

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer:
    """A bundle's `tokenizer.json`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Raises `BundleError` for a file that is missing or is no tokenizer."""
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing more specific
            raise BundleError(f"{path}: {error}") from error

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


class TextStream:
    """The text of a growing answer: `add` returns what a new token adds to it.

    A character may take several tokens; nothing is returned until it is whole.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._settled = 0  # tokens whose text is out
        self._context = 0  # a little before, since a token's text may depend on its neighbours

    def add(self, token: int) -> str:
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._context : self._settled])
        now = self._tokenizer.decode(self._tokens[self._context :])
        if now.endswith(UNFINISHED):
            return ""
        return self._take(before, now)

    def finish(self) -> str:
        """What is left, even if its last character is not whole."""
        before = self._tokenizer.decode(self._tokens[self._context : self._settled])
        return self._take(before, self._tokenizer.decode(self._tokens[self._context :]))

    def _take(self, before: str, now: str) -> str:
        self._context, self._settled = self._settled, len(self._tokens)
        return now[len(before) :]


class StoppableText:
    """Text that ends before a stop text; what may be the beginning of one is held back."""

    def __init__(self, stream: TextStream, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stream, self._stop, self._held = stream, stop, ""

    def add(self, token: int) -> str:
        """What a token adds to the text; empty while that cannot be known."""
        return self._release(self._stream.add(token))

    def finish(self) -> str:
        """What was held back, when no more will come; nothing after a stop."""
        if self.stopped:
            return ""
        out = self._release(self._stream.finish())
        rest, self._held = ("" if self.stopped else self._held), ""
        return out + rest

    def _release(self, fresh: str) -> str:
        self._held += fresh
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        split = len(self._held) - keep
        out, self._held = self._held[:split], self._held[split:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class ChatTurn(TypedDict):
    role: str
    content: str


class TemplateRefused(TemplateError):
    """A template does not take these messages, and says why."""


def _refuse(message: str) -> Never:
    raise TemplateRefused(message)


def render_chat(template: str | None, messages: Sequence[ChatTurn]) -> str:
    """The prompt that the model's next turn follows.

    Templates are Jinja in a sandbox, as they come with checkpoints. Raises `InvalidArgument` for messages
    that a template refuses, and for a model without one.
    """
    if template is None:
        raise InvalidArgument("messages", "this model has no chat template; use completions")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, bos_token="", eos_token=""
        )
    except (TemplateError, TypeError) as error:
        raise InvalidArgument(
            "messages", f"the model's chat template refuses them: {error}"
        ) from error
