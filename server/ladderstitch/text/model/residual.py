"""Residual schemes, which differ only in how sub-blocks read and write the residual stream.

Sub-block k (attention of layer i is 2i, its MLP 2i + 1) adds h_k to the stream x:

    standard   x_k = x_{k-1} + h_k(norm_k(x_{k-1}))
    ladder     x_k = x_{k-1} + h_k(norm_k(x_{k-2}))     Ladder Residual, arXiv 2501.06589
    parallel   x_i = x_{i-1} + attention_i(n) + mlp_i(n), n = norm_i(x_{i-1})
    groups     layers k..l as one: x = x_{k-1} + sum attention_i(norm_i(x_{k-1})), then
               x_l = x + sum mlp_i(norm_i(x))           Layer Parallelism, arXiv 2502.02790
    desync     each rank keeps a stream of its own. Where a sub-block reduces,
               x = sum over R ranks of (h + x / R); elsewhere x = x + h of this rank alone

Under tensor parallelism, each h is a sum over ranks. The ladder reads the stream one sub-block
late, so that the reduction of h_{k-1} overlaps with the computation of h_k. A group of n layers has
two reductions instead of 2n.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.runtime.linear import Product
from ladderstitch.text.comm.base import Communicator, FusedCommunicator, Work

Scheme = Literal["standard", "ladder", "parallel", "desync", "groups", "no_communication"]
Groups = tuple[tuple[int, int], ...]
"""Groups of adjacent layers, each as its first layer and its number of layers."""


class ResidualScheme(BaseModel):
    """A residual scheme as data, in the form that a bundle's manifest has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: Scheme = "standard"
    ladder_layers: int | tuple[int, ...] | None = Field(
        None, description="ladder: unset = all layers, N = the last N layers, or a list of layers"
    )
    reduce_after: tuple[tuple[bool, bool], ...] | None = Field(
        None, description="desync: for each layer, whether to reduce after attention and after MLP"
    )
    ranks: int | None = Field(None, gt=0, description="desync: the rank count it was trained for")
    groups: Groups | None = Field(
        None,
        description="groups: first layer and number of layers of each; others run one by one",
    )

    @model_validator(mode="after")
    def _check_groups(self) -> ResidualScheme:
        if self.scheme == "groups" and self.groups is None:
            raise ValueError("groups: expected the first layer and size of each group, got none")
        if self.scheme != "groups" and self.groups is not None:
            raise ValueError(f"groups: expected none with the scheme {self.scheme}")
        return self


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The way in which one layer reads and writes the stream."""

    lag: int = 0
    """Sub-blocks whose reduction a read does not wait for: 0 for standard, 1 for the ladder."""
    fused: bool = False
    """Whether attention and MLP read the same norm and share one reduction (parallel)."""
    reduce: tuple[bool, bool] | None = None
    """Desync: whether attention and MLP end in a reduction of the streams. Unset: other schemes."""
    joins: bool = False
    """Groups: whether the layer runs together with the one before it."""
    ffn_width: int | None = None
    """Columns of the MLP that run, the first ones. Unset: all."""


def plan_layers(residual: ResidualScheme, layers: int, ranks: int) -> tuple[LayerPlan, ...]:
    """Return one plan per layer.

    Raises `ConfigError` naming the field if the scheme does not fit the model.
    """
    match residual.scheme:
        case "standard" | "no_communication":
            return (LayerPlan(),) * layers
        case "parallel":
            return (LayerPlan(fused=True),) * layers
        case "ladder":
            chosen = ladder_layers(residual.ladder_layers, layers)
            return tuple(LayerPlan(lag=int(layer in chosen)) for layer in range(layers))
        case "desync":
            return _desync_plans(residual, layers, ranks)
        case "groups":
            return _group_plans(residual.groups or (), layers)


def ladder_layers(which: int | tuple[int, ...] | None, layers: int) -> frozenset[int]:
    """Return the layers that read one sub-block late: all, the last N, or those listed.

    Raises `ConfigError` if the model does not have one of them.
    """
    if which is None:
        return frozenset(range(layers))
    chosen = range(layers - which, layers) if isinstance(which, int) else which
    if wrong := [layer for layer in chosen if not 0 <= layer < layers]:
        raise ConfigError(f"ladder_layers: expected layers 0 to {layers - 1}, got {wrong}")
    return frozenset(chosen)


def _desync_plans(residual: ResidualScheme, layers: int, ranks: int) -> tuple[LayerPlan, ...]:
    pattern = residual.reduce_after
    if pattern is None or len(pattern) != layers:
        got = "none" if pattern is None else str(len(pattern))
        raise ConfigError(f"reduce_after: expected a pair for each of {layers} layers, got {got}")
    if not pattern[-1][1]:
        raise ConfigError("reduce_after: expected the last MLP to reduce")
    if residual.ranks != ranks:
        raise ConfigError(
            f"ranks: expected {residual.ranks} (a desync model is defined for one rank count), "
            f"got {ranks}"
        )
    return tuple(LayerPlan(reduce=pair) for pair in pattern)


def find_group_problem(groups: Groups, layers: int) -> str | None:
    """Return why the groups do not fit a model of that many layers; None if they do."""
    end = 0
    for first, size in sorted(groups):
        if first < end or size < 1 or first + size > layers:
            return (
                f"groups: expected groups of at least 1 of layers 0 to {layers - 1} that do not "
                f"overlap, got {[first, size]}"
            )
        end = first + size
    return None


def _group_plans(groups: Groups, layers: int) -> tuple[LayerPlan, ...]:
    if (problem := find_group_problem(groups, layers)) is not None:
        raise ConfigError(problem)
    joined = {layer for first, size in groups for layer in range(first + 1, first + size)}
    return tuple(LayerPlan(joins=layer in joined) for layer in range(layers))


def split_groups(layers: Sequence[int], plans: Sequence[LayerPlan]) -> list[list[int]]:
    """Return the layers, in order, as lists of those that run together: most of them alone."""
    together: list[list[int]] = []
    for layer in layers:
        if plans[layer].joins and together:
            together[-1].append(layer)
        else:
            together.append([layer])
    return together


def narrow_plans(
    plans: Sequence[LayerPlan], widths: Sequence[int], full: int
) -> tuple[LayerPlan, ...]:
    """Return the plans with MLPs of these widths, of `full` columns at most.

    There is one width per layer, one for all layers, or none: all columns run.
    """
    each = widths if len(widths) == len(plans) else (*widths, full)[:1] * len(plans)
    return tuple(
        plan if width == full else replace(plan, ffn_width=width)
        for plan, width in zip(plans, each, strict=True)
    )


def count_reductions(plans: Sequence[LayerPlan]) -> int:
    """Return the sums over ranks of one forward pass through these layers, without the embedding's.

    It has two per layer, one if the layer is fused, none if it joins another one's.
    """
    counts = (
        sum(plan.reduce) if plan.reduce else 0 if plan.joins else 1 if plan.fused else 2
        for plan in plans
    )
    return sum(counts)


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
