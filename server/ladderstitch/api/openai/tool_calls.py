"""The calls of tools in an answer, which are read as its text arrives."""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from typing import Any

from ladderstitch.api.openai.tools import LLAMA3, ToolUse

ID_CHARACTERS = 9
"""Characters of the id of a call; templates of Mistral accept no other number."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an answer makes; the arguments are JSON."""

    name: str
    arguments: str
    id: str

    def to_json(self, index: int | None = None) -> dict[str, Any]:
        """Return the call for a message; with its `index` for a chunk of a stream."""
        function = {"name": self.name, "arguments": self.arguments}
        call = {"id": self.id, "type": "function", "function": function}
        return call if index is None else {"index": index} | call


class ToolCallReader:
    """The separation of one answer's text into its content and its calls."""

    def __init__(self, use: ToolUse) -> None:
        self._use, self._format = use, use.format
        self._held = ""
        self._in_call = use.is_forced
        self._opening = ""
        """The text that began the call, if it was a marker."""
        self._has_content = False

    @property
    def marker(self) -> str:
        """The text of the token that begins calls; it may be special, and then has no text."""
        return self._format.begin

    def add(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return the content and the calls that new text completes."""
        self._held += text
        content, calls = "", list[ToolCall]()
        while True:
            if not self._in_call:
                content += self._release()
                if not self._in_call:
                    return content, calls
            end = "" if self._use.is_forced else self._format.end
            if not end or end not in self._held:
                return content, calls
            inner, _, self._held = self._held.partition(end)
            self._in_call = False
            found = self._read(inner)
            calls += found
            if not found:
                content += self._opening + inner + end

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return the content and the calls of the text that is left at the end."""
        held, self._held = self._held, ""
        calls = self._read(held) if self._in_call else []
        opening = self._opening if self._in_call else ""
        return ("", calls) if calls else (opening + held, [])

    def _release(self) -> str:
        """Return the text that cannot be part of a call; note whether a call begins after it."""
        begin = self._format.begin
        at = self._held.find(begin)
        if at >= 0:
            released, self._held = self._held[:at], self._held[at + len(begin) :]
            self._in_call, self._opening = True, begin
            return released
        if self._format is LLAMA3 and not self._has_content and self._held[:1] == "{":
            self._in_call, self._opening = True, ""  # Llama 3 writes calls without a marker, too
            return ""
        keep = next((n for n in range(len(begin) - 1, 0, -1) if self._held.endswith(begin[:n])), 0)
        split = len(self._held) - keep
        released, self._held = self._held[:split], self._held[split:]
        self._has_content |= bool(released.strip())
        return released

    def _read(self, text: str) -> list[ToolCall]:
        """Return the calls of a text; none if it is not valid."""
        found: list[Any] = []
        decoder, rest = json.JSONDecoder(), text.strip()
        while rest:
            try:
                value, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            found += value if isinstance(value, list) else [value]
            rest = rest[end:].lstrip("; \n")
        calls = [self._make_call(value) for value in found]
        return [] if None in calls else [call for call in calls if call is not None]

    def _make_call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict) or value.get("name") not in self._use.names:
            return None
        arguments = value.get(self._format.arguments, value.get("arguments", {}))
        if not isinstance(arguments, dict):
            return None
        alphabet = string.ascii_letters + string.digits
        number = "".join(random.SystemRandom().choices(alphabet, k=ID_CHARACTERS))
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False), number)
