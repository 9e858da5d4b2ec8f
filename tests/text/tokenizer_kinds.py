"""Five kinds of tokenizers, trained on a few sentences."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.text.chat_styles import CONTROL_TOKENS

KINDS = ("byte-level", "byte-level-prefix-space", "sentencepiece-bpe", "unigram", "wordpiece")
TEXTS = (
    "You are a helpful assistant. Answer the question of the user in a few words.",
    "The quick brown fox jumps over the lazy dog; it didn't stop, and it never will!",
    "naïve façade, 東京 and 🚲 are here. Numbers: 12345, 3.14 and 1,000,000.",
    "def add(a, b):\n    return a + b\n\n# system user assistant model tool INST USER ASSISTANT",
)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Return a tokenizer of a kind that begins texts with `<s>` and has control tokens."""
    tokenizer = {
        "byte-level": lambda: _byte_level(prefix_space=False),
        "byte-level-prefix-space": lambda: _byte_level(prefix_space=True),
        "sentencepiece-bpe": _sentencepiece,
        "unigram": _unigram,
        "wordpiece": _wordpiece,
    }[kind]()
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "$B"], special_tokens=[("<s>", begin)]
    )
    return tokenizer


def _byte_level(*, prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False, special_tokens=["<s>"]
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """Return BPE with byte fallback, as Llama 2 has it."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    special = ["<unk>", "<s>", "</s>", *BYTE_TOKENS]
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, special_tokens=special)
    trained.train_from_iterator([TEXTS[0], TEXTS[1]], trainer)
    # Training marks the bytes as special, so the model is put into a new tokenizer.
    state = json.loads(trained.to_str())["model"]
    model = models.BPE(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, show_progress=False, unk_token="<unk>", special_tokens=["<unk>", "<s>"]
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, show_progress=False, special_tokens=["[UNK]", "<s>"]
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer
