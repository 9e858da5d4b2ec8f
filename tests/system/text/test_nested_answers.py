"""Tests of answers whose MLPs change their width between two tokens, on real ranks.

The scheduler plans with fixed times, so that the speed of the machine does not matter.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ladderstitch.scheduling.generation import TokenBudget
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.comm.base import SingleRankCommunicator
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.engine.rank_models import load_models
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.shard import Shard
from tests.support.fixed_times import FixedTimes
from tests.system.text.test_scheduler import collect, make_request, running_scheduler
from tests.system.text.test_variant_changes import ComputedTokens, spans_of, variants_of
from tests.text.model.test_nested_ffn import write_nested

HALF, EIGHTH = 1, 2
SECONDS = (1e3, 900.0, 1.0, 950.0)
"""Of a step of each path: whole, half, eighth, and a mix of widths."""
PROMPT = [5, 80, 13, 200, 7, 91, 33]
COUNT = 24


def answer_in_process(bundle: TextBundle, variants: list[int]) -> list[int]:
    """Return the greedy answer whose tokens these paths compute, one by one, on one cache."""
    config = RankConfig.of(bundle, max_model_len=128)
    shard = Shard.of(config.model, 0, 1)
    models, cache = load_models(config, shard), PagedCache(config.model, shard, 8, 16)
    answer, new, start = list[int](), PROMPT, 0
    for variant in variants:
        step = Step((SequenceInput(new, start, range(8), LogitsMode.LAST),))
        plans, comm = config.plans(variant), SingleRankCommunicator()
        logits = models[variant].forward(Batch(step, 16), cache, plans, comm)
        start, new = start + len(new), [int(logits[-1].argmax())]
        answer += new
    return answer


@pytest.mark.parametrize("ranks", [1, 2])
async def test_an_answer_changes_its_width_and_computes_nothing_again(
    tmp_path: Path, ranks: int
) -> None:
    bundle = TextBundle.load(write_nested(tmp_path / "nested"))
    async with running_scheduler(bundle, ranks=ranks) as scheduler:
        scheduler.times = FixedTimes(SECONDS)
        scheduler.apply_settings(SchedulerSettings())
        computed = ComputedTokens(scheduler)
        budget = TokenBudget(per_token_s=600.0)  # the lead of the first tokens pays for others
        chunks = await collect(scheduler, make_request(PROMPT, COUNT, budget=budget))
    variants = [variant for variant, _ in spans_of(chunks[-1])]
    assert variants[:2] == [EIGHTH, HALF]
    assert {span.cache for span in chunks[-1].answer.spans[1:]} == {"shared"}
    tokens = [chunk.token for chunk in chunks]
    assert tokens == answer_in_process(bundle, variants_of(chunks[-1]))
    assert tokens != answer_in_process(bundle, [EIGHTH] * COUNT)
    assert computed.count == len(PROMPT) + COUNT - 1
