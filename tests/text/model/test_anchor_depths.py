"""Tests of families whose anchors differ in depth, against the independent definition."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.family import DecoderFamily, LayerRange, Route
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.stitched_segments import SegmentedPath
from ladderstitch.training.text.calibrate import open_runner
from tests.support.elastic_models import (
    LADDER,
    LARGE,
    SMALL,
    Definition,
    ThreadedSum,
    random_family,
    run_ranks,
    write_family,
)
from tests.text.model.test_stitched import SCHEMES, RankOfFamily, random_tokens


def route(*parts: tuple[int, int, int]) -> Route:
    return tuple(LayerRange(anchor=a, first=f, last=n) for a, f, n in parts)


ROUTES = {
    (2, 4): {
        "small": route((0, 0, 1)),
        "large": route((1, 0, 3)),
        "up": route((0, 0, 0), (1, 1, 3)),
        "down": route((1, 0, 1), (0, 1, 1)),
    },
    (5, 3): {
        "small": route((0, 0, 4)),
        "large": route((1, 0, 2)),
        "up": route((0, 0, 1), (1, 1, 2)),
        "up-late": route((0, 0, 3), (1, 2, 2)),
        "down": route((1, 0, 0), (0, 1, 4)),
        "down-late": route((1, 0, 1), (0, 2, 4)),
        "there-and-back": route((0, 0, 1), (1, 1, 1), (0, 2, 4)),
    },
}
"""By the depths of both anchors: a route for each change that their layers permit."""
SINGLE = [(depths, name) for depths, routes in ROUTES.items() for name in routes]
CHANGES = [
    (depths, *pair)
    for depths, routes in ROUTES.items()
    for pair in itertools.permutations(routes, 2)
]
Depths = tuple[int, int]


def family_of(depths: Depths) -> DecoderFamily:
    small, large = (
        config.model_copy(update={"layers": layers})
        for config, layers in zip((SMALL, LARGE), depths, strict=True)
    )
    return DecoderFamily((small, large))


def define(depths: Depths, tokens: Sequence[int], routes: Sequence[Route], scheme: str) -> Tensor:
    tensors = random_family(family=family_of(depths))
    definition = Definition(tensors, lag=int(scheme == "ladder"), depths=depths)
    return definition.logits(tokens, routes)


def test_equal_depths_keep_the_names_of_stitching_layers() -> None:
    names = [name.stem for name, _ in family_of((3, 3)).maps()]
    assert names == ["0.1.1", "0.1.2", "1.0.1", "1.0.2"]


def test_names_of_stitching_layers_have_both_layers() -> None:
    names = [name.stem for name, _ in family_of((2, 4)).maps()]
    assert names == ["0.1.1", "0.1.1-2", "0.1.1-3", "1.0.2-1"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("depths", "name"), SINGLE)
def test_route_equals_definition(depths: Depths, name: str, ranks: int, scheme: str) -> None:
    tokens, path = random_tokens(9), ROUTES[depths][name]
    expected = define(depths, tokens, [path] * 9, scheme)

    def run(rank: int, comm: ThreadedSum) -> Tensor:
        held = RankOfFamily(rank, ranks, SCHEMES[scheme], family_of(depths))
        parts = [held.run(tokens[:5], 0, path, comm)]
        parts += [held.run(tokens[n : n + 1], n, path, comm) for n in range(5, 9)]
        return torch.cat(parts)

    found = torch.cat(run_ranks(ranks, run), dim=-1)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(("ranks", "scheme"), [(1, "ladder"), (2, "standard"), (4, "ladder")])
@pytest.mark.parametrize(("depths", "before", "after"), CHANGES)
def test_change_with_translated_cache_equals_definition(
    depths: Depths, before: str, after: str, ranks: int, scheme: str
) -> None:
    tokens = random_tokens(9)
    source, target = ROUTES[depths][before], ROUTES[depths][after]
    expected = define(depths, tokens, [source] * 6 + [target] * 3, scheme)

    def run(rank: int, comm: ThreadedSum) -> Tensor:
        held = RankOfFamily(rank, ranks, SCHEMES[scheme], family_of(depths))
        parts = [held.run(tokens[:6], 0, source, comm)]
        held.model.translate(held.batch(tokens[:6], 0), held.cache, source, target, comm)
        parts += [held.run(tokens[n : n + 1], n, target, comm) for n in range(6, 9)]
        return torch.cat(parts)

    found = torch.cat(run_ranks(ranks, run), dim=-1)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def write_routes(path: Path, depths: Depths, residual: ResidualScheme = LADDER) -> TextBundle:
    variants = [
        TextVariant(name=name, residual=residual, route=parts)
        for name, parts in ROUTES[depths].items()
    ]
    write_family(path, family_of(depths), variants)
    return TextBundle.load(path, calibrated=False)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("depths", ROUTES)
def test_changes_in_segments_equal_definition(tmp_path: Path, depths: Depths, scheme: str) -> None:
    runner = open_runner(write_routes(tmp_path, depths, SCHEMES[scheme]), 1)
    assert all(isinstance(model, SegmentedPath) for model in runner.models)
    routes, tokens = list(ROUTES[depths].values()), torch.tensor(random_tokens(9))
    for source, target in itertools.permutations(range(len(routes)), 2):
        parts = [runner.run(source, tokens[:6], 0, LogitsMode.ALL)]
        runner.translate(source, target, tokens[:6])
        parts.append(runner.run(target, tokens[6:], 6, LogitsMode.ALL))
        taken = [routes[source]] * 6 + [routes[target]] * 3
        expected = define(depths, tokens.tolist(), taken, scheme)
        assert (torch.cat(parts) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("depths", ROUTES)
def test_write_through_permits_another_route_for_every_token(
    tmp_path: Path, depths: Depths
) -> None:
    runner = open_runner(write_routes(tmp_path, depths), 1)
    tokens, routes = random_tokens(12), list(ROUTES[depths].values())
    order = [(3 * n) % len(routes) for n in range(12)]
    plans = plan_layers(LADDER, family_of(depths).deepest, 1)

    def run(rank: int, comm: ThreadedSum) -> Tensor:
        rows = []
        for position, path in enumerate(order):
            part = SequenceInput([tokens[position]], position, [3, 1], LogitsMode.ALL)
            batch, model = Batch(Step((part,)), runner.config.block_tokens), runner.models[path]
            assert isinstance(model, SegmentedPath)
            rows.append(model.forward(batch, runner.cache, plans, comm))
            model.model.translate_all(batch, runner.cache, model.route, comm)
        return torch.cat(rows)

    (found,) = run_ranks(1, run)
    expected = define(depths, tokens, [routes[n] for n in order], "ladder")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 0, 0), (1, 2, 3)],
        [(0, 0, 0), (1, 0, 3)],
        [(1, 0, 0), (0, 1, 1)],
        [(0, 0, 3)],
        [(1, 0, 1)],
        [(0, 1, 1)],
    ],
)
def test_route_that_does_not_fit_the_depths_raises(
    tmp_path: Path, parts: list[tuple[int, int, int]]
) -> None:
    variant = TextVariant(name="wrong", residual=LADDER, route=route(*parts))
    message = r"paths.wrong.route: expected layer 0 .* change from 0 to 1 after .* \(1, 1\); 1 to 0"
    with pytest.raises(ValidationError, match=message):
        write_family(tmp_path, family_of((2, 4)), [variant])


def test_ladder_of_some_layers_needs_equal_depths(tmp_path: Path) -> None:
    residual = ResidualScheme(scheme="ladder", ladder_layers=1)
    variant = TextVariant(name="small", residual=residual, route=ROUTES[2, 4]["small"])
    with pytest.raises(ValidationError, match=r"residual.ladder_layers: expected none"):
        write_family(tmp_path, family_of((2, 4)), [variant])
