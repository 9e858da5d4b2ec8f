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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ladderstitch.errors import ConfigError

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
