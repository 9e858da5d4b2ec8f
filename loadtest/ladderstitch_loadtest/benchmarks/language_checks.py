"""Checks of a real language model: tokens of `transformers`, rank counts, perplexity, memory."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.manifest import TextManifest, write_manifest
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.weights import expected_shapes

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at",
    "def fibonacci(n):",
    "The three primary colours are",
    "Dear Sir or Madam,",
    "In 1969, people first",
    "A recipe for bread: take",
    "The opposite of hot is",
    "Photosynthesis is the process by which",
    "My favourite book is about",
    "To be, or not to be,",
    "The square root of 144 is",
    "She opened the door and",
    "Newton's second law says that",
    "List three animals that can fly:",
    "The weather tomorrow will be",
    "An integer is even if",
    "import numpy as np\n\n",
    "The longest river in the world",
)
NEW_TOKENS = 64
RANK_COUNT_PATHS = {
    "standard": ResidualScheme(),
    "ladder": ResidualScheme(scheme="ladder"),
    "ladder, last 8 layers": ResidualScheme(scheme="ladder", ladder_layers=8),
}
"""Paths whose logits are compared between rank counts."""
LADDER_LAYERS = (None, 4, 8, 15, 30)
"""Numbers of last layers that are ladder layers; none: standard."""


def reference_model(file: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return SmolLM2 in `transformers`, loaded from the GGUF file that we import."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    return model.eval()


async def agreement(bundle: TextBundle, reference: Any) -> dict[str, object]:
    """Return for how many prompts both implementations give the same greedy tokens."""
    tokenizer, differing = bundle.tokenizer(), []
    group = RankGroup(RankConfig.of(bundle, max_model_len=256))
    try:
        await group.start()
        for prompt in PROMPTS:
            tokens = tokenizer.encode(prompt)
            ours = await greedy(group, tokens, NEW_TOKENS)
            if ours != _reference_greedy(reference, tokens):
                differing.append(prompt)
    finally:
        await group.close()
    return {
        "prompts": len(PROMPTS),
        "tokens_each": NEW_TOKENS,
        "prompts_that_agree": len(PROMPTS) - len(differing),
        "differing": differing,
    }


@torch.inference_mode()
def _reference_greedy(reference: Any, tokens: list[int]) -> list[int]:
    """Return the most likely tokens after the prompt, as `transformers` computes them."""
    generated = reference.generate(
        torch.tensor([tokens]),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    answer: list[int] = generated[0, len(tokens) :].tolist()
    return answer


async def greedy(group: RankGroup, prompt: Sequence[int], count: int) -> list[int]:
    """Return `count` most likely tokens after the prompt; end tokens do not end the answer."""
    logits, tokens = await group.forward(np.array([prompt]), 0), []
    for position in range(len(prompt), len(prompt) + count):
        tokens.append(int(logits[0].argmax()))
        logits = await group.forward(np.array([[tokens[-1]]]), position)
    return tokens


async def rank_counts(bundle: TextBundle) -> dict[str, object]:
    """Return the largest relative difference of the logits on 2 and 3 ranks from those on one."""
    logits = {ranks: await _logits_by_path(bundle, ranks) for ranks in (1, 2, 3)}
    return {
        f"{name}, {ranks} ranks": float(
            np.abs(logits[ranks][name] - logits[1][name]).max() / np.abs(logits[1][name]).max()
        )
        for name in RANK_COUNT_PATHS
        for ranks in (2, 3)
    }


async def _logits_by_path(bundle: TextBundle, ranks: int) -> dict[str, np.ndarray]:
    tokens = np.array([bundle.tokenizer().encode(" ".join(PROMPTS))[:128]])
    paths = tuple(RANK_COUNT_PATHS.values())
    group = RankGroup(RankConfig.of(bundle, ranks=ranks, paths=paths, max_model_len=128))
    try:
        await group.start()
        return {
            name: await group.forward(tokens, 0, path, last_only=False)
            for path, name in enumerate(RANK_COUNT_PATHS)
        }
    finally:
        await group.close()


async def perplexities(
    bundle: TextBundle, text: str, tokens: int = 2048, context: int = 512
) -> dict[str, float]:
    """Return the perplexity of each path on a text's first tokens, in disjoint windows."""
    ids = bundle.tokenizer().encode(text)[:tokens]
    paths = tuple(
        ResidualScheme(scheme="ladder", ladder_layers=last) if last else ResidualScheme()
        for last in LADDER_LAYERS
    )
    group = RankGroup(RankConfig.of(bundle, paths=paths, max_model_len=context))
    found = {}
    try:
        await group.start()
        for path, last in enumerate(LADDER_LAYERS):
            name = f"ladder, last {last} layers" if last else "standard"
            found[name] = round(await _perplexity(group, ids, context, path), 1)
    finally:
        await group.close()
    return found


async def _perplexity(group: RankGroup, ids: list[int], context: int, path: int) -> float:
    surprise = 0.0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        logits = await group.forward(np.array([window[:-1]]), 0, path, last_only=False)
        logs = torch.from_numpy(logits[0]).log_softmax(-1)
        surprise -= float(logs[torch.arange(len(window) - 1), torch.tensor(window[1:])].sum())
    return math.exp(surprise / (len(ids) - 1))


SCALED_DOWN = DecoderConfig(
    vocab_size=32_064,
    hidden_size=1024,
    intermediate_size=3584,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=32,
    max_positions=64,
)
"""The proportions of an 8B Llama at a fraction of its size."""

NUM_SHARD_FILES = 4


async def shards() -> dict[str, object]:
    """Return the bytes of a sharded checkpoint and of each of two ranks that load it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = _write_sharded(folder)
        bundle = TextBundle.load(folder)
        group = RankGroup(RankConfig.of(bundle, ranks=2), GroupOptions())
        try:
            await group.start()
            loaded = [group.loaded[rank] for rank in range(2)]
        finally:
            await group.close()
    return {
        "checkpoint_bytes": whole,
        "rank_weight_bytes": [rank["weight_bytes"] for rank in loaded],
        "rank_memory_growth_bytes": [rank["memory_bytes"] for rank in loaded],
        "rank_load_s": [round(rank["seconds"], 2) for rank in loaded],
    }


def _write_sharded(folder: Path) -> int:
    """Write a random checkpoint in several files with its index; return its size in bytes."""
    shapes = list(expected_shapes(SCALED_DOWN).items())
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(NUM_SHARD_FILES):
        file = f"model-{number + 1:05d}-of-{NUM_SHARD_FILES:05d}.safetensors"
        part = shapes[number::NUM_SHARD_FILES]
        tensors = {name: torch.randn(shape) * 0.02 for name, shape in part}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(
        folder,
        TextManifest(name="scaled", config=SCALED_DOWN, origin="random", licence="none"),
    )
    return total
