"""Paths and steps by budget: pure functions of made-up step times, no model, no clock."""

from __future__ import annotations

import math

import pytest

from ladderstitch.errors import (
    BudgetInfeasible,
    Overloaded,
    QualityUnavailable,
    RequestError,
    VariantNotFound,
)
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.scheduling.requests import NO_BUDGET, GenerationRequest, TokenBudget
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.text.scheduler.planner import (
    IDLE,
    LEAST_CHUNK,
    SchedulerLoad,
    choose_path,
    plan_step,
)
from ladderstitch.text.scheduler.sequence import Sequence_
from ladderstitch.text.scheduler.step_times import RELAXED_FIRST_S, StepTimes, due
from ladderstitch.text.tokenizer import TextTokenizer
from tests.support.language_models import write_tiny

STANDARD, LADDER = 0, 1
SETTINGS = SchedulerSettings()


def linear(base_s: float, token_s: float = 0.001) -> Latency:
    seconds = tuple(base_s + token_s * size for size in (1, 100))
    return Latency(median_s=seconds, p99_s=seconds)


PROFILE = LatencyProfile(
    device="made up",
    threads=1,
    date="",
    versions={},
    batch_sizes=(1, 100),
    variants={STANDARD: linear(0.049), LADDER: linear(0.019)},
)
TIMES = StepTimes(PROFILE, 0.0)
QUALITY = {STANDARD: 0.6, LADDER: 0.5}
CANDIDATES = CandidateFilter.from_settings(QUALITY, PROFILE, SETTINGS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(write_tiny(tmp_path_factory.mktemp("t")) / "tokenizer.json")


def request(budget: TokenBudget = NO_BUDGET, tokens: int = 50, **fields: object) -> object:
    defaults: dict[str, object] = {"arrival": 100.0, "max_tokens": 11, "budget": budget}
    return GenerationRequest(tokens=(1,) * tokens, **(defaults | fields))  # type: ignore[arg-type] # by name


def chosen(
    wanted: object, load: SchedulerLoad = IDLE, settings: SchedulerSettings = SETTINGS
) -> int:
    assert isinstance(wanted, GenerationRequest)
    return choose_path(wanted, CANDIDATES, settings, TIMES, load, {}, now=100.0)


@pytest.mark.parametrize(
    ("budget", "path"),
    [
        (NO_BUDGET, STANDARD),
        (TokenBudget(per_token_s=0.051), STANDARD),  # a token takes 50 ms there
        (TokenBudget(per_token_s=0.049), LADDER),
        (TokenBudget(first_token_s=0.1), STANDARD),  # 99 ms for a prompt of 50
        (TokenBudget(first_token_s=0.098), LADDER),
        (TokenBudget(answer_s=0.6), STANDARD),  # 99 ms and 10 tokens more
        (TokenBudget(answer_s=0.59), LADDER),
        (TokenBudget(per_token_s=0.001), LADDER),  # hopeless: as fast as it can be
    ],
)
def test_an_answer_takes_the_best_path_that_keeps_its_budget(
    budget: TokenBudget, path: int
) -> None:
    assert chosen(request(budget)) == path


def test_others_count() -> None:
    busy = SchedulerLoad(sequences={STANDARD: 30}, unread={}, waiting=0)
    assert chosen(request(TokenBudget(per_token_s=0.06)), busy) == LADDER
    assert chosen(request(TokenBudget(per_token_s=0.12)), busy) == STANDARD
    alone = SchedulerSettings(policy="max_quality")
    assert chosen(request(TokenBudget(per_token_s=0.06)), busy, alone) == STANDARD
    reading = SchedulerLoad(sequences={}, unread={STANDARD: 100}, waiting=1)
    assert chosen(request(TokenBudget(first_token_s=0.2)), reading) == LADDER


@pytest.mark.parametrize(
    ("fields", "error", "metadata"),
    [
        ({"variant": 2}, VariantNotFound, {}),
        ({"min_quality": 0.61}, QualityUnavailable, {"max_quality": "0.600000"}),
        ({"min_quality": 0.55, "variant": LADDER}, QualityUnavailable, {}),
        ({"hard_deadline": 100.068}, BudgetInfeasible, {"min_feasible_us": "69000"}),
        (
            {"hard_deadline": 100.068, "min_quality": 0.6},
            BudgetInfeasible,
            {"min_feasible_us": "99000"},
        ),
    ],
)
def test_what_no_path_can_do_is_refused(
    fields: dict[str, object], error: type[RequestError], metadata: dict[str, str]
) -> None:
    with pytest.raises(error) as caught:
        chosen(request(**fields))
    assert metadata.items() <= caught.value.metadata.items()


def test_what_is_feasible_only_when_idle_is_overload() -> None:
    reading = SchedulerLoad(sequences={}, unread={STANDARD: 100}, waiting=1)
    with pytest.raises(Overloaded, match="is expected in"):
        chosen(request(hard_deadline=100.1), reading)
    full = SchedulerLoad(sequences={}, unread={}, waiting=SETTINGS.queue_limit_requests)
    with pytest.raises(Overloaded, match="requests wait"):
        chosen(request(), full)


def test_pins_and_floors() -> None:
    tight = TokenBudget(per_token_s=0.01)
    assert chosen(request(tight, variant=STANDARD)) == STANDARD
    assert chosen(request(tight, min_quality=0.6)) == STANDARD


def test_time_in_hand_is_kept_and_every_answer_is_paced() -> None:
    budget = TokenBudget(first_token_s=1.0, per_token_s=0.1)
    assert due(budget, 5.0, None, 0, 10, 0.01) == 6.0
    assert due(budget, 5.0, 5.5, 3, 10, 0.01) == pytest.approx(5.8)
    assert due(NO_BUDGET, 5.0, None, 0, 10, 0.01) == 5.0 + RELAXED_FIRST_S
    whole = TokenBudget(answer_s=2.0)
    assert due(whole, 5.0, None, 0, 11, 0.1) == pytest.approx(6.0)  # 10 tokens follow
    assert due(whole, 5.0, 6.0, 5, 11, 0.1) == pytest.approx(6.5)
    assert not math.isinf(due(NO_BUDGET, 5.0, 6.0, 1000, 2000, 0.1))


def sequence(
    tokenizer: TextTokenizer, wanted: object, path: int = STANDARD, *, decoding: bool = False
) -> Sequence_:
    assert isinstance(wanted, GenerationRequest)
    made = Sequence_(wanted, path, "", None, tokenizer, ())
    if decoding:
        made.computed = made.pending
        made.tokens.append(1)
        made.first_at = 100.0
    return made


def test_a_step_is_of_the_path_that_is_due_first(tokenizer: TextTokenizer) -> None:
    tight = sequence(tokenizer, request(TokenBudget(first_token_s=0.5)), LADDER)
    relaxed = sequence(tokenizer, request())
    plan = plan_step([relaxed, tight], TIMES, 100.0)
    assert plan is not None
    assert plan.path == LADDER
    assert [(part.sequence, part.count) for part in plan.parts] == [(tight, 50)]
    assert plan_step([], TIMES, 100.0) is None


def test_prompts_take_what_decoding_can_afford(tokenizer: TextTokenizer) -> None:
    def step(per_token_s: float) -> list[int]:
        decoding = [
            sequence(tokenizer, request(TokenBudget(per_token_s=s)), decoding=True)
            for s in (per_token_s, 1.0)
        ]
        reading = sequence(tokenizer, request(tokens=500))
        plan = plan_step([reading, *decoding], TIMES, 100.0)
        assert plan is not None
        assert {part.sequence for part in plan.parts} == {reading, *decoding}
        return [part.count for part in plan.parts]

    assert step(10.0) == [1, 1, 98]
    assert step(0.09) == [1, 1, 39]  # a step of 41 tokens takes 90 ms
    assert step(0.05) == [1, 1, LEAST_CHUNK]


def test_a_first_token_that_is_late_anyway_lets_others_go_first(tokenizer: TextTokenizer) -> None:
    late = sequence(tokenizer, request(TokenBudget(first_token_s=0.001), tokens=100))
    possible = sequence(tokenizer, request(TokenBudget(first_token_s=0.5), tokens=100))
    plan = plan_step([late, possible], TIMES, 100.0)
    assert plan is not None
    assert [part.sequence for part in plan.parts] == [possible]
