"""Mixed budgets under Poisson load: what a policy makes of them, beside every fixed variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import fmean, median

import numpy as np

from ladderstitch.client import AsyncClient, infer_request
from ladderstitch.v1 import inference_pb2 as pb
from ladderstitch_loadtest.benchmarks.overhead import INFER
from ladderstitch_loadtest.load.open_loop import BudgetClass, Sample, open_loop, poisson

POLICIES = ("adaptive", "slackfit", "max_quality", "max_batch")
ALONE_CALLS = 400


@dataclass(frozen=True, slots=True)
class Alone:
    """One variant, one caller: what the server takes without any other load."""

    variant: int
    total_p99_s: float
    compute_median_s: float


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy over all rounds; attainment and quality are over offered requests."""

    policy: str
    offered: int
    attainment: float
    by_class: dict[str, float]
    effective_quality: float
    client_p50_ms: float
    client_p99_ms: float
    mean_batch: float
    refused: int


@dataclass(slots=True)
class Mixed:
    """The whole measurement."""

    rate: float
    budgets_ms: dict[str, float]
    alone_p99_ms: dict[str, float]
    seconds_per_run: float
    rounds: int
    send_lag_p99_ms: float = 0.0
    rows: list[PolicyRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


async def measure(
    address: str,
    *,
    seconds: float,
    rounds: int,
    seed: int,
    policies: tuple[str, ...],
    advance: Callable[[str], None],
) -> Mixed:
    """All policies and all fixed frontier variants take turns on the same arrivals.

    One third of the requests each: 2x the fastest anchor's served p99 plus one slowest service
    time; 2x the middle's; 3x the largest's. The rate is half of the largest anchor's capacity.
    """
    async with AsyncClient(address) as client:
        model = await client.get_model()
        anchors = sorted((s for s in model.variants if s.is_anchor), key=lambda s: s.latency_us)
        alone = [await _alone(client, model, anchor.id) for anchor in anchors]
        classes = budget_classes(alone[0], alone[len(alone) // 2], alone[-1])
        rate = 0.5 / alone[-1].compute_median_s
        mixed = Mixed(
            rate=round(rate, 1),
            budgets_ms={c.name: c.budget_us / 1e3 for c in classes},
            alone_p99_ms={str(a.variant): round(1e3 * a.total_p99_s, 3) for a in alone},
            seconds_per_run=seconds,
            rounds=rounds,
        )
        names = [*policies, *(f"fixed {variant}" for variant in model.frontier)]
        samples: dict[str, list[Sample]] = {name: [] for name in names}
        for turn in range(rounds):
            order = names[turn % len(names) :] + names[: turn % len(names)]
            for name in order:
                advance(name)
                await choose(client, name)
                requests = _requests(model, classes, rate, seconds, seed + turn)
                samples[name] += await open_loop(client.channel.unary_unary(INFER), requests)
        await choose(client, "adaptive")
    mixed.rows = [_row(name, ends, classes) for name, ends in samples.items()]
    lags = [sample.send_lag_s for ends in samples.values() for sample in ends]
    mixed.send_lag_p99_ms = round(1e3 * float(np.quantile(lags, 0.99)), 3)
    return mixed


def budget_classes(fastest: Alone, middle: Alone, largest: Alone) -> list[BudgetClass]:
    tight = 2 * fastest.total_p99_s + largest.compute_median_s
    return [
        BudgetClass("tight", round(1e6 * tight)),
        BudgetClass("middle", round(2e6 * middle.total_p99_s)),
        BudgetClass("relaxed", round(3e6 * largest.total_p99_s)),
    ]


async def choose(client: AsyncClient, name: str) -> None:
    """Set the server's policy: `slackfit` and so on, or `fixed N`."""
    policy, _, variant = name.partition(" ")
    fields: dict[str, object] = {"policy": f"POLICY_NAME_{policy.upper()}", "unpin": True}
    if variant:
        fields["fixed_variant"] = int(variant)
    await client.update_scheduling(**fields)


async def _alone(client: AsyncClient, model: pb.GetModelResponse, variant: int) -> Alone:
    image = _image(model)
    answers = [await client.predict(image, variant=variant) for _ in range(ALONE_CALLS)]
    return Alone(
        variant,
        float(np.quantile([a.total_s for a in answers], 0.99)),
        median(a.compute_s for a in answers),
    )


def _requests(
    model: pb.GetModelResponse, classes: list[BudgetClass], rate: float, seconds: float, seed: int
) -> list[tuple[float, BudgetClass, bytes]]:
    rng = np.random.default_rng(seed)
    image = _image(model)
    messages = [
        infer_request(image, budget_s=c.budget_us / 1e6).SerializeToString() for c in classes
    ]
    picks = [(at, int(rng.integers(len(classes)))) for at in poisson(rate, seconds, rng)]
    return [(at, classes[pick], messages[pick]) for at, pick in picks]


def _image(model: pb.GetModelResponse) -> np.ndarray:
    inputs = model.preprocessing
    shape = (1, inputs.channels, inputs.height, inputs.width)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def _row(name: str, samples: list[Sample], classes: list[BudgetClass]) -> PolicyRow:
    answered = [sample for sample in samples if sample.code == "OK"]
    latencies = [1e3 * sample.latency_s for sample in answered]
    by_class = {
        c.name: round(fmean(s.met for s in samples if s.budget_class == c.name), 4) for c in classes
    }
    return PolicyRow(
        policy=name,
        offered=len(samples),
        attainment=round(fmean(sample.met for sample in samples), 4),
        by_class=by_class,
        effective_quality=round(fmean(s.quality * s.met for s in samples), 4),
        client_p50_ms=round(float(np.quantile(latencies, 0.5)), 2),
        client_p99_ms=round(float(np.quantile(latencies, 0.99)), 2),
        mean_batch=round(fmean(sample.batch_size for sample in answered), 2),
        refused=len(samples) - len(answered),
    )
