"""Tests of answers that change between anchors of two and four layers, on real ranks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from ladderstitch.scheduling.settings import CacheMode, SchedulerSettings
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.model.family import DecoderFamily, LayerRange, Route
from ladderstitch.text.scheduler.scheduler import TextScheduler
from tests.support.elastic_models import (
    LADDER,
    LARGE,
    SMALL,
    Definition,
    random_family,
    write_family,
    write_qualities,
)
from tests.support.fixed_times import FixedTimes
from tests.system.text.test_scheduler import make_request, running_scheduler

DEPTHS = (2, 4)
FAMILY = DecoderFamily(
    (SMALL.model_copy(update={"layers": 2}), LARGE.model_copy(update={"layers": 4}))
)
PROMPT, COUNT, CHANGE_AT, TIE = [5, 80, 13, 200, 7, 91, 33], 20, 6, 1e-3


def route(*parts: tuple[int, int, int]) -> Route:
    return tuple(LayerRange(anchor=a, first=f, last=n) for a, f, n in parts)


ROUTES = {
    "small": route((0, 0, 1)),
    "small-1+large": route((0, 0, 0), (1, 1, 3)),
    "large": route((1, 0, 3)),
    "large-2+small": route((1, 0, 1), (0, 1, 1)),
}
NAMES = list(ROUTES)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """Return the family with all its paths."""
    path: Path = tmp_path_factory.mktemp("unequal")
    variants = [TextVariant(name=n, residual=LADDER, route=r) for n, r in ROUTES.items()]
    write_family(path, FAMILY, variants)
    write_qualities(path, (0.2, 0.4, 0.5, 0.1))
    return TextBundle.load(path)


@pytest.fixture
async def scheduler(
    bundle: TextBundle, request: pytest.FixtureRequest
) -> AsyncIterator[TextScheduler]:
    async with running_scheduler(bundle, ranks=request.param) as running:
        running.times = FixedTimes([1.0, 2.0, 3.0, 1.5], translation_s=1e-3)
        yield running


@pytest.mark.parametrize(
    ("scheduler", "mode", "before", "after"),
    [
        (1, "project", "small", "large"),
        (2, "project", "large", "small"),
        (2, "write-through", "small", "large-2+small"),
    ],
    indirect=["scheduler"],
)
async def test_change_between_depths_gives_the_defined_tokens(
    scheduler: TextScheduler, mode: CacheMode, before: str, after: str
) -> None:
    first, second = NAMES.index(before), NAMES.index(after)
    scheduler.apply_settings(SchedulerSettings(cache_mode=mode, pinned_variant=first))
    chunks = []
    async with aclosing(scheduler.generate(make_request(PROMPT, COUNT))) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            if chunk.index == CHANGE_AT:
                settings = SchedulerSettings(cache_mode=mode, pinned_variant=second)
                scheduler.apply_settings(settings)
    spans = chunks[-1].answer.spans
    assert [span.variant for span in spans] == [first, second]
    taken = [ROUTES[NAMES[span.variant]] for span in spans for _ in range(span.num_tokens)]
    routes = [ROUTES[before]] * (len(PROMPT) - 1) + taken
    answer = [chunk.token for chunk in chunks]
    definition = Definition(random_family(family=FAMILY), lag=1, depths=DEPTHS)
    logits = definition.logits([*PROMPT, *answer[:-1]], routes)[len(PROMPT) - 1 :]
    chosen = logits[torch.arange(COUNT), torch.tensor(answer)]
    assert (logits.max(dim=-1).values - chosen).max() < TIE
