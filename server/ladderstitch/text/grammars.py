"""Grammars that answers must match: JSON, JSON schemas and regular expressions, by llguidance.

The tokenizer's trie is built once a model, before its first request, as that holds the
interpreter's lock. A grammar is compiled once a request, in the one thread of its model; each
answer has a matcher of its own, which computes the mask of its next token from the state of a
parser.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from ladderstitch.errors import InvalidArgument
from ladderstitch.text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

log = logging.getLogger(__name__)

GrammarKind = Literal["json_schema", "regex", "lark"]

MAX_GRAMMAR_BYTES = 64 << 10
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""A state takes 1 to 2 KB; verbose errors would log what callers' answers say."""
SILENT = 0
"""The log level of llguidance; it writes past `logging`."""
END = "<|ladderstitch end of answer|>"
"""The end of an answer for models without an end token; they cannot draw it."""
JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""One space after separators and none elsewhere: a model cannot add spaces without an end."""


class GrammarCompiler:
    """The compiler of the grammars of one model."""

    def __init__(self, tokenizer: TextTokenizer, end_tokens: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = sorted(end_tokens)
        self._trie: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "grammars")

    def prepare(self) -> None:
        """Build the trie, which takes up to a second; a failure is logged, and met again later."""
        try:
            self._load_trie()
        except ValueError as error:
            log.warning("no grammars for the tokenizer of this model: %s", error)

    async def compile_in_thread(
        self, field: str, kind: GrammarKind, source: str
    ) -> CompiledGrammar:
        """Return what `compile` does; grammars of one model wait for each other, and no one else.

        Raises `InvalidArgument`, which names `field`.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.compile, field, kind, source)

    def compile(self, field: str, kind: GrammarKind, source: str) -> CompiledGrammar:
        """Return a grammar; takes up to three seconds, so that it must run in a thread.

        Raises `InvalidArgument`, which names `field`, if the source is not valid or too complex.
        """
        if (size := len(source.encode())) > MAX_GRAMMAR_BYTES:
            raise InvalidArgument(field, f"expected at most {MAX_GRAMMAR_BYTES} bytes, got {size}")
        try:
            text = _grammar_text(kind, source)
            matcher = LLMatcher(self._load_trie(), text, log_level=SILENT, limits=LIMITS)
        except ValueError as error:
            raise _rejected(field, kind, str(error)) from None
        first = matcher.deep_copy()
        first.compute_bitmask()  # some grammars are found to match nothing here
        if first.is_error():
            raise _rejected(field, kind, first.get_error())
        return CompiledGrammar(matcher)

    def _load_trie(self) -> LLTokenizer:
        with self._lock:
            if self._trie is None:
                extra = [] if self._end_tokens else [END]
                tokenizer = self._tokenizer.to_json(extra)
                ends = self._end_tokens or [self._tokenizer.size]
                self._trie = LLTokenizer(tokenizer, eos_token=ends)
            return self._trie


def _grammar_text(kind: GrammarKind, source: str) -> str:
    match kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(source, overrides=JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(source)
        case "lark":
            return LLMatcher.grammar_from_lark(source)


def _rejected(field: str, kind: GrammarKind, reason: str) -> InvalidArgument:
    expected = f"a supported {kind.replace('_', ' ')}"
    problem = f"got one that llguidance rejects: {reason[:300]}"
    return InvalidArgument(field, f"expected {expected}, {problem}")


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar for one model's tokens."""

    _matcher: LLMatcher

    def matcher(self) -> GrammarMatcher:
        """Return the state of an answer without tokens."""
        return GrammarMatcher(self._matcher.deep_copy())


class GrammarMatcher:
    """The state of one answer that must match a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def complete(self) -> bool:
        """Whether the answer matches and no further token may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self, num_tokens: int) -> NDArray[np.bool_]:
        """Return [V], V = `num_tokens`: whether each token, or the end, may come next.

        Raises `InvalidArgument` if the grammar needs more work than llguidance allows.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.zeros(num_tokens, np.bool_)
        known = np.unpackbits(bits, bitorder="little")[:num_tokens]
        mask[: len(known)] = known
        return mask

    def add(self, token: int) -> None:
        """Append a token that `allowed` permits; raises `InvalidArgument` for another one."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error()[:300]
            raise InvalidArgument("grammar", f"expected one that can be followed, got {reason}")
