"""The text of a growing answer, which ends before a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from ladderstitch.text.tokenizer import TextStream


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
