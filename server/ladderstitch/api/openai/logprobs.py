"""Log probabilities as OpenAI's API writes them, with tokens as text and as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ladderstitch.scheduling.generation import PromptToken, TokenChunk
from ladderstitch.text.tokenizer import TextStream, TextTokenizer

Body = dict[str, Any]
ScoredToken = PromptToken | TokenChunk
"""A token with its log probability, and those of its alternatives."""

LEAST_LOGPROB = -9999.0
"""The log probability of a token that is impossible."""


class LogprobWriter:
    """The log probabilities of one choice; it counts its characters for `text_offset`."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._num_characters = 0

    def of_chat(self, chunks: Sequence[TokenChunk]) -> Body:
        """Return the log probabilities of tokens of a chat's answer."""
        content = [
            self._describe(chunk.token, chunk.logprob)
            | {"top_logprobs": [self._describe(*pair) for pair in chunk.alternatives]}
            for chunk in chunks
        ]
        return {"content": content, "refusal": None}

    def of_completion(
        self, chunks: Sequence[TokenChunk], prompt: Sequence[PromptToken] = ()
    ) -> Body:
        """Return the log probabilities of tokens of a completion, after those of its prompt."""
        stream = TextStream(self._tokenizer)
        texts = [stream.add(scored.token) for scored in prompt] + [chunk.text for chunk in chunks]
        offsets = []
        for text in texts:
            offsets.append(self._num_characters)
            self._num_characters += len(text)
        scored_tokens: list[ScoredToken] = [*prompt, *chunks]
        return {
            "tokens": [self._text(scored.token) for scored in scored_tokens],
            "token_logprobs": [_finite(scored.logprob) for scored in scored_tokens],
            "top_logprobs": [self._by_text(scored) for scored in scored_tokens],
            "text_offset": offsets,
        }

    def _by_text(self, scored: ScoredToken) -> dict[str, float | None] | None:
        """Return the log probabilities of a token and of its alternatives, by text.

        The token itself has its text. Another one whose text is taken is named `token_id:ID`. The
        first token of a prompt has none.
        """
        if scored.logprob is None:
            return None
        found: dict[str, float | None] = {}
        for token, logprob in ((scored.token, scored.logprob), *scored.alternatives):
            if token == scored.token and found:
                continue
            text = self._text(token)
            found[f"token_id:{token}" if text in found else text] = _finite(logprob)
        return found

    def _describe(self, token: int, logprob: float | None) -> Body:
        own = self._tokenizer.token_bytes(token)
        return {"token": self._text(token), "logprob": _finite(logprob), "bytes": list(own)}

    def _text(self, token: int) -> str:
        """Return the text of a token as OpenAI writes it: bytes that are no text are escaped.

        Special tokens have their name, although they are no part of the answer.
        """
        if self._tokenizer.is_special(token):
            return self._tokenizer.token(token) or ""
        own = self._tokenizer.token_bytes(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)


def _finite(logprob: float | None) -> float | None:
    """Return a log probability as a number of JSON, which has no infinity."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
