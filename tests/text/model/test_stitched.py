"""Tests of routes through several anchors: definition, ranks, pending sums, translated caches."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ladderstitch.errors import BundleError
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextManifest
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step, Translation
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.family import DecoderFamily, LayerRange, Route
from ladderstitch.text.model.family_weights import (
    anchor_weights,
    check_family_weights,
    stitch_weights,
)
from ladderstitch.text.model.residual import ResidualScheme, Scheme, plan_layers
from ladderstitch.text.model.residual_stream import ResidualStream
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.stitched import (
    BoundaryCache,
    StitchedModel,
    StitchedPath,
    load_maps,
)
from ladderstitch.text.model.stitched_segments import SegmentedPath
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import MemoryWeights
from ladderstitch.text.model.weights import load_rank
from ladderstitch.training.text.calibrate import open_runner
from tests.support.elastic_models import (
    FAMILY,
    LADDER,
    LARGE,
    Definition,
    ThreadedSum,
    paths,
    random_family,
    run_ranks,
    write_elastic,
)

SCHEMES = {"ladder": LADDER, "standard": ResidualScheme()}
ROUTES = {path.name: path.route for path in paths()}
BLOCKS, BLOCK_TOKENS = 6, 4
DOUBLE = torch.float64


class RankOfFamily:
    """One rank of the family in float64, with its cache; every step is of one sequence."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        residual: ResidualScheme = LADDER,
        family: DecoderFamily = FAMILY,
    ) -> None:
        weights = MemoryWeights({n: t.double() for n, t in random_family(family=family).items()})
        shards = [Shard.of(anchor, rank, ranks) for anchor in family.anchors]
        anchors = [
            Transformer(
                anchor,
                load_rank(part, anchor, shard, DOUBLE),
                shard,
                1,
                family.plane_number(number),
            )
            for number, (anchor, part, shard) in enumerate(
                zip(family.anchors, anchor_weights(weights, 2), shards, strict=True)
            )
        ]
        maps = load_maps(stitch_weights(weights), family, DOUBLE, "cpu")
        slots = BLOCKS * BLOCK_TOKENS
        self.model = StitchedModel(family, anchors, maps, BoundaryCache(family, slots, DOUBLE))
        heads = [len(shard.heads) for shard in shards]
        self.cache = PagedCache(
            family.largest,
            shards[-1],
            BLOCKS,
            BLOCK_TOKENS,
            DOUBLE,
            planes=family.num_planes,
            query_heads=heads,
        )
        self.family = family
        self.plans = plan_layers(residual, family.deepest, ranks)

    def batch(self, tokens: list[int], start: int) -> Batch:
        blocks = [3, 1, 0, 5, 4, 2]
        return Batch(Step((SequenceInput(tokens, start, blocks, LogitsMode.ALL),)), BLOCK_TOKENS)

    def run(self, tokens: list[int], start: int, route: Route, comm: ThreadedSum) -> Tensor:
        path = StitchedPath(self.model, route)
        return path.forward(self.batch(tokens, start), self.cache, self.plans, comm)


def random_tokens(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


@pytest.mark.parametrize("scheme", ["standard", "ladder", "parallel"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ROUTES)
def test_route_with_a_sum_in_flight_equals_definition(
    name: str, ranks: int, scheme: Scheme
) -> None:
    tokens = random_tokens(9)
    definition = Definition(
        random_family(), lag=int(scheme == "ladder"), parallel=scheme == "parallel"
    )
    expected = definition.logits(tokens, [ROUTES[name]] * 9)

    def run(rank: int, comm: ThreadedSum) -> Tensor:
        held = RankOfFamily(rank, ranks, ResidualScheme(scheme=scheme))
        parts = [held.run(tokens[:5], 0, ROUTES[name], comm)]
        parts += [held.run(tokens[n : n + 1], n, ROUTES[name], comm) for n in range(5, 9)]
        return torch.cat(parts)

    found = torch.cat(run_ranks(ranks, run), dim=-1)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(ROUTES, 2)))
def test_switch_with_translated_cache_equals_definition(
    before: str, after: str, ranks: int
) -> None:
    tokens = random_tokens(12)
    routes = [ROUTES[before]] * 7 + [ROUTES[after]] * 5
    expected = Definition(random_family(), lag=1).logits(tokens, routes)

    def run(rank: int, comm: ThreadedSum) -> Tensor:
        held = RankOfFamily(rank, ranks)
        parts = [held.run(tokens[:7], 0, ROUTES[before], comm)]
        held.model.translate(
            held.batch(tokens[:7], 0), held.cache, ROUTES[before], ROUTES[after], comm
        )
        parts += [held.run(tokens[n : n + 1], n, ROUTES[after], comm) for n in range(7, 12)]
        return torch.cat(parts)

    found = torch.cat(run_ranks(ranks, run), dim=-1)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_write_through_permits_another_route_for_every_token() -> None:
    tokens, names = random_tokens(10), list(ROUTES)
    routes = [ROUTES[names[(3 * n) % len(names)]] for n in range(10)]
    expected = Definition(random_family(), lag=1).logits(tokens, routes)

    def run(rank: int, comm: ThreadedSum) -> Tensor:
        held, rows = RankOfFamily(rank, 1), []
        for position, (token, route) in enumerate(zip(tokens, routes, strict=True)):
            rows.append(held.run([token], position, route, comm))
            held.model.translate_all(held.batch([token], position), held.cache, route, comm)
        return torch.cat(rows)

    (found,) = run_ranks(1, run)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(("front", "end"), [(0, 1), (1, 0)])
