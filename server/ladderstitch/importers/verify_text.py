"""Language-model cases of `verify`: runs of the serving forward pass on up to 4 ranks.

The first part reads a case and runs it. The second part is the communicator that it uses, whose
ranks are threads of this process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ladderstitch.errors import ConfigError, DataError
from ladderstitch.importers.gguf import from_gpt_fast, gpt_fast_config
from ladderstitch.importers.olmo import read_olmo
from ladderstitch.text.comm.base import (
    PEER_TIMEOUT_S,
    Communicator,
    PeerLost,
    Work,
    sum_in_rank_order,
)
from ladderstitch.text.hugging_face.architectures import Architecture, read_architecture
from ladderstitch.text.messages import LogitsMode, dense_step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.layout import LaidOutWeights
from ladderstitch.text.model.residual import ResidualScheme, narrow_plans, plan_layers
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import MemoryWeights, Weights
from ladderstitch.text.model.weights import load_rank

FAMILIES = (
    "hf-cohere",
    "hf-falcon",
    "hf-gemma2",
    "hf-gemma3-text",
    "hf-gpt-neox",
    "hf-granite",
    "hf-llama",
    "hf-mistral",
    "hf-olmo2",
    "hf-phi3",
    "hf-qwen2",
    "hf-qwen3",
    "hf-smollm3",
    "ladder-llama",
    "desync-gpt",
    "parallel-gpt",
    "parallel-groups",
    "matformer-olmo",
)
RANK_COUNTS = (1, 2, 4)
"""Rank counts to try; if a model cannot be split over one, the next smaller one that fits."""
BLOCK_TOKENS = 16
HF_CONFIGS = ("hf_config", "hf_config_transformers_5")
"""The `config.json` of a case as transformers 4 and 5 write it."""


@dataclass(frozen=True, slots=True)
class GoldenRun:
    """One recorded output: its residual scheme, its rank counts, and how it is computed.

    `incremental` is true for a prefill followed by single tokens, false for a single pass.
    """

    output: str
    residual: ResidualScheme
    rank_counts: tuple[int, ...]
    incremental: bool
    greedy_tokens: int = 0
    """Tokens to append by greedy decoding; the output is their logits."""
    ffn_widths: tuple[tuple[int, ...], ...] = ((),)
    """Widths of the MLPs, as `TextVariant` has them, of each pass; the last is that of the rest."""


def recorded_runs(metadata: Mapping[str, Any], architecture: Architecture) -> Iterator[GoldenRun]:
    """Yield every output that a case records, with the rank counts that fit the model.

    Raises `DataError` if the case was recorded on a rank count that does not fit.
    """
    config = architecture.config
    for entry in metadata["ids"]:
        if metadata["family"].startswith("hf-"):
            if entry["id"] != "greedy":  # its tokens are the best of `greedy_logits`
                new = metadata["config"].get("greedy_new_tokens", 0)
                yield GoldenRun(
                    entry["id"],
                    architecture.residual,
                    fitting_rank_counts(config),
                    incremental=entry["id"] != "full",
                    greedy_tokens=new if entry["id"] == "greedy_logits" else 0,
                )
            continue
        if metadata["family"] == "matformer-olmo":
            yield from _nested_runs(entry, config)
            continue
        residual, rank_counts = _read_scheme(entry, metadata["family"], config)
        yield GoldenRun(entry["id"], residual, rank_counts, incremental=False)
        yield GoldenRun(f"{entry['id']}.incremental", residual, rank_counts, incremental=True)


def _nested_runs(entry: Mapping[str, Any], config: DecoderConfig) -> Iterator[GoldenRun]:
    """Yield the outputs of a slice, of a slice per layer, or of changes from step to step."""
    counts, name, widest = fitting_rank_counts(config), entry["id"], config.intermediate_size
    if entry["kind"] == "switch":
        steps = tuple((widest // factor,) for factor in entry["factors_per_step"])
        yield GoldenRun(f"{name}.incremental", ResidualScheme(), counts, True, ffn_widths=steps)
        return
    factors = entry["factors"] if entry["kind"] == "mix" else [entry["factor"]]
    widths = (tuple(widest // factor for factor in factors),)
    for output, incremental in ((name, False), (f"{name}.incremental", True)):
        yield GoldenRun(output, ResidualScheme(), counts, incremental, ffn_widths=widths)


def fitting_rank_counts(config: DecoderConfig) -> tuple[int, ...]:
    """Return the rank counts to run a model on, e.g. 1, 2 and 3 for 6 query and 2 KV heads."""
    return tuple(sorted({_largest_fitting(config, wanted) for wanted in RANK_COUNTS}))


def _largest_fitting(config: DecoderConfig, wanted: int) -> int:
    """Return the largest rank count up to `wanted` over which the model can be split."""
    return next(ranks for ranks in range(wanted, 0, -1) if _fits(config, ranks) is None)


def _fits(config: DecoderConfig, ranks: int) -> ConfigError | None:
    """Return why the model cannot be split over a number of ranks; None if it can."""
    try:
        for rank in range(ranks):
            shard = Shard.of(config, rank, ranks)
            if not (shard.num_ffn_columns and shard.vocabulary):
                return ConfigError(f"ranks: expected a part of every matrix each, got {ranks}")
    except ConfigError as error:
        return error
    return None


def _read_scheme(
    entry: Mapping[str, Any], family: str, config: DecoderConfig
) -> tuple[ResidualScheme, tuple[int, ...]]:
    fitting = fitting_rank_counts(config)
    if family == "ladder-llama":
        return ResidualScheme(scheme="ladder", ladder_layers=tuple(entry["ladder_layers"])), fitting
    if family == "parallel-groups":
        groups = tuple((first, size) for first, size in entry["groups"])
        return ResidualScheme(scheme="groups", groups=groups), fitting
    match entry.get("kind"):
        case "desync":
            ranks, pattern = entry["tensor_parallel_size"], entry["reduce_after"]
            if (error := _fits(config, ranks)) is not None:
                raise DataError(f"{entry['id']}: recorded on {ranks} ranks; {error}")
            return ResidualScheme(scheme="desync", reduce_after=pattern, ranks=ranks), (ranks,)
        case "ladder":
            return ResidualScheme(scheme="ladder"), fitting
        case "parallel":
            return ResidualScheme(scheme="parallel"), fitting
    return ResidualScheme(), fitting


def read_model(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[tuple[Architecture, Weights]]:
    """Return the architecture and the weights of a case, once for each recorded `config.json`."""
    recorded = metadata["config"]
    if "hf_config" in recorded:
        layouts = [recorded[name] for name in HF_CONFIGS if name in recorded]
        read = [read_architecture(fields) for fields in layouts]
        return [(a, LaidOutWeights(MemoryWeights(tensors), a.layout, a.config)) for a in read]
    if metadata["family"] == "matformer-olmo":
        olmo = read_olmo(recorded)
        return [(olmo, LaidOutWeights(MemoryWeights(tensors), olmo.layout, olmo.config))]
    config = gpt_fast_config(recorded["model_args"])
    return [(Architecture(config), MemoryWeights(from_gpt_fast(tensors, config)))]


def run_case(
    config: DecoderConfig,
    weights: Weights,
    tokens: Tensor,
    run: GoldenRun,
    ranks: int,
    prefill: int,
) -> Tensor:
    """Return the logits [B, T, V] float32 of tokens [B, T].

    They are computed in one pass, or as a prefill of `prefill` tokens followed by single tokens. A
    greedy run returns the logits [B, N, V] from which the N new tokens are chosen, one by one.
    """
    config = config.limited_to(tokens.shape[1] + run.greedy_tokens)
    for _ in range(run.greedy_tokens - 1):
        best = _run_case(config, weights, tokens, run, ranks, prefill)[:, -1].argmax(-1)
        tokens = torch.cat((tokens, best[:, None]), dim=1)
    logits = _run_case(config, weights, tokens, run, ranks, prefill)
    return logits[:, -run.greedy_tokens :] if run.greedy_tokens else logits


def _run_case(
    config: DecoderConfig,
    weights: Weights,
    tokens: Tensor,
    run: GoldenRun,
    ranks: int,
    prefill: int,
) -> Tensor:
    plans = plan_layers(run.residual, config.layers, ranks)
    shared_norm = plans[0].fused

    def work(comm: Communicator) -> Tensor:
        shard = Shard.of(config, comm.rank, ranks)
        held = load_rank(weights, config, shard, shared_norm=shared_norm)
        model = Transformer(config, held, shard)
        rows, length = tokens.shape
        blocks_each = -(-length // BLOCK_TOKENS)
        cache = PagedCache(config, shard, rows * blocks_each, BLOCK_TOKENS)
        starts = [0, *range(prefill, length)] if run.incremental else [0]
        parts = []
        for number, (start, end) in enumerate(pairwise([*starts, length])):
            step = dense_step(tokens[:, start:end].numpy(), start, 0, blocks_each, LogitsMode.ALL)
            widths = run.ffn_widths[min(number, len(run.ffn_widths) - 1)]
            narrow = narrow_plans(plans, widths, config.intermediate_size)
            logits = model.forward(Batch(step, BLOCK_TOKENS), cache, narrow, comm)
            parts.append(logits.view(rows, end - start, -1))
        return torch.cat(parts, dim=1)

    return torch.cat(run_ranks(ranks, work), dim=-1)


Result = TypeVar("Result")


class _PartialExchange:
    """The place where the threads store their partials, by the number of the reduction."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._parts: dict[int, dict[int, Tensor]] = {}
        self._readers: dict[int, int] = {}
        self._aborted = False
        self._changed = threading.Condition()

    def put(self, number: int, rank: int, partial: Tensor) -> None:
        with self._changed:
            self._parts.setdefault(number, {})[rank] = partial
            self._changed.notify_all()

    def collect(self, number: int) -> list[Tensor]:
        with self._changed:
            self._changed.wait_for(lambda: self._aborted or self._is_full(number), PEER_TIMEOUT_S)
            if self._aborted or not self._is_full(number):
                raise PeerLost("another rank failed")
            parts = self._parts[number]
            self._readers[number] = self._readers.get(number, 0) + 1
            if self._readers[number] == self.ranks:
                del self._parts[number], self._readers[number]
        return [parts[rank] for rank in range(self.ranks)]

    def abort(self) -> None:
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def _is_full(self, number: int) -> bool:
        return len(self._parts.get(number, {})) == self.ranks


class ThreadCommunicator:
    """The communicator of a rank that is a thread of this process."""

    def __init__(self, exchange: _PartialExchange, rank: int) -> None:
        self.rank, self.ranks = rank, exchange.ranks
        self._exchange = exchange
        self._started = 0

    def all_reduce_async(self, partial: Tensor) -> Work:
        """Store the partial for the other threads."""
        self._started += 1
        self._exchange.put(self._started, self.rank, partial)
        return self._started

    def wait(self, work: Work) -> Tensor:
        """Return the sum; raises `PeerLost` if another thread failed."""
        return sum_in_rank_order(self._exchange.collect(work))

    def close(self) -> None:
        """Make the other threads' waits raise `PeerLost`."""
        self._exchange.abort()


def run_ranks(ranks: int, work: Callable[[Communicator], Result]) -> list[Result]:
    """Return the results of `work(comm)` on every rank, in order.

    Raises the error of the first rank that failed by itself.
    """
    exchange = _PartialExchange(ranks)

    def run(rank: int) -> Result:
        try:
            return work(ThreadCommunicator(exchange, rank))
        except BaseException:
            exchange.abort()
            raise

    with ThreadPoolExecutor(ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(ranks)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, PeerLost)), errors[0])
    return [future.result() for future in futures]
