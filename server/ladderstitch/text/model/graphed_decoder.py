"""Decoding steps as CUDA graphs: one captured pass per batch bucket, replayed.

A decoding step on a GPU launches about twelve kernels per layer, each of which takes longer to
launch than to run. Replaying a captured step is one launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ladderstitch.runtime.cuda_graphs import CapturedPass, GraphBackend, bucket_of
from ladderstitch.text.comm.base import Communicator
from ladderstitch.text.messages import LogitsMode, Step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.residual import LayerPlan
from ladderstitch.text.model.transformer import Transformer

log = logging.getLogger(__name__)

FIELDS = 4
"""Numbers of a row before its block table: token, position, new slot, length."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a rank computes for the L output rows of T new tokens."""

    logits: Tensor
    """[L, V_r] float32."""
    best: Tensor
    """[L] float32: the largest logit of each row."""
    best_tokens: Tensor
    """[L] int64: its row of this rank's vocabulary."""
    finite: Tensor
    """[T] bool: whether keys, values and logits of a token are finite."""


def compute_step(
    model: Callable[[], Tensor],
    cache: PagedCache,
    batch: Batch,
    output_rows: slice | list[int],
    planes: Sequence[int] | None = None,
) -> StepOutput:
    """Return the output of a forward pass of `batch`, which `model` runs.

    It writes the given planes of the cache, unset: all.
    """
    logits = model().float()
    finite = cache.has_finite_slots(batch, planes)
    if len(logits):  # -inf, too, is an overflow: no head has a bias
        finite[output_rows] &= torch.stack(logits.aminmax(dim=-1)).isfinite().all(dim=0)
    best = logits.max(dim=-1)
    return StepOutput(logits, best.values, best.indices, finite)


class FixedBatch(Batch):
    """A decoding step of B sequences in fixed memory: rows of `FIELDS` numbers and a block table.

    All tensors are computed from `rows` [B, FIELDS + blocks], int32, within the pass. Every row has
    an output.
    """

    def __init__(self, rows: Tensor) -> None:
        token, position, slot, length = rows[:, :FIELDS].unbind(1)
        self.device = rows.device
        self.tokens, self.positions = token.long(), position.long()
        self.new_slots = slot.long()
        self.sequence_lengths = length.contiguous()
        self.block_table = rows[:, FIELDS:].contiguous()
        self.output_rows = list(range(len(rows)))

    @property
    def is_decode_only(self) -> bool:
        """Always true."""
        return True


class GraphedDecoder:
    """Runs the decoding steps of one path by replaying a graph of the smallest bucket that fits.

    Buckets are the powers of two below `sequences`, and `sequences` itself. Rows that a bucket has
    in excess write to a block of their own, `spare_block`, and attend to nothing. The graphs read
    one buffer and share a pool, so that steps must not overlap.
    """

    def __init__(
        self,
        model: Transformer,
        cache: PagedCache,
        plans: Sequence[LayerPlan],
        comm: Communicator,
        *,
        sequences: int,
        sequence_blocks: int,
        spare_block: int,
        backend: GraphBackend,
    ) -> None:
        """Capture all buckets, the largest first."""
        self._model, self._cache, self._plans, self._comm = model, cache, plans, comm
        self._block_tokens = cache.block_tokens
        width = FIELDS + sequence_blocks
        self._padding = np.zeros(width, np.int32)
        self._padding[2] = spare_block * cache.block_tokens
        staging = torch.zeros(sequences, width, dtype=torch.int32)
        on_gpu = model.device.type == "cuda"
        self._staging = staging.pin_memory() if on_gpu else staging
        self._staged = self._staging.numpy()
        self._staged[:] = self._padding
        self._rows = self._staging.to(model.device)
        pool = backend.make_pool()
        self._passes: dict[int, CapturedPass[StepOutput]] = {}
        buckets = {bucket_of(size, sequences) for size in range(1, sequences + 1)}
        for bucket in sorted(buckets, reverse=True):
            run = self._pass_of(bucket)
            backend.warm_up(run)
            self._passes[bucket] = backend.capture(run, pool)

    def _pass_of(self, bucket: int) -> Callable[[], StepOutput]:
        @torch.inference_mode()
        def run() -> StepOutput:
            batch = FixedBatch(self._rows[:bucket])
            return compute_step(
                lambda: self._model.forward(batch, self._cache, self._plans, self._comm),
                self._cache,
                batch,
                slice(None),
            )

        return run

    def can_run(self, step: Step) -> bool:
        """Return whether a step decodes one token of each sequence, and has room in a bucket."""
        return len(step.inputs) <= len(self._staged) and all(
            len(sequence.tokens) == 1
            and sequence.logits_mode != LogitsMode.NONE
            and FIELDS + len(sequence.blocks) <= len(self._padding)
            for sequence in step.inputs
        )

    @torch.inference_mode()
    def __call__(self, step: Step) -> StepOutput:
        """Return the output of a step; its tensors are valid until the next one."""
        used = len(step.inputs)
        bucket = bucket_of(used, len(self._staged))
        for row, sequence in zip(self._staged, step.inputs, strict=False):
            position, block = sequence.start, sequence.blocks[sequence.start // self._block_tokens]
            slot = block * self._block_tokens + position % self._block_tokens
            row[:FIELDS] = sequence.tokens[0], position, slot, position + 1
            row[FIELDS : FIELDS + len(sequence.blocks)] = sequence.blocks
        self._staged[used:bucket] = self._padding
        self._rows[:bucket].copy_(self._staging[:bucket], non_blocking=True)
        captured = self._passes[bucket]
        captured.replay()
        whole = captured.output
        return StepOutput(
            whole.logits[:used], whole.best[:used], whole.best_tokens[:used], whole.finite[:used]
        )
