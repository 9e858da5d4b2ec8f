"""Mixed budgets under Poisson load: policies compared with every fixed frontier variant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray

from ladderstitch.client import AsyncClient, infer_request
from ladderstitch.v1 import inference_pb2 as pb
from ladderstitch_loadtest.benchmarks.overhead import INFER
from ladderstitch_loadtest.load.in_process import (
    PlannedRequest,
    RequestSample,
    poisson,
    send_open_loop,
)
from ladderstitch_loadtest.load.paired import paired_difference
from ladderstitch_loadtest.load.traces import BudgetClass

Uint8Pixels = NDArray[np.uint8]
"""[N, C, H, W]."""
POLICIES = ("adaptive", "slackfit", "max_quality", "max_batch")
CLASSES = ("tight", "middle", "relaxed")
UNLOADED_CALLS = 400


@dataclass(frozen=True, slots=True)
class UnloadedLatency:
    """What the server reports for one variant and one caller, without any other load."""

    variant: int
    total_p99_s: float
    compute_median_s: float


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One policy over all rounds; attainment and quality are over offered requests.

    `behind` is adaptive's effective quality minus this one's in points, the mean over the rounds,
    and `behind_half_width` the half width of its 95 % interval.
    """

    policy: str
    offered: int
    attainment: float
    by_class: dict[str, float]
    effective_quality: float
    client_p50_ms: float
    client_p99_ms: float
    mean_batch: float
    rejected: int
    behind: float
    behind_half_width: float


@dataclass(slots=True)
class MixedResult:
    """The whole measurement: requests per second, their budgets, a row for each policy.

    Each request has `images` images.
    """

    images: int
    rate: float
    budgets_ms: dict[str, float]
    unloaded_p99_ms: dict[str, float]
    seconds_per_run: float
    rounds: int
    send_lag_p99_ms: float = 0.0
    rows: list[PolicyRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


async def measure(
    address: str,
    *,
    images: int,
    load: float,
    seconds: float,
    rounds: int,
    seed: int,
    policies: tuple[str, ...],
    advance: Callable[[str], None],
) -> MixedResult:
    """Measure policies and all fixed frontier variants; they take turns on the same arrivals.

    A request has `images` images, and each third of the requests one of the budgets of
    `budget_classes`. The rate is `load` times what the best frontier variant can answer one by one.
    `advance` gets the name of the current policy.
    """
    async with AsyncClient(address) as client:
        model = await client.get_model()
        pixels, frontier = make_images(model, images), model.frontier
        chosen = (frontier[0], frontier[len(frontier) // 2], frontier[-1])
        unloaded = [await measure_unloaded(client, pixels, variant) for variant in chosen]
        classes = budget_classes(*unloaded)
        rate = load / unloaded[-1].compute_median_s
        found = MixedResult(
            images=images,
            rate=round(rate, 1),
            budgets_ms={c.name: round(1e3 * c.budget_s, 3) for c in classes},
            unloaded_p99_ms={str(u.variant): round(1e3 * u.total_p99_s, 3) for u in unloaded},
            seconds_per_run=seconds,
            rounds=rounds,
        )
        contenders = [*policies, *(f"fixed {variant}" for variant in model.frontier)]
        samples: dict[str, list[list[RequestSample]]] = {name: [] for name in contenders}
        for turn in range(rounds):
            requests = _draw_requests(pixels, classes, rate, seconds, seed + turn)
            for name in rotate(contenders, turn):
                advance(name)
                await set_policy(client, name)
                call = client.channel.unary_unary(INFER)
                samples[name].append(await send_open_loop(call, requests))
        await set_policy(client, "adaptive")
    ours = samples["adaptive"]
    found.rows = [_policy_row(name, own, ours, classes) for name, own in samples.items()]
    lags = [sample.send_lag_s for own in samples.values() for run in own for sample in run]
    found.send_lag_p99_ms = round(1e3 * float(np.quantile(lags, 0.99)), 3)
    return found


def budget_classes(
    fastest: UnloadedLatency, middle: UnloadedLatency, best: UnloadedLatency
) -> list[BudgetClass]:
    """Return three budget classes, named tight, middle and relaxed in ascending order.

    The variants are those of the frontier. The budgets, in whole microseconds, are twice the
    fastest one's p99 plus one compute time of the best, twice the middle one's p99, and three times
    the best one's p99. The compute time lets a request wait for a batch that runs already. Which of
    the first two budgets is shorter depends on the family, so the names follow the order.
    """
    budgets_s = (
        2 * fastest.total_p99_s + best.compute_median_s,
        2 * middle.total_p99_s,
        3 * best.total_p99_s,
    )
    return [
        BudgetClass(name, round(budget_s, 6))
        for name, budget_s in zip(CLASSES, sorted(budgets_s), strict=True)
    ]


def rotate(names: Sequence[str], turn: int) -> list[str]:
    """Return the names in their order, beginning with another one in each turn."""
    cut = turn % len(names)
    return [*names[cut:], *names[:cut]]


async def set_policy(client: AsyncClient, name: str) -> None:
    """Set the server's policy by its name, or pin a variant by `fixed N`."""
    policy, _, variant = name.partition(" ")
    await client.update_scheduling(
        policy=f"POLICY_NAME_{policy.upper()}",
        unpin=True,
        fixed_variant=int(variant) if variant else None,
    )


async def measure_unloaded(
    client: AsyncClient, pixels: Uint8Pixels, variant: int
) -> UnloadedLatency:
    """Return the latency of a variant for one caller without any other load."""
    answers = [await client.predict(pixels, variant=variant) for _ in range(UNLOADED_CALLS)]
    return UnloadedLatency(
        variant,
        float(np.quantile([a.total_s for a in answers], 0.99)),
        median(a.compute_s for a in answers),
    )


def _draw_requests(
    pixels: Uint8Pixels, classes: list[BudgetClass], rate: float, seconds: float, seed: int
) -> list[PlannedRequest]:
    rng = np.random.default_rng(seed)
    messages = [infer_request(pixels, budget_s=c.budget_s).SerializeToString() for c in classes]
    picks = [(at, int(rng.integers(len(classes)))) for at in poisson(rate, seconds, rng)]
    return [(at, classes[pick], messages[pick]) for at, pick in picks]


def make_images(model: pb.GetModelResponse, images: int) -> Uint8Pixels:
    """Return random images [images, C, H, W] of the size that a model takes."""
    inputs = model.preprocessing
    shape = (images, inputs.channels, inputs.height, inputs.width)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def _effective_quality(samples: Iterable[RequestSample]) -> float:
    return fmean(sample.quality * sample.met for sample in samples)


def _policy_row(
    name: str,
    runs: list[list[RequestSample]],
    ours: list[list[RequestSample]],
    classes: list[BudgetClass],
) -> PolicyRow:
    """Return the figures of a policy's runs; `ours` are those of the policy adaptive."""
    behind, half_width = paired_difference(
        [_effective_quality(run) for run in ours], [_effective_quality(run) for run in runs]
    )
    samples = list(chain.from_iterable(runs))
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
        effective_quality=round(_effective_quality(samples), 4),
        client_p50_ms=round(float(np.quantile(latencies, 0.5)), 2),
        client_p99_ms=round(float(np.quantile(latencies, 0.99)), 2),
        mean_batch=round(fmean(sample.batch_size for sample in answered), 2),
        rejected=len(samples) - len(answered),
        behind=round(100 * behind, 3),
        behind_half_width=round(100 * half_width, 3),
    )
