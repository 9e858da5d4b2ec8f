"""The cost of changes of path within an answer, measured on held-out text as answers are served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.runtime.device import versions
from ladderstitch.text.comm.base import SingleRankCommunicator
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.engine.rank_models import RankModel
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.stitched import FamilyPath
from ladderstitch.text.switches import Penalty, SwitchTable

CONTEXT_TOKENS, NEXT_TOKENS = 256, 64
"""Tokens before a change, and tokens after it over which the divergence is a mean."""


@dataclass(frozen=True, slots=True)
class PathRunner:
    """The paths of a model on one rank, with a cache for one sequence."""

    config: RankConfig
    models: Sequence[RankModel]
    cache: PagedCache

    def run(self, path: int, tokens: Tensor, start: int, mode: LogitsMode) -> Tensor:
        """Return the logits of tokens [T] at positions from `start` on; none with mode `NONE`."""
        plans = self.config.plans(path)
        batch = self._batch(tokens, start, mode)
        return self.models[path].forward(batch, self.cache, plans, SingleRankCommunicator())

    def translate(self, source: int, target: int, tokens: Tensor) -> None:
        """Fill what a target path lacks of tokens [T] that a source path has computed."""
        model = self.models[target]
        if isinstance(model, FamilyPath):
            routes = self.config.path_routes
            batch = self._batch(tokens, 0, LogitsMode.NONE)
            model.model.translate(
                batch, self.cache, routes[source], routes[target], SingleRankCommunicator()
            )

    def _batch(self, tokens: Tensor, start: int, mode: LogitsMode) -> Batch:
        blocks = range(self.config.blocks)
        sequence = SequenceInput(tokens.tolist(), start, blocks, mode)
        return Batch(Step((sequence,)), self.config.block_tokens)


@torch.inference_mode()
def measure_switches(
    runner: PathRunner,
    kinds: Mapping[int, int],
    windows: Tensor,
    context: int,
    data: str,
    on_progress: Callable[[int], None] = lambda n: None,
) -> SwitchTable:
    """Return the penalties of all changes between paths of different kinds.

    `kinds` has the kind of each path that is measured. Of each window [W, T], a source path
    computes `context` tokens and a target path the others. Their predictions are compared with
    those of the target path for the whole window.
    """
    paths = sorted(kinds)
    sums = {(a, b): 0.0 for a in paths for b in paths if kinds[a] != kinds[b]}
    for window in windows:
        before, after = window[:context], window[context:]
        alone = {target: _predict_after(runner, target, before, after) for target in paths}
        for source in paths:
            runner.run(source, before, 0, LogitsMode.NONE)
            for target in paths:
                if kinds[source] == kinds[target]:
                    continue
                runner.translate(source, target, before)
                mixed = _log_probabilities(runner.run(target, after, context, LogitsMode.ALL))
                divergence = F.kl_div(mixed, alone[target], reduction="sum", log_target=True)
                sums[source, target] += float(divergence) / len(after)
        on_progress(1)
    return SwitchTable(
        data=data,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        context=context,
        tokens=windows.shape[1] - context,
        windows=len(windows),
        penalties=tuple(
            Penalty(source=source, target=target, nats=max(0.0, total / len(windows)))
            for (source, target), total in sums.items()
        ),
    )


def _predict_after(runner: PathRunner, path: int, before: Tensor, after: Tensor) -> Tensor:
    """Return the log probabilities [T, V] of a path that has computed all tokens before."""
    runner.run(path, before, 0, LogitsMode.NONE)
    return _log_probabilities(runner.run(path, after, len(before), LogitsMode.ALL))


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)
