"""Conversion between text and tokens: whole, incremental, with stop strings, and of chats."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers

from ladderstitch.bundles.files import MAX_TOKENIZER_BYTES, read_text
from ladderstitch.errors import BundleError
from ladderstitch.text.control_tokens import split_marked

INCOMPLETE_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""The tokenizer decodes the first tokens of a character that takes several to this."""

MAX_HELD_TOKENS = 32
"""Tokens after which text is returned although its last character may be incomplete.

A character takes at most four bytes; more tokens are held only where bytes are not valid UTF-8.
"""

CONTEXT_TOKENS = 8
"""Tokens of the prompt that the text of an answer continues."""

BOS_NAMES = (
    "<s>",
    "<bos>",
    "<|bos|>",
    "<BOS_TOKEN>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)
"""Tokens that begin a text in checkpoints whose tokenizer does not add them."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TextTokenizer:
    """The tokenizer of a bundle, read from `tokenizer.json`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Return the tokenizer of a file.

        Raises `BundleError` if the file is missing or is not a tokenizer.
        """
        if not path.exists():
            raise BundleError(
                f"{path}: expected the tokenizer, got no such file; `save_pretrained` of the "
                "model's fast tokenizer writes it"
            )
        try:
            return cls(Tokenizer.from_str(read_text(path, MAX_TOKENIZER_BYTES)))
        except BundleError:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise BundleError(f"{path}: {error}") from error

    @property
    def size(self) -> int:
        """The number of tokens in the vocabulary."""
        return self._tokenizer.get_vocab_size()

    @property
    def added_tokens(self) -> dict[str, bool]:
        """The tokens that are found in a text before it is split, and whether each is special."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return {token.content: token.special for token in added}

    def to_json(self, extra_tokens: Sequence[str] = ()) -> str:
        """Return the tokenizer as `tokenizer.json` has it, with these special tokens, too."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.add_special_tokens(list(extra_tokens))
        return tokenizer.to_str()

    def token(self, token: int) -> str | None:
        """Return a token as the vocabulary spells it; None for an unknown id."""
        return self._tokenizer.id_to_token(token)

    def difference(self, other: TextTokenizer) -> str | None:
        """Return in which way this tokenizer differs from another one; None: in no way.

        Tokens and their ids count, and all rules by which a text is split.
        """
        own, others = (each._tokenizer.get_vocab() for each in (self, other))
        if own != others:
            first = min(number for _, number in own.items() ^ others.items())
            counts = f"{len(own)} tokens instead of {len(others)}, e.g. "
            return (
                f"{counts if len(own) != len(others) else ''}token {first} is "
                f"{self.token(first)!r} instead of {other.token(first)!r}"
            )
        rules, expected = (json.loads(each._tokenizer.to_str()) for each in (self, other))
        for settings in (rules, expected):  # of training, not of encoding
            settings.update(truncation=None, padding=None, version=None)
        if wrong := sorted(key for key in rules | expected if rules.get(key) != expected.get(key)):
            return f"other rules: {', '.join(wrong)}"
        return None

    def bos_token(self, end_tokens: Sequence[int]) -> str | None:
        """Return the token that begins every text; None if the tokenizer has none.

        It is the first token that the post-processor adds, or the one with a usual name.
        """
        for added in self.encode("")[:1]:
            if added not in end_tokens:
                return self.token(added)
        special = [text for text, is_special in self.added_tokens.items() if is_special]
        return next((text for text in special if text in BOS_NAMES), None)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, by default with those that begin or end every text."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(self, text: str) -> list[int]:
        """Return the token ids of a rendered chat: marked control tokens are plain text.

        The chat template writes the tokens that begin and end a chat, so none are added.
        """
        (first, _), *others = split_marked(text)
        ids = self.encode(first, add_special_tokens=False)
        for piece, plain in others:
            ids += self._encode_within(piece, plain=plain)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids; special tokens have none."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def is_special(self, token: int) -> bool:
        """Return whether a token is special, which has no text."""
        return token in self._special_ids

    def is_byte(self, token: int) -> bool:
        """Return whether a token is one byte of SentencePiece's byte fallback.

        A run of them is decoded as a whole: one invalid byte changes the text of all of them.
        """
        if not self._has_byte_fallback:
            return False
        return _BYTE_TOKEN.fullmatch(self.token(token) or "") is not None

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text; none if it is special or unknown."""
        name = self.token(token)
        if name is None or self.is_special(token):
            return b""
        if self._has_byte_fallback and (match := _BYTE_TOKEN.fullmatch(name)):
            return bytes.fromhex(match[1])
        if self._is_byte_level:
            return _byte_level_bytes(name)
        # The text after another token: some decoders change the first token of a text.
        return self.decode([token, token])[len(self.decode([token])) :].encode()

    def _encode_within(self, piece: str, *, plain: bool) -> list[int]:
        """Return the token ids of a piece of a text that is not its beginning.

        Some tokenizers add a space to the beginning of a text: the piece is encoded after a line
        break, whose tokens are removed.
        """
        encode = self._encode_plain if plain else self._encode_piece
        line_break = self.encode("\n", add_special_tokens=False)
        ids = encode("\n" + piece)
        ids = ids[len(line_break) :] if ids[: len(line_break)] == line_break else encode(piece)
        if plain and len(piece) > 1 and self._tokenizer.token_to_id(piece) in ids:
            head, tail = piece[:1], piece[1:]  # the model itself knows the control token
            return self._encode_within(head, plain=True) + self._encode_within(tail, plain=True)
        return ids

    def _encode_piece(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)

    def _encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text in which no added token is looked for."""
        if (normalizer := self._tokenizer.normalizer) is not None:
            text = normalizer.normalize_str(text)
        words = [text]
        if (splitter := self._tokenizer.pre_tokenizer) is not None:
            words = [word for word, _ in splitter.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._tokenizer.model.tokenize(word)]

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return frozenset(number for number, token in added if token.special)

    @cached_property
    def _decoder_types(self) -> frozenset[str]:
        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        return frozenset(part["type"] for part in decoder.get("decoders", [decoder]) if part)

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in self._decoder_types

    @cached_property
    def _has_byte_fallback(self) -> bool:
        return "ByteFallback" in self._decoder_types


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each of GPT-2's characters for bytes.

    Printable characters of Latin-1 stand for themselves, and those from U+0100 for other bytes in
    their order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()
assert set(_BYTES) == set(pre_tokenizers.ByteLevel.alphabet()), "GPT-2's alphabet has changed"


def _byte_level_bytes(name: str) -> bytes:
    """Return the bytes of a token; an added token may have characters that stand for no byte."""
    if all(character in _BYTES for character in name):
        return bytes(_BYTES[character] for character in name)
    return name.encode()


class TextStream:
    """An incremental decoder for the tokens of one answer, which continues a prompt.

    A character may take several tokens; its text is returned when it is complete. All text
    together is what follows the prompt's in the text of prompt and answer.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Decoding starts a few tokens earlier: a token's text may depend on its neighbours.
        self._tokens = _text_context(tokenizer, prompt)
        self._num_emitted = len(self._tokens)  # tokens whose text has been returned
        self._context_start = 0

    def add(self, token: int) -> str:
        """Return the text that a new token completes, which may be empty."""
        if self._tokenizer.is_special(token):
            return ""
        self._tokens.append(token)
        if len(self._tokens) - self._num_emitted <= MAX_HELD_TOKENS:
            if self._tokenizer.is_byte(token):
                return ""
            now = self._tokenizer.decode(self._tokens[self._context_start :])
            return "" if now.endswith(INCOMPLETE_CHARACTER) else self._emit(now)
        return self.finish()

    def finish(self) -> str:
        """Return the text not yet returned, even if its last character is incomplete."""
        return self._emit(self._tokenizer.decode(self._tokens[self._context_start :]))

    def _emit(self, now: str) -> str:
        before = self._tokenizer.decode(self._tokens[self._context_start : self._num_emitted])
        if now != before:  # otherwise the new tokens have no text that others could follow
            self._context_start = self._num_emitted
        self._num_emitted = len(self._tokens)
        if before.endswith(INCOMPLETE_CHARACTER):  # the prompt's last character may be complete now
            before = _common_prefix(before, now)
        return now[len(before) :]


def _common_prefix(one: str, other: str) -> str:
    """Return the characters that two texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _text_context(tokenizer: TextTokenizer, prompt: Sequence[int]) -> list[int]:
    """Return the last tokens of a prompt that have text, from the start of a run of bytes."""
    context: list[int] = []
    for token in reversed(prompt):
        if len(context) >= CONTEXT_TOKENS and not tokenizer.is_byte(context[-1]):
            break
        if not tokenizer.is_special(token):
            context.append(token)
    return context[::-1]


class StoppableText:
    """The text of an answer up to the first stop string.

    Text that may be the beginning of a stop string is held back until more tokens decide. Stop
    strings count from token number `min_tokens` on; until then, all text is released.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str], min_tokens: int = 0) -> None:
        self.stopped = False
        self._stream, self._stop, self._held = stream, stop, ""
        self._min_tokens, self._num_tokens = min_tokens, 0

    def add(self, token: int) -> str:
        """Return the text that a new token releases; empty while a stop string is possible."""
        new = self._stream.add(token)
        self._num_tokens += 1
        if self._num_tokens >= self._min_tokens:
            return self._release(new)
        released, self._held = self._held + new, ""
        return released

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
