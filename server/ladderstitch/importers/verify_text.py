"""Recorded outputs of original language-model implementations, run again here on 1 to 4 ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ladderstitch.importers.gguf import from_gpt_fast, gpt_fast_config
from ladderstitch.text.comm.base import Communicator, PeerLost, Work, sum_in_rank_order
from ladderstitch.text.model.attention_batch import Batch
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.kv_cache import PagedCache
from ladderstitch.text.model.llama import Transformer
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.weight_reader import MemoryWeights
from ladderstitch.text.model.weights import Shard, load_rank
from ladderstitch.text.step import LogitsMode, aligned

FAMILIES = ("hf-llama", "ladder-llama", "desync-gpt", "parallel-gpt")
RANK_COUNTS = (1, 2, 4)
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class GoldenRun:
    """One recorded output: which scheme, on which rank counts, in one pass or token by token."""

    output: str
    residual: ResidualScheme
    rank_counts: tuple[int, ...]
    incremental: bool


def recorded_runs(sheet: Mapping[str, Any]) -> Iterator[GoldenRun]:
    """Everything that a case's sheet records."""
    for entry in sheet["ids"]:
        residual, rank_counts = _scheme(entry, sheet["family"])
        if sheet["family"] == "hf-llama":
            yield GoldenRun(entry["id"], residual, rank_counts, entry["id"] == "incremental")
            continue
        yield GoldenRun(entry["id"], residual, rank_counts, incremental=False)
        yield GoldenRun(f"{entry['id']}.incremental", residual, rank_counts, incremental=True)


def _scheme(entry: Mapping[str, Any], family: str) -> tuple[ResidualScheme, tuple[int, ...]]:
    if family == "ladder-llama":
        return ResidualScheme(
            scheme="ladder", ladder_layers=tuple(entry["ladder_layers"])
        ), RANK_COUNTS
    match entry.get("kind"):
        case "desync":
            ranks, pattern = entry["tensor_parallel_size"], entry["reduce_after"]
            return ResidualScheme(scheme="desync", reduce_after=pattern, ranks=ranks), (ranks,)
        case "ladder":
            return ResidualScheme(scheme="ladder"), RANK_COUNTS
        case "parallel":
            return ResidualScheme(scheme="parallel"), RANK_COUNTS
    return ResidualScheme(), RANK_COUNTS


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
    run: GoldenRun,
    ranks: int,
    prefill: int,
) -> Tensor:
    """Logits [B, T, V] in float32, in one pass or as a prefill followed by single tokens."""
    plans = plan_layers(run.residual, config.layers, ranks)
    shared_norm = plans[0].fused

    def work(link: Communicator) -> Tensor:
        shard = Shard.of(config, link.rank, ranks)
        held = load_rank(MemoryWeights(weights), config, shard, shared_norm=shared_norm)
        model = Transformer(config, held, shard)
        rows, length = tokens.shape
        blocks_each = -(-length // BLOCK_TOKENS)
        cache = PagedCache(config, shard, rows * blocks_each, BLOCK_TOKENS)
        starts = [0, *range(prefill, length)] if run.incremental else [0]
        parts = []
        for start, end in pairwise([*starts, length]):
            step = aligned(tokens[:, start:end].numpy(), start, 0, blocks_each, LogitsMode.ALL)
            logits = model.forward(Batch(step, BLOCK_TOKENS), cache, plans, link)
            parts.append(logits.view(rows, end - start, -1))
        return torch.cat(parts, dim=1)

    return torch.cat(run_ranks(ranks, work), dim=-1)


WAIT_S = 60.0

Result = TypeVar("Result")


class _Meeting:
    """Where the threads leave their partial results, by number of the reduction."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.parts: dict[int, dict[int, Tensor]] = {}
        self.readers: dict[int, int] = {}
        self.broken = False
        self.changed = threading.Condition()

    def leave(self, number: int, rank: int, partial: Tensor) -> None:
        with self.changed:
            self.parts.setdefault(number, {})[rank] = partial
            self.changed.notify_all()

    def collect(self, number: int) -> list[Tensor]:
        with self.changed:
            self.changed.wait_for(
                lambda: self.broken or len(self.parts.get(number, {})) == self.ranks, WAIT_S
            )
            if self.broken or len(self.parts.get(number, {})) < self.ranks:
                raise PeerLost("another rank failed")
            parts = self.parts[number]
            self.readers[number] = self.readers.get(number, 0) + 1
            if self.readers[number] == self.ranks:
                del self.parts[number], self.readers[number]
        return [parts[rank] for rank in range(self.ranks)]

    def give_up(self) -> None:
        with self.changed:
            self.broken = True
            self.changed.notify_all()


class ThreadCommunicator:
    """One thread's end."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self.rank, self.ranks = rank, meeting.ranks
        self._meeting = meeting
        self._posted = 0

    def post(self, partial: Tensor) -> Work:
        self._posted += 1
        self._meeting.leave(self._posted, self.rank, partial)
        return self._posted

    def wait(self, ticket: Work) -> Tensor:
        return sum_in_rank_order(self._meeting.collect(ticket))

    def close(self) -> None:
        self._meeting.give_up()


def run_ranks(ranks: int, work: Callable[[Communicator], Result]) -> list[Result]:
    """The results of `work(link)` of every rank, in order; the first rank to fail raises."""
    meeting = _Meeting(ranks)

    def run(rank: int) -> Result:
        try:
            return work(ThreadCommunicator(meeting, rank))
        except BaseException:
            meeting.give_up()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, PeerLost)), errors[0])
    return [future.result() for future in futures]
