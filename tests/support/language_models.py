"""A tiny language model with random weights, and reference ways to run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ladderstitch.scheduling.profiles import Quality, QualityTable
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.comm.base import SingleRankCommunicator
from ladderstitch.text.manifest import TextManifest, TextVariant, write_manifest
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import Weights
from ladderstitch.text.model.weights import expected_shapes, load_rank

TINY = DecoderConfig(
    vocab_size=257,
    hidden_size=48,
    intermediate_size=100,
    layers=3,
    heads=6,
    kv_heads=3,
    head_dim=8,
    max_positions=128,
    tied_head=True,
)
END = 256


def random_tensors(config: DecoderConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random tensors of a checkpoint with this configuration."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)
        for name, shape in expected_shapes(config).items()
    }


def made_up_quality(paths: int) -> QualityTable:
    """Return a table with qualities 0.6, 0.5, ... for the given number of paths."""
    return QualityTable(
        metric="next-token accuracy",
        data="nothing",
        n=1,
        confidence=0.95,
        date="2026-01-01",
        versions={},
        variants={
            n: Quality(value=0.6 - 0.1 * n, low=0.0, high=1.0, perplexity=10.0 + n)
            for n in range(paths)
        },
    )


def write_tiny(
    path: Path, residual: ResidualScheme | None = None, paths: tuple[TextVariant, ...] = ()
) -> Path:
    """Write a bundle with one token per byte and an end token, and return its path.

    The paths have qualities 0.6, 0.5, ...
    """
    manifest = TextManifest(
        name="tiny",
        config=TINY,
        residual=residual or ResidualScheme(),
        paths=paths,
        end_tokens=(END,),
        origin="random weights",
        licence="Apache-2.0",
    )
    write_manifest(path, manifest)
    save_file(random_tensors(TINY), path / "model.safetensors")
    if paths:
        (path / "quality.json").write_text(made_up_quality(len(paths)).model_dump_json())
    write_byte_tokenizer(path / "tokenizer.json")
    return path


def write_byte_tokenizer(file: Path) -> None:
    """Write a tokenizer with one token per byte and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<end>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(file))


def one_rank_logits(config: DecoderConfig, weights: Weights, tokens: list[int]) -> torch.Tensor:
    """Return the logits [T, V] of one sequence in one pass, on the standard path, in-process."""
    shard = Shard.of(config, 0, 1)
    model = Transformer(config, load_rank(weights, config, shard), shard)
    cache = PagedCache(config, shard, 1, len(tokens))
    step = Step((SequenceInput(tokens, 0, [0], LogitsMode.ALL),))
    plans = plan_layers(ResidualScheme(), config.layers, 1)
    return model.forward(Batch(step, len(tokens)), cache, plans, SingleRankCommunicator())


def greedy(bundle: TextBundle, prompt: str, count: int) -> list[int]:
    """Return the greedy answer, computed without a cache: the whole sequence for every token."""
    tokens = bundle.tokenizer().encode(prompt)
    begin = len(tokens)
    for _ in range(count):
        logits = one_rank_logits(bundle.manifest.config, bundle.weights(), tokens)
        tokens.append(int(logits[-1].argmax()))
        if tokens[-1] == END:
            break
    return tokens[begin:]


@pytest.fixture(scope="session")
def tiny_language_bundle(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """Return a model with 3 layers, 6 query and 3 KV heads and 257 tokens."""
    return TextBundle.load(write_tiny(tmp_path_factory.mktemp("bundles") / "tiny"))
