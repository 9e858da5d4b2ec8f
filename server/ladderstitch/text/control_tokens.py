"""Control tokens of a chat template in the texts of a chat, where they are plain text.

Two characters for private use mark a control token in a text before the template is rendered. The
mechanism is that of `sanitize_control_tokens` in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

START, END = "\U000f0000", "\U000f0001"
"""Marks before and after a control token that is plain text."""

_MARKED = re.compile(f"{START}([^{START}{END}]*){END}|[{START}{END}]")


def find_control_tokens(added_tokens: Mapping[str, bool], literals: str) -> list[str]:
    """Return the tokens that a chat template structures a chat with.

    `added_tokens` says whether each is special; `literals` are the template's own texts. Tokens
    that are not special control a chat only if the template writes them: tokenizers add common
    texts as well, such as runs of spaces.
    """
    found = (text for text, special in added_tokens.items() if special or text in literals)
    return [text for text in found if text.strip()]


class ControlTokens:
    """The control tokens of a chat template, to be marked in the messages of chats."""

    def __init__(self, tokens: Sequence[str]) -> None:
        longest_first = sorted(tokens, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._pattern = re.compile(pattern, re.IGNORECASE)  # templates may change the case
        self._starts = _proper_prefixes(tokens)

    def mark(self, value: Any) -> Any:
        """Return a JSON value whose texts have marks around control tokens.

        A text that ends with the beginning of a control token gets a mark at its end: the template
        may write the rest of the token after it.
        """
        if isinstance(value, str):
            text = value.replace(START, "").replace(END, "")
            marked = self._pattern.sub(f"{START}\\g<0>{END}", text)
            return marked + END if marked.lower().endswith(self._starts) else marked
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        return value


def _proper_prefixes(tokens: Iterable[str]) -> tuple[str, ...]:
    """Return the beginnings of tokens that look like markup: `<|im_end|`, but not `en` of `end`."""
    markup = [token.lower() for token in tokens if not token[0].isalnum()]
    return tuple({token[:length] for token in markup for length in range(1, len(token))})


def split_marked(text: str) -> list[tuple[str, bool]]:
    """Return the pieces of a marked text, and whether each is plain text: the first is not.

    A template may separate the marks of a token, by splitting a text; a lone mark only separates
    the text before it from that after it.
    """
    pieces, at = [], 0
    for match in _MARKED.finditer(text):
        pieces.append((text[at : match.start()], False))
        pieces.append((match[1] or "", True))
        at = match.end()
    pieces.append((text[at:], False))
    return [pieces[0], *(piece for piece in pieces[1:] if piece[0])]
