"""CUDA graphs of image networks: one captured pass per stitch and batch bucket, replayed.

A small batch on a GPU is bound by kernel launches, of which a transformer block has about fifteen.
Replaying a captured graph is one launch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch
from torch import Tensor

from ladderstitch.runtime.cuda_graphs import CapturedPass, GraphBackend, bucket_of
from ladderstitch.vision.models.executor import StitchExecutor

log = logging.getLogger(__name__)

MAX_GRAPHS = 128
"""Most graphs that are kept: 21 stitches with the 6 buckets up to 32 images, and two more."""

Pair = tuple[int, int]
"""A stitch and a batch bucket."""


class GraphedExecutor:
    """A `StitchExecutor` that captures a graph for each (stitch, batch bucket) at its first use.

    Buckets are the powers of two below the largest batch size, and that size itself. All graphs
    read one static input buffer and share one memory pool, so they cost little more than their
    outputs; calls must therefore not overlap. Above `max_graphs` the least recently used graph is
    dropped. A pair whose capture fails runs eagerly from then on. `captures` and
    `capture_failures` count.
    """

    def __init__(
        self,
        executor: StitchExecutor,
        backend: GraphBackend,
        input_shape: tuple[int, ...],
        device: torch.device,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        """Allocate the input buffer of shape [largest batch size, C, H, W] in float32."""
        self._executor, self._backend, self._max_graphs = executor, backend, max_graphs
        self._input = torch.zeros(input_shape, device=device)
        self._pool = backend.make_pool()
        self._passes: OrderedDict[Pair, CapturedPass[Tensor]] = OrderedDict()
        self._uncapturable: set[Pair] = set()
        self.captures = self.capture_failures = 0

    @torch.inference_mode()
    def __call__(self, images: Tensor, stitch: int) -> Tensor:
        """Return float32 logits [B, K] on the device of images [B, C, H, W] on any device.

        The logits are valid until the next call. Raises `KeyError` for an id that the family does
        not have, and `ValueError` for no images or more than the largest batch size.
        """
        batch_size = len(images)
        pair = stitch, self._bucket(batch_size)
        captured = self._passes.get(pair) or self._capture(pair)
        if captured is None:
            return self._executor(images.to(self._input.device, non_blocking=True), stitch)
        self._passes.move_to_end(pair)
        self._fill_input(images, pair[1])
        captured.replay()
        return captured.output[:batch_size]

    def _bucket(self, batch_size: int) -> int:
        """Return the smallest bucket that holds a batch."""
        largest = len(self._input)
        if not 0 < batch_size <= largest:
            raise ValueError(f"images: expected 1 to {largest}, got {batch_size}")
        return bucket_of(batch_size, largest)

    def _fill_input(self, images: Tensor, bucket: int) -> None:
        """Copy the images into the buffer, on the stream of the replay, and zero the other rows.

        No network computes across rows, so the padding cannot change a result. It is zeroed because
        the rows of an earlier request, or NaN among them, are not to be computed again.
        """
        batch_size = len(images)
        self._input[:batch_size].copy_(images, non_blocking=True)
        self._input[batch_size:bucket].zero_()

    def _capture(self, pair: Pair) -> CapturedPass[Tensor] | None:
        """Return the captured pass of a pair; None if its capture fails or has failed before.

        The least recently used graph is dropped after the capture, which has waited for the device:
        no replay of it is running then, and the pool always has a graph.
        """
        stitch, bucket = pair
        if pair in self._uncapturable:
            return None
        if stitch not in self._executor.plans:
            raise KeyError(stitch)
        images = self._input[:bucket]
        try:
            self._backend.warm_up(lambda: self._executor(images, stitch))
            captured = self._backend.capture(lambda: self._executor(images, stitch), self._pool)
        except Exception as error:  # the errors of CUDA and its libraries have no common class
            self._give_up(pair, error)
            return None
        self.captures += 1
        self._passes[pair] = captured
        if len(self._passes) > self._max_graphs:
            self._passes.popitem(last=False)
        return captured

    def _give_up(self, pair: Pair, error: Exception) -> None:
        """Let a pair run eagerly from now on.

        Later captures get a new pool: torch releases before 2.13 leave that of a failed capture in
        a state in which no capture can use it (pytorch/pytorch #180395, #190348).
        """
        self.capture_failures += 1
        self._uncapturable.add(pair)
        self._pool = self._backend.make_pool()
        log.warning(
            "capture failed stitch=%d bucket=%d failures=%d; the pair runs eagerly: %s: %s",
            *pair,
            self.capture_failures,
            type(error).__name__,
            error,
        )
