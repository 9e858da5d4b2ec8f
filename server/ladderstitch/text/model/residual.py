"""How sub-blocks read and write the residual stream: the one thing in which schemes differ.

Sub-block k (attention of layer i is 2i, its MLP 2i + 1) adds h_k to the stream x:

    standard   x_k = x_{k-1} + h_k(norm_k(x_{k-1}))
    ladder     x_k = x_{k-1} + h_k(norm_k(x_{k-2}))     Ladder Residual, arXiv 2501.06589
    parallel   x_i = x_{i-1} + attention_i(n) + mlp_i(n), n = norm_i(x_{i-1})
    desync     every rank keeps a stream of its own; where a sub-block reduces,
               x = sum over R ranks of (h + x / R), elsewhere x = x + h of this rank alone

Under tensor parallelism each h is a sum over ranks. The ladder reads one sub-block late, so that
the reduction of h_{k-1} runs under the computation of h_k.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.runtime.linear import Linear
from ladderstitch.text.comm.base import Communicator, FusedCommunicator, Work

Scheme = Literal["standard", "ladder", "parallel", "desync", "no_communication"]


class ResidualScheme(BaseModel):
    """A residual scheme as data, as it stands in a bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scheme: Scheme = "standard"
    ladder_layers: int | tuple[int, ...] | None = Field(
        None, description="ladder: none = all layers, N = the last N, or a list of layers"
    )
    reduce_after: tuple[tuple[bool, bool], ...] | None = Field(
        None, description="desync: for each layer, whether to reduce after attention and after MLP"
    )
    ranks: int | None = Field(None, gt=0, description="desync: the rank count it was trained for")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer does with the stream."""

    lag: int = 0
    """Sub-blocks that a read may leave in flight: 0 the full stream, 1 the ladder's."""
    fused: bool = False
    """Attention and MLP read the same norm and share one reduction."""
    reduce: tuple[bool, bool] | None = None
    """Desync: whether attention and MLP end in a reduction of the streams."""


def plan_layers(residual: ResidualScheme, layers: int, ranks: int) -> tuple[LayerPlan, ...]:
    """One plan a layer; raises `ConfigError` naming the field that does not fit the model."""
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


def ladder_layers(which: int | tuple[int, ...] | None, layers: int) -> frozenset[int]:
    """The layers that read late; raises `ConfigError` for one that the model does not have."""
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
            f"ranks: a desync model is defined for one rank count, here {residual.ranks}; "
            f"got {ranks}"
        )
    return tuple(LayerPlan(reduce=pair) for pair in pattern)


class ResidualStream:
    """The residual stream of one forward pass on one rank, and the reductions still in flight.

    Owns the tensor [N, D] that it starts from, of N tokens.
    """

    def __init__(self, x: Tensor, link: Communicator) -> None:
        self._settled = x  # without the last sub-block
        self._full: Tensor | None = None  # with it, once a read has waited for it
        self._flying: deque[Work] = deque()
        self._link = link
        self._fused = link if isinstance(link, FusedCommunicator) else None

    def read(self, lag: int = 0) -> Tensor:
        """The stream [N, D], all of it or (lag 1) without the last sub-block."""
        while len(self._flying) > 1:
            self._settle()
        if lag or not self._flying:
            return self._settled
        if self._full is None:
            self._full = self._settled + self._link.wait(self._flying[0])
        return self._full

    def read_normed(self, lag: int, gain: Tensor, eps: float) -> Tensor:
        """The RMS norm [N, D] of what `read` gives; one kernel if the link can."""
        fused, arrived = self._fused, len(self._flying) - lag
        if fused is None or arrived <= 0 or self._full is not None:
            return F.rms_norm(self.read(lag), gain.shape, gain, eps)
        if arrived > 1:
            self._settle()
        total, normed = fused.wait_add_norm(self._flying[0], self._settled, gain, eps)
        if lag:
            self._flying.popleft()
            self._settled = total
        else:
            self._full = total
        return normed

    def add_product(self, x: Tensor, weight: Tensor, linear: Linear) -> None:
        """Add the sum of all ranks' x @ weight.T; returns while it is being made."""
        if self._fused is not None:
            self._flying.append(self._fused.post_product(x, weight))
        else:
            self.add(linear(x, weight))

    def add(self, partial: Tensor) -> None:
        """Add the sum of all ranks' [N, D]; returns while it is being made."""
        self._flying.append(self._link.post(partial))

    def add_desynchronised(self, partial: Tensor, *, reduce: bool) -> None:
        """Add this rank's [N, D] to its own stream, or make the streams one again."""
        if reduce:
            mean = self._settled / self._link.ranks
            self._settled = self._link.wait(self._link.post(partial + mean))
        else:
            self._settled = self._settled + partial

    def _settle(self) -> None:
        first = self._flying.popleft()
        full, self._full = self._full, None
        self._settled = self._settled + self._link.wait(first) if full is None else full
