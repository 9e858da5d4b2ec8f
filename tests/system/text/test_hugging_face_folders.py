"""Folders of transformers, served as they are: streams in one batch equal transformers' answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

from ladderstitch.bundles import HOME_VARIABLE
from ladderstitch.client import AsyncClient, RequestFailed
from tests.support.hugging_face_folders import write_folder
from tests.support.language_models import END
from tests.support.servers import start_server, stop_server

SERVED = {
    "sliding-window": "mistral",
    "parallel-residual": "gpt_neox",
    "post-norm": "olmo2",
    "no-rotary-layers": "smollm3",
    "capped-scores": "gemma2",
    "grouped-queries": "falcon groups",
    "query-norms": "qwen3",
}
"""Names of the models, and the architectures of `hugging_face_folders`."""
PROMPTS = ("a", "the window is shorter than this prompt", "another one")
NEW_TOKENS = 12


def greedy_tokens(model: Any, prompt: str) -> list[int]:
    """Return the greedy answer of transformers; it ends after an end token."""
    tokens = torch.tensor([list(byte_tokens(prompt))])
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            best = model(tokens).logits[0, -1].argmax()
            tokens = torch.cat((tokens, best.view(1, 1)), dim=1)
            if best == END:
                break
    answer: list[int] = tokens[0, len(byte_tokens(prompt)) :].tolist()
    return answer


def byte_tokens(text: str) -> list[int]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [alphabet.index(character) for piece, _ in pieces for character in piece]


async def stream(client: AsyncClient, model: str, prompt: str) -> list[int]:
    chunks = client.generate(prompt, model=model, max_tokens=NEW_TOKENS)
    return [chunk.token async for chunk in chunks]


async def test_streams_of_seven_architectures_equal_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    models = {name: write_folder(home / name, kind) for name, kind in SERVED.items()}
    monkeypatch.setenv(HOME_VARIABLE, str(home))
    first, *others = SERVED
    server = start_server(home / first, tmp_path / "log", "--max-sequences", "4")
    try:
        async with AsyncClient(server.address) as client:
            for name in others:
                await client.load_model(name)
            jobs = [(name, prompt) for name in SERVED for prompt in PROMPTS]
            answers = await asyncio.gather(*(stream(client, *job) for job in jobs))
            for (name, prompt), tokens in zip(jobs, answers, strict=True):
                assert tokens == greedy_tokens(models[name], prompt), name
            (home / "broken").mkdir()
            (home / "broken" / "config.json").write_text('{"model_type": "rwkv"}')
            with pytest.raises(RequestFailed, match="model_type: expected one of llama"):
                await client.load_model("broken")
            assert await stream(client, first, "a")
    finally:
        assert stop_server(server) == 0
