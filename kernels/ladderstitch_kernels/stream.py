"""The residual stream of a decoder's step, and its reductions in flight, also across a stitch.

A stitching layer S x = W x + b commutes with a sum over ranks: S(x + sum p) = S x + sum W p. A step
therefore maps the stream without the last sub-block, and maps the sum of this sub-block on its own:
after it has arrived, or, if the stitch narrows the stream, before it is sent. Either way the
smaller of both widths is sent, and nothing waits.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch_kernels.comm.split_phase import (
    Exchange,
    gemv_post,
    post,
    wait_add,
    wait_add_norm,
    wait_sum,
)
from ladderstitch_kernels.ops.add_rms_norm import add_rms_norm
from ladderstitch_kernels.ops.stitch_linear import stitch_linear, stitch_pending
from ladderstitch_kernels.reference import EPS


class Stitch(NamedTuple):
    """A stitching layer x -> x W^T + b from width K to width N."""

    weight: Tensor  # [N, K]
    bias: Tensor  # [N]

    @property
    def narrows(self) -> bool:
        """Whether N < K, so that a product is mapped before it is sent."""
        return self.weight.shape[0] < self.weight.shape[1]


def random_stitch(
    front: int, end: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Stitch:
    """Return a random stitching layer from width `front` to `end` that keeps the magnitude."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(end, front, generator=generator, device=device) * front**-0.5
    bias = torch.randn(end, generator=generator, device=device)
    return Stitch(weight.to(dtype), bias.to(dtype))


class Stream:
    """The stream [M, D] of one rank in one step; `lag` is the number of sums that reads leave out.

    A lag of 0 is the standard residual, and 1 the ladder.
    """

    def __init__(self, x: Tensor, exchange: Exchange, lag: int) -> None:
        self._x, self._exchange, self._lag = x, exchange, lag
        self._in_flight: deque[Stitch | None] = deque()
        """For each reduction in flight, oldest first: the stitch that maps it on arrival."""

    def read_normed(self, gain: Tensor) -> Tensor:
        """Return the RMS norm [M, D] of the stream, after adding the sums that are due."""
        if len(self._in_flight) <= self._lag:
            return F.rms_norm(self._x, gain.shape, gain, EPS)
        stitch = self._in_flight.popleft()
        if stitch is None:
            self._x, normed = wait_add_norm(self._x, gain, EPS, self._exchange)
        else:
            self._x, normed = add_rms_norm(self._arrive(stitch), self._x, gain, EPS)
        return normed

    def add_product(self, x: Tensor, weight: Tensor) -> None:
        """Add the sum over ranks of x @ weight.T, and return before it is complete."""
        gemv_post(x, weight, self._exchange)
        self._in_flight.append(None)

    def add_and_cross(self, x: Tensor, weight: Tensor, stitch: Stitch) -> None:
        """Add the sum over ranks of x @ weight.T, and map the stream with this sum in flight."""
        if stitch.narrows:
            partial = F.linear(x, weight)
            self._x, partial = stitch_pending(self.drain(), partial, *stitch)
            post(partial, self._exchange)
            self._in_flight.append(None)
        else:
            gemv_post(x, weight, self._exchange)
            self._x = stitch_linear(self.drain(), *stitch)
            self._in_flight.append(stitch)

    def drain(self) -> Tensor:
        """Return the stream [M, D] with all sums in flight, which end."""
        while self._in_flight:
            stitch = self._in_flight.popleft()
            if stitch is None:
                self._x = wait_add(self._x, self._exchange)
            else:
                self._x = self._x + self._arrive(stitch)
        return self._x

    def _arrive(self, stitch: Stitch) -> Tensor:
        """Return the oldest sum, which was sent in the width before a stitch, mapped by it."""
        total = wait_sum(self._x.shape[0], self._exchange, stitch.weight.shape[1])
        return stitch_linear(total, stitch.weight)
