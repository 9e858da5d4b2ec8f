"""The tokenizer of a GGUF file: byte-level BPE with merges, or SentencePiece BPE with scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ladderstitch.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""GGUF's types of tokens. Merging never produces tokens of the last three."""
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""Tokens that SentencePiece uses for characters outside its vocabulary."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""The character that SentencePiece writes for a space."""
DEFAULT_IDS = {"bos": 1, "eos": 2}
"""Token ids that a SentencePiece file need not name."""

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")

_DIGITS_ALONE = (r"\p{N}", GPT2_WORDS)
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT2_WORDS,),
    "smollm": _DIGITS_ALONE,
    "starcoder": _DIGITS_ALONE,
    "refact": _DIGITS_ALONE,
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ),
    "llama-bpe": (LLAMA3_WORDS,),
    "llama3": (LLAMA3_WORDS,),
    "llama-v3": (LLAMA3_WORDS,),
    "falcon3": (LLAMA3_WORDS,),
    "qwen2": (QWEN2_WORDS,),
    "deepseek-r1-qwen": (QWEN2_WORDS,),
}
"""Regular expressions that split text in turn before merging, by `tokenizer.ggml.pre`."""
LLAMA3_NAMES = tuple(name for name, (*_, last) in SPLITS.items() if last == LLAMA3_WORDS)
"""Pre-tokenizers that take words of the vocabulary whole, and begin texts with a BOS token."""


def build_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer in the fields of a GGUF file.

    Raises `DataError` naming the field if the tokenizer is missing, damaged or of another kind.
    """
    builders: dict[str, Callable[[Mapping[str, Any]], Tokenizer]] = {
        "gpt2": _build_byte_level,
        "llama": _build_sentencepiece,
    }
    kind = fields.get("tokenizer.ggml.model")
    if kind not in builders:
        raise DataError(f"tokenizer.ggml.model: expected one of {sorted(builders)}, got {kind!r}")
    for name in ("add_eos_token", "remove_extra_whitespaces", "precompiled_charsmap"):
        if value := fields.get(f"tokenizer.ggml.{name}"):
            raise DataError(f"tokenizer.ggml.{name}: expected none, got {str(value)[:40]}")
    tokens, types = read_tokens(fields), _read_types(fields)
    tokenizer = builders[kind](fields)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=type_ != USER_DEFINED, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    _add_bos(tokenizer, fields, tokens)
    return tokenizer


def read_tokens(fields: Mapping[str, Any]) -> list[str]:
    """Return the tokens in the order of their ids.

    Raises `DataError` if there are none, or if two are equal.
    """
    tokens = _read_list(fields, "tokens", str)
    if not tokens:
        raise DataError("tokenizer.ggml.tokens: expected a list of tokens, got none")
    (token, count), *_ = Counter(tokens).most_common(1)
    if count > 1:
        raise DataError(f"tokenizer.ggml.tokens: expected distinct tokens, got {token!r} twice")
    return tokens


def read_token_id(fields: Mapping[str, Any], name: str) -> int | None:
    """Return the id of the token with a role: `bos`, `eos`, `eot`, ...; None if there is none.

    Raises `DataError` if the id is not one of a token.
    """
    field = f"tokenizer.ggml.{name}_token_id"
    default = DEFAULT_IDS.get(name) if fields.get("tokenizer.ggml.model") == "llama" else None
    value, count = fields.get(field, default), len(read_tokens(fields))
    if value is not None and not (isinstance(value, int) and 0 <= value < count):
        raise DataError(f"{field}: expected 0 to {count - 1}, got {value!r}")
    return value


def _read_list(fields: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> list[Any]:
    """Return a list of the tokenizer, empty if it is unset; raises `DataError` for other values."""
    values = fields.get(f"tokenizer.ggml.{name}", [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        got = str(values)[:40]
        raise DataError(f"tokenizer.ggml.{name}: expected a list of {kind}, got {got}")
    return values


def _read_types(fields: Mapping[str, Any]) -> list[int]:
    """Return the type of each token; raises `DataError` if their number is wrong."""
    count = len(read_tokens(fields))
    types = _read_list(fields, "token_type", int) or [NORMAL] * count
    if len(types) != count:
        raise DataError(f"tokenizer.ggml.token_type: expected {count} types, got {len(types)}")
    return types


def _build_byte_level(fields: Mapping[str, Any]) -> Tokenizer:
    """Return a tokenizer with GPT-2's characters for bytes, and with the file's merges."""
    pre = fields.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise DataError(f"tokenizer.ggml.pre: expected one of {sorted(SPLITS)}, got {pre!r}")
    tokens, merges = read_tokens(fields), _read_list(fields, "merges", str)
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    types = _read_types(fields)
    long = (t for t, kind in zip(tokens, types, strict=True) if kind == NORMAL and len(t) > 1)
    if not merges and (token := next(long, None)) is not None:
        raise DataError(f"tokenizer.ggml.merges: expected merges for {token!r}, got none")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    for pair in pairs:
        if len(pair) < 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise DataError(f"tokenizer.ggml.merges: expected pairs of tokens, got {pair}")
    bpe = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in LLAMA3_NAMES)
    tokenizer = Tokenizer(bpe)
    splits = [pre_tokenizers.Split(Regex(words), "isolated") for words in SPLITS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _build_sentencepiece(fields: Mapping[str, Any]) -> Tokenizer:
    """Return a tokenizer that merges the pair whose token has the largest score.

    Characters outside the vocabulary become tokens of bytes. A space comes before the text and
    after every special token unless the file says otherwise.
    """
    tokens = read_tokens(fields)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if missing := [token for token in BYTE_TOKENS if token not in vocabulary]:
        raise DataError(f"tokenizer.ggml.tokens: expected {missing[0]}, got {len(tokens)} others")
    merges = _derive_merges(fields, tokens)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    # An answer may begin with a space, so that the decoder keeps the first one.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _derive_merges(fields: Mapping[str, Any], tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that make a token, those with the largest score first.

    Raises `DataError` if two tokens that merging can produce have the same score, since their
    order would be unknown.
    """
    scores, types = _read_list(fields, "scores", (int, float)), _read_types(fields)
    if len(scores) != len(tokens):
        raise DataError(f"tokenizer.ggml.scores: expected {len(tokens)} scores, got {len(scores)}")
    kept = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    merges: list[tuple[str, str]] = []
    token_of: dict[float, str] = {}
    for score, token in sorted(zip(scores, tokens, strict=True), key=lambda pair: -pair[0]):
        cuts = range(1, len(token)) if token in kept else ()
        pairs = [(token[:cut], token[cut:]) for cut in cuts]
        pairs = [pair for pair in pairs if kept.issuperset(pair)]
        if pairs and token_of.setdefault(score, token) != token:
            both = f"{token_of[score]!r} and {token!r}"
            raise DataError(f"tokenizer.ggml.scores: expected distinct scores, got {score}: {both}")
        merges += pairs
    return merges


def _add_bos(tokenizer: Tokenizer, fields: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Let texts begin with the BOS token if the file or the kind of tokenizer asks for it."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    default = kind == "llama" or pre in LLAMA3_NAMES
    if not fields.get("tokenizer.ggml.add_bos_token", default):
        return
    bos = read_token_id(fields, "bos")
    if bos is None:
        raise DataError("tokenizer.ggml.bos_token_id: expected a token id, got none")
    token = tokens[bos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, bos)]
    )
