"""Tests of the choice of variants and of the tokens of a step, with fixed step times."""

from __future__ import annotations

import pytest

from ladderstitch.errors import (
    BudgetInfeasible,
    Overloaded,
    QualityUnavailable,
    RequestError,
    VariantNotFound,
)
from ladderstitch.scheduling.candidates import CandidateFilter
from ladderstitch.scheduling.generation import NO_BUDGET, GenerationRequest, TokenBudget
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.text.scheduler.cache_rules import CacheRules
from ladderstitch.text.scheduler.decode_load import NO_LOAD, SchedulerLoad
from ladderstitch.text.scheduler.pace import DEFAULT_TPOT_S
from ladderstitch.text.scheduler.planner import MIN_PREFILL_CHUNK, choose_variant, plan_step
from ladderstitch.text.scheduler.sequence import Sequence
from ladderstitch.text.scheduler.step_times import StepTimes
from ladderstitch.text.tokenizer import TextTokenizer
from tests.support.language_models import write_tiny

STANDARD, LADDER = 0, 1
SETTINGS = SchedulerSettings()


def linear_latency(base_s: float, token_s: float = 0.001) -> Latency:
    seconds = tuple(base_s + token_s * size for size in (1, 100))
    return Latency(median_s=seconds, p99_s=seconds)


