"""Text to tokens and back, also piece by piece while an answer is being made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ladderstitch.errors import BundleError

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
