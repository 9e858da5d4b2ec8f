"""Attention over a paged cache: a step as a batch, the blocks of its sequences, and the cache.

A batch has one row per new token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.weights import Shard

MAX_PADDING_RATIO = 1.5
"""Sequences share one attention call if that reads at most this times the blocks they hold."""


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence that is attended to by itself: rows begin..end of the batch."""

    begin: int
    end: int
    slots: slice | Tensor
    """Cache slots of all tokens of the sequence."""
    mask: Tensor | None
    """[T, S]: the positions that each new token sees; none: all of them, or causal if T = S."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one new token each and about equal length, padded to the longest one."""

    rows: Tensor  # [b] rows of the batch
    blocks: Tensor  # [b * blocks of the longest sequence]
    score_bias: Tensor  # [b, 1, 1, S] added to the scores: 0, or -inf beyond a sequence's end


class Batch:
    """T new tokens of several sequences, whose keys and values lie in blocks of P tokens."""

    def __init__(self, step: Step, block_tokens: int, device: torch.device | str = "cpu") -> None:
        """Raise `ValueError` if the blocks of a sequence cannot hold its tokens."""
        self.device = torch.device(device)
        self._block_tokens, self._inputs = block_tokens, step.inputs
        for sequence in step.inputs:
            _check_room(sequence, block_tokens)
        self.tokens = self._tensor([token for s in step.inputs for token in s.tokens])
        self.positions = self._tensor(
            [p for s in step.inputs for p in range(s.start, s.start + len(s.tokens))]
        )
        self.new_slots = self._index(
            [slot for s in step.inputs for slot in self._slots(s, s.start)]
        )
        self.spans, self.groups = self._split_sequences()
        self.best_rows, self.logits_rows, self.output_rows = _select_rows(step.inputs)

    @property
    def is_decode_only(self) -> bool:
        """Whether every sequence has exactly one new token."""
        return len(self.tokens) == len(self._inputs)

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

    def _split_sequences(self) -> tuple[tuple[Span, ...], tuple[DecodeGroup, ...]]:
        """Return the sequences attended to one by one, and those attended to together.

        To copy the blocks of several sequences into one padded tensor and attend once is 1.7x
        faster on a CPU than to attend to each in place (16 sequences of 256 tokens).
        """
        spans, singles, begin = [], [], 0
        for sequence in self._inputs:
            end = begin + len(sequence.tokens)
            if len(sequence.tokens) == 1:
                singles.append((begin, sequence))
            else:
                slots = self._index(self._slots(sequence))
                spans.append(Span(begin, end, slots, self._mask(sequence)))
            begin = end
        if len(singles) == 1:
            row, sequence = singles.pop()
            spans.append(Span(row, row + 1, self._index(self._slots(sequence)), None))
        parts = self._split_by_length(singles)
        return tuple(spans), tuple(self._pad_group(part) for part in parts)

    def _mask(self, sequence: SequenceInput) -> Tensor | None:
        if not sequence.start:
            return None
        shape = len(sequence.tokens), sequence.start + len(sequence.tokens)
        return torch.ones(shape, dtype=torch.bool, device=self.device).tril(sequence.start)

    def _split_by_length(
        self, singles: list[tuple[int, SequenceInput]]
    ) -> list[list[tuple[int, SequenceInput]]]:
        """Return groups of about equal length, longest first."""
        parts: list[list[tuple[int, SequenceInput]]] = []
        own = widest = 0
        for row, sequence in sorted(singles, key=lambda single: -single[1].start):
            blocks = self._used_blocks(sequence)
            if not parts or (len(parts[-1]) + 1) * widest > MAX_PADDING_RATIO * (own + blocks):
                parts.append([])
                own, widest = 0, blocks
            parts[-1].append((row, sequence))
            own += blocks
        return parts

    def _pad_group(self, singles: Sequence[tuple[int, SequenceInput]]) -> DecodeGroup:
        widest = self._used_blocks(singles[0][1])
        blocks = [[*sequence.blocks[:widest]] for _, sequence in singles]
        padded = [row + [0] * (widest - len(row)) for row in blocks]
        ends = self._tensor([sequence.start for _, sequence in singles])
        beyond = torch.arange(widest * self._block_tokens, device=self.device) > ends[:, None]
        bias = torch.zeros(beyond.shape, device=self.device).masked_fill_(beyond, float("-inf"))
        return DecodeGroup(
            rows=self._tensor([row for row, _ in singles]),
            blocks=self._tensor([block for row in padded for block in row]),
            score_bias=bias[:, None, None],
        )

    def _used_blocks(self, sequence: SequenceInput) -> int:
        return sequence.start // self._block_tokens + 1

    def _slots(self, sequence: SequenceInput, start: int = 0) -> list[int]:
        """Return the cache slots of a sequence from position `start` to its last new token."""
        size, blocks = self._block_tokens, sequence.blocks
        end = sequence.start + len(sequence.tokens)
        return [blocks[at // size] * size + at % size for at in range(start, end)]

    def _index(self, slots: Sequence[int]) -> slice | Tensor:
        """Return a slice for consecutive slots (indexing then makes a view), else an index."""
        if list(slots) == list(range(slots[0], slots[0] + len(slots))):
            return slice(slots[0], slots[0] + len(slots))
        return self._tensor(slots)

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def _check_room(sequence: SequenceInput, block_tokens: int) -> None:
    length = sequence.start + len(sequence.tokens)
    if length > len(sequence.blocks) * block_tokens:
        raise ValueError(
            f"blocks: expected room for {length} tokens, "
            f"got {len(sequence.blocks)} of {block_tokens}"
        )


def _select_rows(inputs: Sequence[SequenceInput]) -> tuple[list[int], list[int], list[int]]:
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


class PagedCache:
    """The paged cache of one rank: [layers, 2, blocks, P, K_r, d].

    A block has P tokens; the rank has K_r key/value heads of width d. Source: paged attention
    (arXiv 2309.06180). On a CPU, blocks are copied into one tensor, except for a sequence that is
    attended to by itself and whose blocks are adjacent. On a GPU, kernels write the slots and read
    the block table.
    """

    def __init__(
        self,
        config: LlamaConfig,
        shard: Shard,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        kv_heads = len(shard.kv_heads)
        shape = (config.layers, 2, blocks * block_tokens, kv_heads, config.head_dim)
        self._memory = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = [(layer[0], layer[1]) for layer in self._memory.unbind(0)]
        self.block_tokens = block_tokens
        self._gathered = (self._memory.new_empty(0), self._memory.new_empty(0))
        self.uses_kernels = self._memory.is_cuda

    @property
    def bytes(self) -> int:
        """Memory of the cache in bytes."""
        return self._memory.nbytes

    def append(self, layer: int, batch: Batch, k: Tensor, v: Tensor) -> None:
        """Store the new tokens' k and v, both [T, K_r, d], in the slots of their blocks."""
        keys, values = self._layers[layer]
        keys[batch.new_slots] = k
        values[batch.new_slots] = v

    def rotate_and_append(
        self, layer: int, batch: Batch, qkv: Tensor, tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the rotated queries [T, H_r, d] of qkv [T, H_r + 2 K_r, d], and store the rest.

        One kernel rotates queries and keys by `tables`, cosines and sines [positions, d / 2], and
        stores keys and values like `append`.
        """
        from ladderstitch_kernels.ops.rope_append import rope_append

        return rope_append(
            qkv, *tables, batch.positions, batch.new_slot_numbers, *self._pages(layer)
        )

    def attend(self, layer: int, batch: Batch, q: Tensor) -> Tensor:
        """Return the causal attention of queries q [T, H_r, d] over their sequences; as q.

        It is computed in the cache's dtype, which paths of other dtypes share.
        """
        keys, values = self._layers[layer]
        if self.uses_kernels and batch.is_decode_only:
            from ladderstitch_kernels.ops.decode_attention import paged_decode_attention

            pages = self._pages(layer)
            return paged_decode_attention(q, *pages, batch.block_table, batch.sequence_lengths)
        if len(batch.spans) == 1 and not batch.groups:
            (span,) = batch.spans
            cast = q.to(keys.dtype)
            return _attend_span(cast, keys[span.slots], values[span.slots], span).to(q.dtype)
        mixed = torch.empty_like(q, dtype=keys.dtype)
        for group in batch.groups:
            rows = group.rows
            mixed[rows] = self._attend_group(keys, values, q[rows].to(keys.dtype), group)
        for span in batch.spans:
            part = q[span.begin : span.end].to(keys.dtype)
            attended = _attend_span(part, keys[span.slots], values[span.slots], span)
            mixed[span.begin : span.end] = attended
        return mixed.to(q.dtype)

    def _pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of a layer by block, both [blocks, P, K_r, d]."""
        keys, values = self._layers[layer]
        paged = (-1, self.block_tokens, *keys.shape[1:])
        return keys.view(paged), values.view(paged)

    def _attend_group(self, keys: Tensor, values: Tensor, q: Tensor, group: DecodeGroup) -> Tensor:
        """Return the attention of q [b, H_r, d] over the blocks of b sequences; as q."""
        count, heads, width = q.shape
        kv_heads = keys.shape[1]
        k, v = (
            self._gather(side, cached, group.blocks).view(count, -1, kv_heads, width)
            for side, cached in enumerate((keys, values))
        )
        grouped = q.reshape(count, kv_heads, heads // kv_heads, width)
        bias = group.score_bias.to(q.dtype)
        mixed = F.scaled_dot_product_attention(
            grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias
        )
        return mixed.reshape(q.shape)

    def _gather(self, side: int, cached: Tensor, blocks: Tensor) -> Tensor:
        """Return a copy of the blocks in order, in a buffer that all layers reuse."""
        paged = cached.view(-1, self.block_tokens * cached[0].numel())
        size = len(blocks) * paged.shape[1]
        if len(self._gathered[side]) < size:
            self._gathered = (cached.new_empty(size), cached.new_empty(size))
        out = self._gathered[side][:size].view(len(blocks), -1)
        return torch.index_select(paged, 0, blocks, out=out)


def _attend_span(q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    """Return the attention of q [T, H_r, d], the last T of S positions, over k, v [S, K_r, d]."""
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if tokens == 1:  # the heads of a KV group are independent queries over the same keys
        grouped = q.reshape(1, kv_heads, heads // kv_heads, width)
        return F.scaled_dot_product_attention(grouped, k, v).reshape(1, heads, width)
    mixed = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k,
        v,
        attn_mask=span.mask,
        is_causal=span.mask is None,
        enable_gqa=heads != kv_heads,
    )
    return mixed[0].transpose(0, 1)
