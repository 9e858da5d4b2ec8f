"""Streamed text is what follows the prompt in the text of prompt and answer."""

from __future__ import annotations

import random

import pytest

from ladderstitch.text.tokenizer import TextStream, TextTokenizer
from tests.text.tokenizer_kinds import KINDS, TEXTS, tokenizer_of

PROMPTS = ("The quick brown", "x", "東京 ", "<|im_start|>user\nHello<|im_end|>", "")
ANSWERS = (
    " fox jumps.",
    "over  the dog",
    " naïve façade 🚲!",
    "\n\n  def add(a, b):\n",
    " ",
    "don't .",
)


def streamed(tokenizer: TextTokenizer, prompt: list[int], answer: list[int]) -> list[str]:
    """Return the pieces of text of an answer."""
    stream = TextStream(tokenizer, prompt)
    return [*(stream.add(token) for token in answer), stream.finish()]


def text_after(tokenizer: TextTokenizer, prompt: list[int], answer: list[int]) -> str:
    """Return the text of prompt and answer after that of the prompt."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + answer)
    assert whole.startswith(before)
    return whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_streamed_answer_is_the_text_after_the_prompt(kind: str, answer: str) -> None:
    tokenizer = TextTokenizer(tokenizer_of(kind))
    for prompt in PROMPTS:
        before = tokenizer.encode(prompt)
        tokens = tokenizer.encode(answer, add_special_tokens=False)
        pieces = streamed(tokenizer, before, tokens)
        assert "".join(pieces) == text_after(tokenizer, before, tokens)
        assert not [piece for piece in pieces[:-1] if piece.endswith("\N{REPLACEMENT CHARACTER}")]


def test_sentencepiece_answer_keeps_its_leading_space() -> None:
    for kind in ("sentencepiece-bpe", "unigram"):
        tokenizer = TextTokenizer(tokenizer_of(kind))
        space = tokenizer.encode("a b", add_special_tokens=False)[-2:]
        assert "".join(streamed(tokenizer, tokenizer.encode("the"), space)).startswith(" ")
        special = tokenizer.encode("the<|im_end|><|im_start|>" * 20)
        assert "".join(streamed(tokenizer, special, space)).startswith(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens_are_streamed_as_decoded(kind: str) -> None:
    tokenizer, generator = TextTokenizer(tokenizer_of(kind)), random.Random(1)
    for _ in range(300):
        prompt = tokenizer.encode(generator.choice(TEXTS))
        answer = [generator.randrange(tokenizer.size) for _ in range(generator.randrange(1, 30))]
        pieces = streamed(tokenizer, prompt, answer)
        assert "".join(pieces) == text_after(tokenizer, prompt, answer)


def test_prompt_that_ends_in_a_character_is_continued() -> None:
    tokenizer = TextTokenizer(tokenizer_of("byte-level"))
    tokens = tokenizer.encode("x🚲y")
    for split in range(1, len(tokens)):
        pieces = "".join(streamed(tokenizer, tokens[:split], tokens[split:]))
        before = tokenizer.decode(tokens[:split]).rstrip("\N{REPLACEMENT CHARACTER}")
        assert before + pieces == "x🚲y"


def test_endless_invalid_bytes_are_returned() -> None:
    for kind, name in (("byte-level", "Ġ"), ("sentencepiece-bpe", "<0xFF>")):
        tokenizer = tokenizer_of(kind)
        token = tokenizer.token_to_id({"Ġ": "ÿ"}.get(name, name))
        pieces = streamed(TextTokenizer(tokenizer), [], [token] * 200)
        assert sum(map(bool, pieces[:-1])) >= 4
        assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 200


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_are_those_of_the_text(kind: str) -> None:
    tokenizer = TextTokenizer(tokenizer_of(kind))
    prompt = tokenizer.encode("The dog")
    for answer in ANSWERS:
        tokens = tokenizer.encode(answer, add_special_tokens=False)
        own = b"".join(tokenizer.token_bytes(token) for token in tokens)
        assert own.decode() == text_after(tokenizer, prompt, tokens)


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-prefix-space"])
def test_bytes_of_random_tokens_are_those_of_the_text(kind: str) -> None:
    tokenizer, generator = TextTokenizer(tokenizer_of(kind)), random.Random(2)
    for _ in range(300):
        tokens = [generator.randrange(tokenizer.size) for _ in range(20)]
        own = b"".join(tokenizer.token_bytes(token) for token in tokens)
        assert own.decode(errors="replace") == tokenizer.decode(tokens)


def test_bytes_of_special_and_unknown_tokens_are_none() -> None:
    tokenizer = TextTokenizer(tokenizer_of("byte-level"))
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False)
    assert tokenizer.token_bytes(end) == b""
    assert tokenizer.token_bytes(tokenizer.size) == b""
    (think,) = tokenizer.encode("<think>", add_special_tokens=False)
    assert tokenizer.token_bytes(think) == b"<think>"