PROFILE = LatencyProfile(
    device="none",
    threads=1,
    date="",
    versions={},
    batch_sizes=(1, 100),
    variants={STANDARD: linear_latency(0.049), LADDER: linear_latency(0.019)},
)
TIMES = StepTimes(PROFILE)
QUALITY = {STANDARD: 0.6, LADDER: 0.5}
CANDIDATES = CandidateFilter.from_settings(QUALITY, PROFILE, SETTINGS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(write_tiny(tmp_path_factory.mktemp("t")) / "tokenizer.json")


def make_request(budget: TokenBudget = NO_BUDGET, tokens: int = 50, **fields: object) -> object:
    defaults: dict[str, object] = {"arrival": 100.0, "max_tokens": 11, "budget": budget}
    return GenerationRequest(tokens=(1,) * tokens, **(defaults | fields))  # type: ignore[arg-type] # by name


def choose(
    request: object, load: SchedulerLoad = NO_LOAD, settings: SchedulerSettings = SETTINGS
) -> int:
    assert isinstance(request, GenerationRequest)
    return choose_variant(request, CANDIDATES, settings, TIMES, load, {}, now=100.0)


@pytest.mark.parametrize(
    ("budget", "variant"),
    [
        (NO_BUDGET, STANDARD),
        (TokenBudget(per_token_s=0.063), STANDARD),  # a token takes 50 ms there, 80 % of 63 ms
        (TokenBudget(per_token_s=0.062), LADDER),
        (TokenBudget(first_token_s=0.1), STANDARD),  # 99 ms for a prompt of 50
        (TokenBudget(first_token_s=0.098), LADDER),
        (TokenBudget(answer_s=0.73), STANDARD),  # 99 ms and 10 tokens more in 80 % of the rest
        (TokenBudget(answer_s=0.72), LADDER),
        (TokenBudget(per_token_s=0.001), LADDER),  # infeasible: the fastest variant
    ],
)
def test_choose_variant_returns_best_within_budget(budget: TokenBudget, variant: int) -> None:
    assert choose(make_request(budget)) == variant


def test_choose_variant_under_load_accounts_for_others() -> None:
    busy = SchedulerLoad({STANDARD: [DEFAULT_TPOT_S] * 30})  # a step of 31 takes 80 ms
    assert choose(make_request(TokenBudget(per_token_s=0.09)), busy) == LADDER
    assert choose(make_request(TokenBudget(per_token_s=0.12)), busy) == STANDARD
    alone = SchedulerSettings(policy="max_quality")
    assert choose(make_request(TokenBudget(per_token_s=0.09)), busy, alone) == STANDARD
    prefilling = SchedulerLoad(prefill_tokens={STANDARD: 100}, num_waiting=1)
    assert choose(make_request(TokenBudget(first_token_s=0.2)), prefilling) == LADDER


def test_choose_variant_keeps_the_budgets_of_others() -> None:
    request = make_request(TokenBudget(per_token_s=0.2))
    # A step of 20 ms in every 40 ms leaves half of the time: 50 of 200 ms fit, not 50 of 100 ms.
    assert choose(request, SchedulerLoad({LADDER: [0.04]})) == STANDARD
    assert choose(request, SchedulerLoad({LADDER: [0.03]})) == LADDER


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
def test_choose_variant_without_feasible_variant_raises(
    fields: dict[str, object], error: type[RequestError], metadata: dict[str, str]
) -> None:
    with pytest.raises(error) as caught:
        choose(make_request(**fields))
    assert metadata.items() <= caught.value.metadata.items()


def test_choose_variant_feasible_only_idle_raises_overloaded() -> None:
    prefilling = SchedulerLoad(prefill_tokens={STANDARD: 100}, num_waiting=1)
    with pytest.raises(Overloaded, match="is expected in"):
        choose(make_request(hard_deadline=100.1), prefilling)
    full = SchedulerLoad(num_waiting=SETTINGS.queue_limit_requests)
    with pytest.raises(Overloaded, match="requests are waiting"):
        choose(make_request(), full)


def test_choose_variant_with_pin_or_floor_ignores_budget() -> None:
    tight = TokenBudget(per_token_s=0.01)
    assert choose(make_request(tight, variant=STANDARD)) == STANDARD
    assert choose(make_request(tight, min_quality=0.6)) == STANDARD


def make_sequence(
    tokenizer: TextTokenizer, request: object, variant: int = STANDARD, *, decoding: bool = False
) -> Sequence:
    assert isinstance(request, GenerationRequest)
    sequence = Sequence(
        request, variant, ("standard", "ladder"), None, tokenizer, (), CacheRules.separate(2)
    )
    if decoding:
        sequence.block_table.num_computed = sequence.num_pending
        sequence.tokens.append(1)
        sequence.pace.add_token(100.0)
    return sequence


def test_plan_step_runs_the_most_urgent_variant(tokenizer: TextTokenizer) -> None:
    tight = make_sequence(tokenizer, make_request(TokenBudget(first_token_s=0.5)), LADDER)
    relaxed = make_sequence(tokenizer, make_request())
    plan = plan_step([relaxed, tight], TIMES, 100.0)
    assert plan is not None
    assert plan.variant == LADDER
    assert [(chunk.sequence, chunk.num_tokens) for chunk in plan.chunks] == [(tight, 50)]
    assert plan_step([], TIMES, 100.0) is None


def test_plan_step_with_decoding_limits_prefill(tokenizer: TextTokenizer) -> None:
    def planned_tokens(per_token_s: float) -> list[int]:
        decoding = [
            make_sequence(tokenizer, make_request(TokenBudget(per_token_s=s)), decoding=True)
            for s in (per_token_s, 1.0)
        ]
        prefilling = make_sequence(tokenizer, make_request(tokens=500))
        plan = plan_step([prefilling, *decoding], TIMES, 100.0)
        assert plan is not None
        assert {chunk.sequence for chunk in plan.chunks} == {prefilling, *decoding}
        return [chunk.num_tokens for chunk in plan.chunks]

    assert planned_tokens(10.0) == [1, 1, 98]
    assert planned_tokens(0.09) == [1, 1, 39]  # a step of 41 tokens takes 90 ms
    assert planned_tokens(0.05) == [1, 1, MIN_PREFILL_CHUNK]


def test_plan_step_with_missed_ttft_prefers_others(tokenizer: TextTokenizer) -> None:
    late = make_sequence(tokenizer, make_request(TokenBudget(first_token_s=0.001), tokens=100))
    possible = make_sequence(tokenizer, make_request(TokenBudget(first_token_s=0.5), tokens=100))
    plan = plan_step([late, possible], TIMES, 100.0)
    assert plan is not None
    assert [chunk.sequence for chunk in plan.chunks] == [possible]


def test_variants_by_name_are_chosen_by_requests_that_name_them_only() -> None:
    candidates = CandidateFilter.from_settings(QUALITY, PROFILE, SETTINGS, by_name={STANDARD})

    def choose_among(**fields: object) -> int:
        request = make_request(**fields)  # type: ignore[arg-type] # by name
        assert isinstance(request, GenerationRequest)
        return choose_variant(request, candidates, SETTINGS, TIMES, NO_LOAD, {}, now=100.0)

    assert choose_among() == LADDER
    assert choose_among(variant=STANDARD) == STANDARD
    with pytest.raises(QualityUnavailable, match=r"min_quality: expected at most 0\.5000"):
        choose_among(min_quality=0.55)
