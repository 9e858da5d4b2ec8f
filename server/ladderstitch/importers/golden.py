"""Recorded outputs of original language-model implementations, run again here on 1 to 4 ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ladderstitch.importers.llama_layouts import from_gpt_fast, gpt_fast_config
from ladderstitch.text.comm.base import Link
from ladderstitch.text.comm.threads import run_ranks
from ladderstitch.text.model.attention_batch import Batch
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.kv_cache import PagedCache
from ladderstitch.text.model.llama import Transformer
from ladderstitch.text.model.residual import Residual, plan_layers
from ladderstitch.text.model.sharding import Shard
from ladderstitch.text.model.weight_reader import MemoryWeights
from ladderstitch.text.model.weights import load_rank
from ladderstitch.text.step import Want, aligned

FAMILIES = ("hf-llama", "ladder-llama", "desync-gpt", "parallel-gpt")
RANK_COUNTS = (1, 2, 4)
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Run:
    """One recorded output: which scheme, on which rank counts, in one pass or token by token."""

    output: str
    residual: Residual
    rank_counts: tuple[int, ...]
    incremental: bool


def recorded_runs(sheet: Mapping[str, Any]) -> Iterator[Run]:
    """Everything that a case's sheet records."""
    for entry in sheet["ids"]:
        residual, rank_counts = _scheme(entry, sheet["family"])
        if sheet["family"] == "hf-llama":
            yield Run(entry["id"], residual, rank_counts, entry["id"] == "incremental")
            continue
        yield Run(entry["id"], residual, rank_counts, incremental=False)
        yield Run(f"{entry['id']}.incremental", residual, rank_counts, incremental=True)


def _scheme(entry: Mapping[str, Any], family: str) -> tuple[Residual, tuple[int, ...]]:
    if family == "ladder-llama":
        return Residual(scheme="ladder", ladder_layers=tuple(entry["ladder_layers"])), RANK_COUNTS
    match entry.get("kind"):
        case "desync":
            ranks, pattern = entry["tensor_parallel_size"], entry["reduce_after"]
            return Residual(scheme="desync", reduce_after=pattern, ranks=ranks), (ranks,)
        case "ladder":
            return Residual(scheme="ladder"), RANK_COUNTS
        case "parallel":
            return Residual(scheme="parallel"), RANK_COUNTS
    return Residual(), RANK_COUNTS


def read_model(
    sheet: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Configuration and weights of a case, in our layout."""
    if "hf_config" in sheet["config"]:
        return LlamaConfig.from_hf(sheet["config"]["hf_config"]), dict(tensors)
    config = gpt_fast_config(sheet["config"]["model_args"])
    return config, from_gpt_fast(tensors, config)


def run_case(
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    tokens: Tensor,
    run: Run,
    ranks: int,
    prefill: int,
) -> Tensor:
    """Logits [B, T, V] in float32, in one pass or as a prefill followed by single tokens."""
    plans = plan_layers(run.residual, config.layers, ranks)
    shared_norm = plans[0].fused

    def work(link: Link) -> Tensor:
        shard = Shard.of(config, link.rank, ranks)
        held = load_rank(MemoryWeights(weights), config, shard, shared_norm=shared_norm)
        model = Transformer(config, held, shard)
        rows, length = tokens.shape
        blocks_each = -(-length // BLOCK_TOKENS)
        cache = PagedCache(config, shard, rows * blocks_each, BLOCK_TOKENS)
        starts = [0, *range(prefill, length)] if run.incremental else [0]
        parts = []
        for start, end in pairwise([*starts, length]):
            step = aligned(tokens[:, start:end].numpy(), start, 0, blocks_each, Want.ALL)
            logits = model.forward(Batch(step, BLOCK_TOKENS), cache, plans, link)
            parts.append(logits.view(rows, end - start, -1))
        return torch.cat(parts, dim=1)

    return torch.cat(run_ranks(ranks, work), dim=-1)
