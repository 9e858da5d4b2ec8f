"""A step as a batch: one row per new token, and the places of its sequences in the paged cache."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.onnx_attention import ArrayIndex, CacheIndex, LoneSequence


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence of a batch: its rows begin..end, and its place in the cache."""

    begin: int
    end: int
    slots: slice | Tensor
    """Cache slots of all tokens of the sequence."""
    mask: Tensor | None
    """[T, S]: the positions that each new token sees; none: all of them, or causal if T = S."""


class Batch:
    """T new tokens of several sequences, whose keys and values lie in blocks of P tokens."""

    def __init__(self, step: Step, block_tokens: int, device: torch.device | str = "cpu") -> None:
        """Raise `ValueError` if the blocks of a sequence cannot hold its tokens."""
        self.device = torch.device(device)
        self._block_tokens, self._inputs = block_tokens, step.inputs
        self._spans: dict[int | None, tuple[Span, ...]] = {}
        self._indices: dict[int | None, CacheIndex] = {}
        for sequence in step.inputs:
            _check_room(sequence, block_tokens)
        self.tokens = self._tensor([token for s in step.inputs for token in s.tokens])
        self.positions = self._tensor(
            [p for s in step.inputs for p in range(s.start, s.start + len(s.tokens))]
        )
        if len(step.inputs) == 1:
            self.new_slots = self._slots(step.inputs[0], step.inputs[0].start)
        else:
            numbers = [self._slot_numbers(s, s.start) for s in step.inputs]
            self.new_slots = torch.from_numpy(np.concatenate(numbers)).to(self.device)
        self.best_rows, self.logits_rows, self.output_rows = select_rows(step.inputs)

    @property
    def is_decode_only(self) -> bool:
        """Whether every sequence has exactly one new token."""
        return len(self.tokens) == len(self._inputs)

    def sequences(self, window: int | None = None) -> tuple[Span, ...]:
        """Return all sequences in order; with a `window`, a token sees only that many tokens."""
        if window not in self._spans:
            spans, begin = [], 0
            for sequence in self._inputs:
                end = begin + len(sequence.tokens)
                first = 0 if window is None else max(0, sequence.start + 1 - window)
                mask = self._mask(sequence, first, window) if end > begin + 1 else None
                spans.append(Span(begin, end, self._slots(sequence, first), mask))
                begin = end
            self._spans[window] = tuple(spans)
        return self._spans[window]

    def cache_index(self, window: int | None = None) -> CacheIndex:
        """Return the places of the batch in a cache on a CPU, as indices of arrays."""
        if window not in self._indices:
            sequences = []
            for span in self.sequences(window):
                mask, tokens = None, span.end - span.begin
                if tokens > 1:
                    mask = np.tri(tokens, dtype=bool) if span.mask is None else span.mask.numpy()
                rows = slice(span.begin, span.end)
                sequences.append(LoneSequence(rows, _array_index(span.slots), mask))
            self._indices[window] = CacheIndex(_array_index(self.new_slots), tuple(sequences))
        return self._indices[window]

    @cached_property
    def block_table(self) -> Tensor:
        """[B, most blocks of a sequence] int32, padded with 0, for kernels that read it."""
        most = max(len(sequence.blocks) for sequence in self._inputs)
        rows = [[*s.blocks, *[0] * (most - len(s.blocks))] for s in self._inputs]
        return torch.tensor(rows, dtype=torch.int32, device=self.device)

    @cached_property
    def sequence_lengths(self) -> Tensor:
        """[B] int32: the number of tokens of each sequence, including the new ones."""
        lengths = [sequence.start + len(sequence.tokens) for sequence in self._inputs]
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    @cached_property
    def new_slot_numbers(self) -> Tensor:
        """[T] int64: the cache slots of the new tokens, for kernels that read them."""
        if isinstance(self.new_slots, Tensor):
            return self.new_slots
        return torch.arange(self.new_slots.start, self.new_slots.stop, device=self.device)

    def _mask(self, sequence: SequenceInput, first: int, window: int | None) -> Tensor | None:
        """Return which of the positions from `first` on each new token sees; none: causal."""
        length = sequence.start + len(sequence.tokens)
        if not sequence.start and (window is None or length <= window):
            return None
        shape, last = (len(sequence.tokens), length - first), sequence.start - first
        seen = torch.ones(shape, dtype=torch.bool, device=self.device).tril(last)
        return seen if window is None else seen.triu(last + 1 - window)

    def _slots(self, sequence: SequenceInput, start: int = 0) -> slice | Tensor:
        """Return the cache slots of a sequence from position `start` to its last new token.

        Adjacent slots are a slice, with which indexing makes a view.
        """
        size, end = self._block_tokens, sequence.start + len(sequence.tokens)
        begin, stop = start // size, -(-end // size)
        used, first = list(sequence.blocks[begin:stop]), sequence.blocks[begin]
        if used == list(range(first, first + len(used))):
            offset = (first - begin) * size
            return slice(offset + start, offset + end)
        return torch.from_numpy(self._slot_numbers(sequence, start)).to(self.device)

    def _slot_numbers(self, sequence: SequenceInput, start: int) -> NDArray[np.int64]:
        """Return the cache slots as numbers, as `_slots` does."""
        size, end = self._block_tokens, sequence.start + len(sequence.tokens)
        positions = np.arange(start, end)
        slots: NDArray[np.int64] = np.asarray(sequence.blocks, np.int64)[positions // size] * size
        return slots + positions % size

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def find_sequences(inputs: Sequence[SequenceInput], rows: Tensor) -> list[int]:
    """Return the numbers of the sequences that have at least one of the rows, a mask [T]."""
    found = set(rows.nonzero().flatten().tolist())
    if not found:
        return []
    ends = list(accumulate(len(sequence.tokens) for sequence in inputs))
    return sorted({bisect_right(ends, row) for row in found})


def _check_room(sequence: SequenceInput, block_tokens: int) -> None:
    length = sequence.start + len(sequence.tokens)
    if length > len(sequence.blocks) * block_tokens:
        raise ValueError(
            f"blocks: expected room for {length} tokens, "
            f"got {len(sequence.blocks)} of {block_tokens}"
        )


def select_rows(inputs: Sequence[SequenceInput]) -> tuple[list[int], list[int], list[int]]:
    """Return three lists of rows: for the best token, for whole logits, and to compute.

    The first two index the computed logits, the third indexes the new tokens of the batch.
    """
    best: list[int] = []
    whole: list[int] = []
    output: list[int] = []
    begin = 0
    for sequence in inputs:
        end, mode = begin + len(sequence.tokens), sequence.logits_mode
        if mode != LogitsMode.NONE:
            rows = range(begin, end) if mode == LogitsMode.ALL else range(end - 1, end)
            (best if mode == LogitsMode.BEST else whole).extend(
                range(len(output), len(output) + len(rows))
            )
            output.extend(rows)
        begin = end
    return best, whole, output


def _array_index(slots: slice | Tensor) -> ArrayIndex:
    return slots if isinstance(slots, slice) else slots.numpy()
