"""Conversion between text and tokens: whole, incremental, with stop strings, and chat prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Never, TypedDict

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ladderstitch.errors import BundleError, InvalidArgument

INCOMPLETE_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""The tokenizer decodes the first tokens of a character that takes several to this."""


class TextTokenizer:
    """The tokenizer of a bundle, read from `tokenizer.json`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Return the tokenizer of a file.

        Raises `BundleError` if the file is missing or is not a tokenizer.
        """
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing more specific
            raise BundleError(f"{path}: {error}") from error

    @property
    def size(self) -> int:
        """The number of tokens in the vocabulary."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids; special tokens have none."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


class TextStream:
    """An incremental decoder for the tokens of one answer.

    A character may take several tokens; its text is returned when it is complete.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._num_emitted = 0  # tokens whose text has been returned
        # Decoding starts a few tokens earlier: a token's text may depend on its neighbours.
        self._context_start = 0

    def add(self, token: int) -> str:
        """Return the text that a new token completes, which may be empty."""
        self._tokens.append(token)
        before = self._emitted_text()
        now = self._tokenizer.decode(self._tokens[self._context_start :])
        if now.endswith(INCOMPLETE_CHARACTER):
            return ""
        return self._emit(before, now)

    def finish(self) -> str:
        """Return the text not yet returned, even if its last character is incomplete."""
        before = self._emitted_text()
        return self._emit(before, self._tokenizer.decode(self._tokens[self._context_start :]))

    def _emitted_text(self) -> str:
        return self._tokenizer.decode(self._tokens[self._context_start : self._num_emitted])

    def _emit(self, before: str, now: str) -> str:
        self._context_start, self._num_emitted = self._num_emitted, len(self._tokens)
        return now[len(before) :]


class StoppableText:
    """The text of an answer up to the first stop string.

    Text that may be the beginning of a stop string is held back until more tokens decide.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stream, self._stop, self._held = stream, stop, ""

    def add(self, token: int) -> str:
        """Return the text that a new token releases; empty while a stop string is possible."""
        return self._release(self._stream.add(token))

    def finish(self) -> str:
        """Return the text held back, after the last token; nothing after a stop string."""
        if self.stopped:
            return ""
        out = self._release(self._stream.finish())
        rest, self._held = ("" if self.stopped else self._held), ""
        return out + rest

    def _release(self, new: str) -> str:
        self._held += new
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
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class ChatTurn(TypedDict):
    """One message of a conversation."""

    role: str
    content: str


class TemplateRejection(TemplateError):
    """An error that a chat template raises for messages it does not support."""


def _reject(message: str) -> Never:
    raise TemplateRejection(message)


def render_chat(template: str | None, messages: Sequence[ChatTurn]) -> str:
    """Return the prompt after which the model writes the next message of a conversation.

    Templates are Jinja, as they come with checkpoints, and run in a sandbox. Raises
    `InvalidArgument` if the template rejects the messages or the model has no template.
    """
    if template is None:
        raise InvalidArgument("messages", "this model has no chat template; use completions")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _reject
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, bos_token="", eos_token=""
        )
    except (TemplateError, TypeError) as error:
        raise InvalidArgument(
            "messages", f"the model's chat template rejects them: {error}"
        ) from error
