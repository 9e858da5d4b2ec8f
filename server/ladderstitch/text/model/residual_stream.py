"""The residual stream of a forward pass: reductions in flight, and stitching layers that map it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ladderstitch.runtime.linear import Product
from ladderstitch.text.comm.base import Communicator, FusedCommunicator, Work


class AffineMap(NamedTuple):
    """A stitching layer x -> matrix x + bias, from width D_front to D_end."""

    matrix: Tensor  # [D_end, D_front]
    bias: Tensor  # [D_end]

    @property
    def narrows(self) -> bool:
        """Whether the end is narrower, so that a sum over ranks is mapped before it is sent."""
        return self.matrix.shape[0] < self.matrix.shape[1]


@dataclass(frozen=True, slots=True)
class MappedWork:
    """A reduction in flight whose result will be mapped by a matrix [D_end, D_front]."""

    work: Work
    matrix: Tensor


class ResidualStream:
    """The residual stream of one forward pass on one rank, and its reductions in flight.

    It takes over the tensor [T, D] that it starts from.
    """

    def __init__(self, x: Tensor, comm: Communicator) -> None:
        self._reduced = x  # the stream without the sub-blocks in flight
        self._full: Tensor | None = None  # the stream with them, once a read has waited
        self._in_flight: deque[Work] = deque()
        self._comm = comm
        self._fused = comm if isinstance(comm, FusedCommunicator) else None
        self.uses_kernels = x.is_cuda

    def read(self, lag: int = 0) -> Tensor:
        """Return the stream [T, D]: complete, or for lag 1 without the last sub-block.

        Raises `PeerLost` if a peer died, as do all methods.
        """
        while len(self._in_flight) > 1:
            self._reduce_oldest()
        if lag or not self._in_flight:
            return self._reduced
        if self._full is None:
            self._full = self._reduced + self._wait(self._in_flight[0])
        return self._full

    def read_normed(self, lag: int, gain: Tensor, eps: float) -> Tensor:
        """Return the RMS norm [T, D] of `read(lag)`.

        If the read adds a reduction, one kernel does both: the communicator's own, which also
        waits, or on CUDA `add_rms_norm`.
        """
        due = len(self._in_flight) - lag
        adds_in_kernel = self._fused is not None or self.uses_kernels
        if not adds_in_kernel or due <= 0 or self._full is not None:
            return F.rms_norm(self.read(lag), gain.shape, gain, eps)
        if due > 1:
            self._reduce_oldest()
        total, normed = self._wait_add_norm(self._in_flight[0], gain, eps)
        if lag:
            self._in_flight.popleft()
            self._reduced = total
        else:
            self._full = total
        return normed

    def sum_over_ranks(self, partial: Tensor) -> Tensor:
        """Return the sum over ranks of a tensor that is no part of the stream.

        The caller has read the complete stream (lag 0): no sum of it may be in flight.
        """
        total: Tensor = self._comm.wait(self._comm.all_reduce_async(partial))
        return total

    def add_product(self, x: Tensor, matrix: Tensor | None, product: Product) -> None:
        """Add the sum over ranks of x @ matrix.T, [T, D]; return before it is complete.

        `product` multiplies with the matrix. If the matrix is given, a kernel of the communicator
        may multiply and send at once instead.
        """
        if self._fused is not None and matrix is not None:
            self._in_flight.append(self._fused.all_reduce_product_async(x, matrix))
        else:
            self.add(product(x))

    def add(self, partial: Tensor) -> None:
        """Add the sum over ranks of partials [T, D]; return before it is complete."""
        self._in_flight.append(self._comm.all_reduce_async(partial))

    def add_and_cross(self, partial: Tensor, map_: AffineMap) -> None:
        """Add the sum over ranks of partials [T, D_front], and map the stream to [T, D_end].

        Nothing waits for this sum: it is mapped when it has arrived, or before it is sent if that
        makes it smaller. Source: a sum commutes with the linear part of a map.
        """
        if not map_.narrows:
            self.add(partial)
            last = MappedWork(self._in_flight.pop(), map_.matrix)
            self._reduced, self._full = F.linear(self._drain(), *map_), None
        elif self.uses_kernels:
            from ladderstitch_kernels.ops.stitch_linear import stitch_pending

            x, partial = stitch_pending(self._drain(), partial, *map_)
            self._reduced, self._full = x, None
            last = self._comm.all_reduce_async(partial)
        else:
            last = self._comm.all_reduce_async(F.linear(partial, map_.matrix))
            self._reduced, self._full = F.linear(self._drain(), *map_), None
        self._in_flight.append(last)

    def add_normed(self, partial: Tensor, norm: Callable[[Tensor], Tensor]) -> None:
        """Add the norm of the sum over ranks of partials [T, D]; wait until it is complete."""
        whole = norm(self._comm.wait(self._comm.all_reduce_async(partial)))
        self._reduced, self._full = self.read() + whole, None
        self._in_flight.clear()

    def add_desynchronised(self, partial: Tensor, *, reduce: bool) -> None:
        """Add this rank's [T, D] to its own stream, or (`reduce`) make all streams equal again."""
        if reduce:
            mean = self._reduced / self._comm.ranks
            self._reduced = self._comm.wait(self._comm.all_reduce_async(partial + mean))
        else:
            self._reduced = self._reduced + partial

    def _wait_add_norm(self, work: Work, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return the stream plus a reduction, and the norm of this sum, both [T, D]."""
        if self._fused is not None and not isinstance(work, MappedWork):
            return self._fused.wait_add_norm(work, self._reduced, gain, eps)
        from ladderstitch_kernels.ops.add_rms_norm import add_rms_norm

        return add_rms_norm(self._wait(work), self._reduced, gain, eps)

    def _wait(self, work: Work) -> Tensor:
        """Return the sum of a reduction, mapped if the stream has been."""
        if isinstance(work, MappedWork):
            return F.linear(self._comm.wait(work.work), work.matrix)
        return self._comm.wait(work)

    def _drain(self) -> Tensor:
        """Return the stream [T, D] with all reductions in flight, which end."""
        while self._in_flight:
            self._reduce_oldest()
        return self._reduced

    def _reduce_oldest(self) -> None:
        first = self._in_flight.popleft()
        full, self._full = self._full, None
        self._reduced = self._reduced + self._wait(first) if full is None else full
