"""Adapters served by name: streams of two adapters and their base equal their merged models."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from rich.progress import Progress

from ladderstitch.client import AsyncClient
from ladderstitch.text.bundle import TextBundle
from ladderstitch.training.text.adapters import add_adapter
from ladderstitch.training.text.calibrate import DEFAULT_SAMPLE
from tests.support.hugging_face_folders import write_folder
from tests.support.servers import start_server, stop_server
from tests.system.text.test_hugging_face_folders import (
    NEW_TOKENS,
    PROMPTS,
    greedy_tokens,
)
from tests.text.hugging_face.test_adapters import write_adapter

SCALE = 6 / 4
"""Alpha over the rank of the adapters that `write_adapter` writes."""


def make_adapted(folder: Path, kind: str) -> dict[str, Any]:
    """Write a folder with two adapters; return the models that requests name, adapters merged."""
    base = write_folder(folder / "base", kind)
    models = {"base": base}
    for name in ("one", "two"):
        factors = write_adapter(folder / name, base)
        bundle = TextBundle.load(folder / "base", calibrated=False)
        with Progress(disable=True) as progress:
            add_adapter(bundle, folder / name, name, None, DEFAULT_SAMPLE, progress)
        models[name] = copy.deepcopy(base)
        for module, (a, b) in factors.items():
            models[name].get_submodule(module).weight.data += SCALE * b @ a
    return models


async def complete(client: openai.AsyncOpenAI, model: str, prompt: str) -> str:
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {model}
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)


async def variants_used(
    client: AsyncClient, **options: Any
) -> AsyncIterator[tuple[str, list[int]]]:
    """Yield the variant and the tokens of an answer to each prompt."""
    for prompt in PROMPTS:
        chunks = [c async for c in client.generate(prompt, max_tokens=NEW_TOKENS, **options)]
        accounting = chunks[-1].accounting
        assert accounting is not None
        yield accounting.variant_name, [chunk.token for chunk in chunks]


@pytest.mark.parametrize(("kind", "ranks"), [("phi3", 1), ("olmo2", 2)])
async def test_mixed_streams_of_two_adapters_and_the_base(
    kind: str, ranks: int, tmp_path: Path
) -> None:
    models = make_adapted(tmp_path, kind)
    flags = ("--http-port", "0", "--tensor-parallel-size", str(ranks))
    server = start_server(tmp_path / "base", tmp_path / "log", *flags)
    try:
        async with openai.AsyncOpenAI(base_url=server.http, api_key="x", max_retries=0) as client:
            listed = [m async for m in client.models.list()]
            parents = {m.id: (m.model_extra or {})["parent"] for m in listed}
            assert parents == {"base": None, "one": "base", "two": "base"}
            names = [*models, "base:one"]
            jobs = [(name, prompt) for name in names for prompt in PROMPTS]
            answers = await asyncio.gather(*(complete(client, *job) for job in jobs))
            tokenizer = TextBundle.load(tmp_path / "base").tokenizer()
            for (name, prompt), text in zip(jobs, answers, strict=True):
                expected = greedy_tokens(models[name.removeprefix("base:")], prompt)
                assert text == tokenizer.decode(expected), name
            with pytest.raises(openai.NotFoundError, match=r"'three'.*'one', adapter 'two'"):
                await complete(client, "three", "a")
            with pytest.raises(openai.BadRequestError, match="variant_id: expected 1"):
                await client.completions.create(
                    model="one", prompt="a", extra_body={"variant_id": 2}
                )
        async with AsyncClient(server.address) as native:
            used = [found async for found in variants_used(native, variant=2)]
            assert used == [("two", greedy_tokens(models["two"], p)) for p in PROMPTS]
            unnamed = [name async for name, _ in variants_used(native)]
            assert set(unnamed) <= {"standard", "parallel"}
    finally:
        assert stop_server(server) == 0
