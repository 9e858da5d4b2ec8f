"""Measurements of a stitched family: quality of every path, divergence after a switch of paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from statistics import fmean

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor

from ladderstitch.scheduling.profiles import Quality
from ladderstitch.training.text.elastic_recipe import SwitchMeasure
from ladderstitch.training.text.evaluate import measure_quality
from ladderstitch.training.text.family_routes import Route, Span
from ladderstitch.training.text.trainable_family import TrainableFamily

BATCH_WINDOWS = 16
CURVE_TOKENS = 8
"""Tokens of a point of the divergence curve."""


class PathFigures(BaseModel):
    """The measured quality of a path.

    `gap_closed` is the share of the gap between the losses of the smallest and the largest anchor.
    """

    accuracy: float
    loss_nats: float
    gap_closed: float


class SwitchFigures(BaseModel):
    """The divergence after a switch, in nats per token: its mean, and means of 8 tokens each."""

    divergence_nats: float
    curve_nats: tuple[float, ...]


class FamilyFigures(BaseModel):
    """The figures of a family, by names of paths and of switches such as `small to large`.

    `explained_variance` is that of least-squares maps, by their names.
    """

    paths: dict[str, PathFigures]
    switches: dict[str, SwitchFigures]
    explained_variance: dict[str, float] = {}


def path_quality(family: TrainableFamily, route: Route, windows: Tensor) -> Quality:
    """Return the quality of a path over windows [W, T + 1], each without earlier context."""
    return measure_quality(lambda tokens: family.path_logits(tokens[None], route)[0], windows)


def loss_nats(quality: Quality) -> float:
    """Return the loss in nats per token of a measured quality."""
    assert quality.perplexity is not None
    return math.log(quality.perplexity)


@torch.inference_mode()
def switch_divergence(
    family: TrainableFamily, before: Route, after: Route, windows: Tensor, measure: SwitchMeasure
) -> list[float]:
    """Return the mean KL(never switched || switched) of each token after a switch, in nats.

    The switched sequence takes the path `before` for the first `measure.context` tokens and `after`
    then, with translated keys and values; the other sequence takes `after` from the start.
    `windows` [W, T] are tokens.
    """
    tokens = measure.context + measure.tokens
    never = [Span(after, tokens)]
    switched = [Span(before, measure.context), Span(after, measure.tokens)]
    total = torch.zeros(measure.tokens)
    for part in torch.split(windows[:, :tokens], BATCH_WINDOWS):
        expected, got = (
            family.logits(part, spans)[:, measure.context :].float().log_softmax(-1)
            for spans in (never, switched)
        )
        total += F.kl_div(got, expected, reduction="none", log_target=True).sum((0, 2))
    return (total / len(windows)).tolist()


def anchor_switches(
    family: TrainableFamily,
    names: Sequence[str],
    windows: Tensor,
    measure: SwitchMeasure,
    on_progress: Callable[[int], None] = lambda n: None,
) -> dict[str, list[float]]:
    """Return the divergence curve of a switch between every two anchors, by their names."""
    curves = {}
    for before, after in permutations(range(len(names)), 2):
        routes = Route.of_anchor(before), Route.of_anchor(after)
        name = f"{names[before]} to {names[after]}"
        curves[name] = switch_divergence(family, *routes, windows, measure)
        on_progress(1)
    return curves


def summarise_curve(curve: Sequence[float]) -> SwitchFigures:
    """Return the figures of a divergence curve."""
    parts = [curve[start : start + CURVE_TOKENS] for start in range(0, len(curve), CURVE_TOKENS)]
    return SwitchFigures(
        divergence_nats=round(fmean(curve), 5),
        curve_nats=tuple(round(fmean(part), 5) for part in parts),
    )


def summarise_paths(
    qualities: Mapping[Route, Quality], names: Sequence[str]
) -> dict[str, PathFigures]:
    """Return the figures of each path, by its name."""
    losses = {route: loss_nats(quality) for route, quality in qualities.items()}
    small, large = (losses[Route.of_anchor(anchor)] for anchor in (0, len(names) - 1))
    return {
        route.name(names): PathFigures(
            accuracy=round(qualities[route].value, 5),
            loss_nats=round(loss, 4),
            gap_closed=round((small - loss) / (small - large), 4),
        )
        for route, loss in losses.items()
    }