def test_crossing_sends_the_smaller_of_both_widths(front: int, end: int) -> None:
    sizes: list[int] = []

    class RecordingSum(ThreadedSum):
        def all_reduce_async(self, partial: Tensor) -> int:
            sizes.append(partial.shape[-1])
            return super().all_reduce_async(partial)

    name = "small-2+large" if end else "large-2+small"
    held = RankOfFamily(0, 1)

    def run(rank: int, comm: ThreadedSum) -> Tensor:
        recorder = RecordingSum(0, comm._shared)
        return held.run([1, 2], 0, ROUTES[name], recorder)

    run_ranks(1, run)
    small, large = (anchor.hidden_size for anchor in FAMILY.anchors)
    crossing = [small] * 4 + [large] * 4 if end else [large] * 3 + [small] * 5
    assert sizes == crossing


def test_crossing_does_not_wait_for_the_last_sum() -> None:
    waited: list[int] = []

    class Recorder(ThreadedSum):
        def wait(self, work: int) -> Tensor:
            waited.append(work)
            return super().wait(work)

    def run(rank: int, comm: ThreadedSum) -> Tensor:
        held, recorder = RankOfFamily(0, 1), Recorder(0, comm._shared)
        for map_ in held.model.maps.values():
            waited.clear()
            stream = ResidualStream(torch.zeros(2, map_.matrix.shape[1], dtype=DOUBLE), recorder)
            first = recorder._started + 1
            stream.add(torch.ones(2, map_.matrix.shape[1], dtype=DOUBLE))
            stream.add_and_cross(torch.ones(2, map_.matrix.shape[1], dtype=DOUBLE), map_)
            assert waited == [first]
            stream.read(lag=1)
            assert waited == [first]
            stream.read()
            assert waited == [first, first + 1]
        return torch.zeros(())

    run_ranks(1, run)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("before", "after"), [("small", "large"), ("large-1+small", "small-2+large")]
)
def test_served_paths_in_segments_equal_definition(
    tmp_path: Path, scheme: str, before: str, after: str
) -> None:
    bundle = TextBundle.load(write_elastic(tmp_path / "elastic", SCHEMES[scheme]))
    runner, names = open_runner(bundle, 1), list(ROUTES)
    assert all(isinstance(model, SegmentedPath) for model in runner.models)
    source, target = names.index(before), names.index(after)
    tokens = torch.tensor(random_tokens(12))
    routes = [ROUTES[before]] * 7 + [ROUTES[after]] * 5
    definition = Definition(random_family(), lag=int(scheme == "ladder"))
    parts = [runner.run(source, tokens[:7], 0, LogitsMode.ALL)]
    runner.translate(source, target, tokens[:7])
    parts.append(runner.run(target, tokens[7:], 7, LogitsMode.ALL))
    expected = definition.logits(tokens.tolist(), routes)
    assert (torch.cat(parts) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_steps_carry_translations_and_write_through() -> None:
    step = Step(
        (SequenceInput([7], 3, [2, 5], LogitsMode.LAST), SequenceInput([8, 9], 0, [1])),
        2,
        translations=(
            Translation([1, 2, 3], 0, [2, 5], 0, 2),
            Translation([4], 6, [9, 1], 1, 2),
        ),
        write_through=True,
    )
    header, body = step.pack()
    assert Step.unpack(header, body) == step


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ([(0, 0, 1)], "expected layers 0 to 3 once"),
        ([(0, 0, 1), (1, 3, 3)], "expected layers 0 to 3 once"),
        ([(0, 0, 1), (0, 2, 3)], "in parts of different anchors"),
        ([(0, 0, 1), (2, 2, 3)], "among 2"),
        ([(0, 0, 4)], "expected layers 0 to 3 once"),
    ],
)
def test_manifest_with_an_unfit_route_raises(
    route: list[tuple[int, int, int]], message: str
) -> None:
    parts = tuple(LayerRange(anchor=a, first=f, last=n) for a, f, n in route)
    path = paths()[0].model_copy(update={"route": parts})
    with pytest.raises(ValidationError, match=message):
        make_manifest(paths=[path.model_dump()])


def make_manifest(**fields: object) -> TextManifest:
    return TextManifest.model_validate(
        {
            "name": "tiny",
            "config": LARGE.model_dump(),
            "anchors": [FAMILY.anchors[0].model_dump()],
            "origin": "random",
            "licence": "MIT",
        }
        | fields
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 4}, "anchors.0: expected kv_heads as in config"),
        ({"head_dim": 6, "vocab_size": 99}, "anchors.0: expected head_dim, vocab_size as in conf"),
        ({"qkv_bias": True}, "anchors: expected Llama's layers"),
    ],
)
def test_manifest_with_unfit_anchors_raises(change: dict[str, object], message: str) -> None:
    anchor = FAMILY.anchors[0].model_dump() | change
    with pytest.raises(ValidationError, match=message):
        make_manifest(anchors=[anchor])


def test_family_weights_that_do_not_fit_are_named() -> None:
    tensors = random_family()
    del tensors["stitches.0.1.2.bias"], tensors["anchors.0.model.norm.weight"]
    with pytest.raises(BundleError, match=r"model\.norm\.weight"):
        check_family_weights(MemoryWeights(tensors), FAMILY)
    tensors = random_family()
    tensors["stitches.0.1.2.weight"] = torch.zeros(2, 2)
    tensors["stitches.0.1.9.bias"] = torch.zeros(2)
    with pytest.raises(BundleError, match=r"0\.1\.2\.weight.*\(2, 2\)"):
        check_family_weights(MemoryWeights(tensors), FAMILY)
