"""A step as one rank computes it: all fresh tokens in one row, and a span for each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ladderstitch.language.step import Run, Step, Want


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's fresh rows begin..end of the batch, and the cache slots of all its tokens."""

    begin: int
    end: int
    slots: slice | Tensor
    mask: Tensor | None
    """[T, S]: what fresh tokens see of earlier ones; none: everything, or just causal."""


class Batch:
    """N fresh tokens of several sequences, whose keys and values lie in blocks of P tokens."""

    def __init__(self, step: Step, block_tokens: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._block_tokens, self._runs = block_tokens, step.runs
        slots = [_slots(run, block_tokens) for run in step.runs]
        self.tokens = self._tensor([token for run in step.runs for token in run.tokens])
        self.positions = self._tensor(
            [p for run in step.runs for p in range(run.start, run.start + len(run.tokens))]
        )
        self.fresh = self._pick(
            [s for run, own in zip(step.runs, slots, strict=True) for s in own[run.start :]]
        )
        self.spans = self._spans(slots)
        self.best_rows, self.full_rows, self.wanted = _rows(step.runs)

    @property
    def decodes(self) -> bool:
        """Whether every sequence has one fresh token."""
        return len(self.tokens) == len(self._runs)

    @cached_property
    def pages(self) -> Tensor:
        """[B, most blocks] int32, for kernels that follow the block table themselves."""
        most = max(len(run.blocks) for run in self._runs)
        rows = [[*run.blocks, *[0] * (most - len(run.blocks))] for run in self._runs]
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    @cached_property
    def lengths(self) -> Tensor:
        """[B] int32: tokens of each sequence, the fresh ones included."""
        seen = [run.start + len(run.tokens) for run in self._runs]
        return torch.tensor(seen, dtype=torch.int32, device=self.device)

    def _spans(self, slots: Sequence[Sequence[int]]) -> tuple[Span, ...]:
        spans, begin = [], 0
        for run, own in zip(self._runs, slots, strict=True):
            end = begin + len(run.tokens)
            mask = None
            if len(run.tokens) > 1 and run.start:
                ones = torch.ones(len(run.tokens), len(own), dtype=torch.bool, device=self.device)
                mask = ones.tril(run.start)
            spans.append(Span(begin, end, self._pick(own), mask))
            begin = end
        return tuple(spans)

    def _pick(self, slots: Sequence[int]) -> slice | Tensor:
        """Neighbours are a view, others an index."""
        if list(slots) == list(range(slots[0], slots[0] + len(slots))):
            return slice(slots[0], slots[0] + len(slots))
        return self._tensor(slots)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def _slots(run: Run, block_tokens: int) -> list[int]:
    """Where each token of a sequence lies in the cache, the fresh ones included."""
    seen = run.start + len(run.tokens)
    if seen > len(run.blocks) * block_tokens:
        raise ValueError(
            f"blocks: expected room for {seen} tokens, got {len(run.blocks)} of {block_tokens}"
        )
    return [b * block_tokens + i for b in run.blocks for i in range(block_tokens)][:seen]


def _rows(runs: Sequence[Run]) -> tuple[list[int], list[int], list[int]]:
    """Rows of the logits that want the best token, that are wanted whole; rows of the batch that
    have logits."""
    best: list[int] = []
    full: list[int] = []
    wanted: list[int] = []
    begin = 0
    for run in runs:
        end = begin + len(run.tokens)
        if run.want != Want.NONE:
            rows = range(begin, end) if run.want == Want.ALL else range(end - 1, end)
            (best if run.want == Want.BEST else full).extend(
                range(len(wanted), len(wanted) + len(rows))
            )
            wanted.extend(rows)
        begin = end
    return best, full, wanted
