"""Text of answers over HTTP with a SentencePiece tokenizer: spaces, and characters of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from ladderstitch.text.bundle import TextBundle
from tests.api.openai.served_model import AsgiCall, ServedModel, write_chat_bundle
from tests.support.language_models import END
from tests.text.scheduler.stepped_group import TOKEN
from tests.text.tokenizer_kinds import BYTE_TOKENS, SPACE


def write_sentencepiece_bundle(folder: Path, piece: str) -> TextBundle:
    """Write a bundle whose model answers `piece`, with one token per byte."""
    bundle = write_chat_bundle(folder)
    vocabulary = {name: number for number, name in enumerate(BYTE_TOKENS)} | {"<end>": END}
    if piece not in vocabulary:
        del vocabulary[BYTE_TOKENS[TOKEN]]
        vocabulary[piece] = TOKEN
    else:
        other = BYTE_TOKENS[TOKEN]
        vocabulary[other], vocabulary[piece] = vocabulary[piece], TOKEN
    for name, byte in ((SPACE, 1), ("x", 2)):  # the tokens of prompts
        if name not in vocabulary:
            vocabulary[name] = vocabulary.pop(BYTE_TOKENS[byte])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(bundle.path / "tokenizer.json"))
    return bundle


async def answer(folder: Path, piece: str, *, chat: bool, stream: bool) -> str:
    """Return the text of an answer of three tokens."""
    served = ServedModel(write_sentencepiece_bundle(folder, piece))
    served.scheduler.steps.release()
    call = AsgiCall(chat, max_tokens=3, stream=stream)
    await call.run(served, lambda message: None)
    await served.scheduler.close()
    body = b"".join(message.get("body", b"") for message in call.sent).decode()
    if not stream:
        bodies = [json.loads(body)]
    else:
        events = [line.removeprefix("data: ") for line in body.splitlines() if line]
        bodies = [json.loads(event) for event in events if event != "[DONE]"]
    choices = [body["choices"][0] for body in bodies]
    parts = [choice.get("message", choice.get("delta", choice)) for choice in choices]
    return "".join(part.get("content", part.get("text", "")) for part in parts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (f"{SPACE}hi", " hi hi hi"),
        (SPACE, "   "),
        ("hi", "hihihi"),
        (f"{SPACE}{SPACE}x", "  x  x  x"),
        ("<0x0A>", "\n\n\n"),
        ("<0xFF>", "\N{REPLACEMENT CHARACTER}" * 3),
    ],
)
async def test_answer_is_the_text_after_the_prompt(
    tmp_path: Path, piece: str, text: str, chat: bool, stream: bool
) -> None:
    assert await answer(tmp_path, piece, chat=chat, stream=stream) == text
