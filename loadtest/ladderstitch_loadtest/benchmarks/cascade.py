"""Cascades by confidence on held-out images: accuracy, compute time and kept budgets.

Images are those that no temperature was fitted on. The best variant and the cascades take turns on
each image and on the same arrivals.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ladderstitch.client import AsyncClient, infer_request
from ladderstitch.training.vision.dataset import LabelledImages
from ladderstitch_loadtest.benchmarks.overhead import INFER
from ladderstitch_loadtest.load.in_process import PlannedRequest, poisson, send_open_loop
from ladderstitch_loadtest.load.paired import paired_difference
from ladderstitch_loadtest.load.traces import BudgetClass
from ladderstitch_loadtest.simulation.policy_sweep import policy_settings
from ladderstitch_loadtest.simulation.profiles import Family
from ladderstitch_loadtest.simulation.scenarios import Scenario
from ladderstitch_loadtest.simulation.simulator import Machine, simulate

CONFIDENCE = 0.95
SIMULATED = tuple(
    Scenario("gamma", load, cv2, mixed=mixed)
    for load in (0.1, 0.3, 0.75, 1.2)
    for cv2, mixed in ((1.0, False), (8.0, False), (1.0, True))
)
"""Scenarios of one engine, the first of which leaves time for the best variant."""

Uint8Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """One minimum confidence (0: the best variant alone) over all images.

    `compute_us` is the mean of the server's compute time of an image. `busy_us` is the same with
    the median of all images that ran the same stages in place of each one's time, which a busy
    machine disturbs less. Ratios are over the best variant's. `stages` counts the images by the
    variants that ran.
    """

    min_confidence: float
    accuracy: float
    low: float
    high: float
    overlaps: bool
    compute_us: float
    compute_ratio: float
    busy_us: float
    busy_ratio: float
    stages: dict[str, int]


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """The attainment with and without a minimum confidence on the same arrivals, in shares.

    `ahead` is attainment with it minus without it in points, the mean over the rounds or seeds, and
    `half_width` that of its 95 % interval. Qualities are effective ones: 0 for a missed budget. A
    server states the quality of the variants that answered, the simulator that of the cascade.
    """

    load: str
    attainment: float
    attainment_without: float
    ahead: float
    half_width: float
    quality: float
    quality_without: float


@dataclass(frozen=True, slots=True)
class CascadeResult:
    """The whole measurement."""

    images: int
    calibration_errors: dict[int, float]
    accuracy: list[AccuracyRow]
    server: list[BudgetRow]
    simulated: list[BudgetRow]

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


async def measure_accuracy(
    client: AsyncClient,
    images: LabelledImages,
    thresholds: Sequence[float],
    advance: Callable[[int], None],
) -> list[AccuracyRow]:
    """Return a row for the best variant, and one for each minimum confidence.

    A caller sends one image at a time; all rows take turns on each image.
    """
    best = (await client.get_model()).frontier[-1]
    right: dict[float, list[bool]] = defaultdict(list)
    seconds: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(len(images)):
        pixels, label = images.pixels[number : number + 1].numpy(), int(images.labels[number])
        turn = number % (len(thresholds) + 1)
        for threshold in [0.0, *thresholds][turn:] + [0.0, *thresholds][:turn]:
            wanted = {"min_confidence": threshold} if threshold else {"variant": best}
            answer = await client.predict(pixels, **wanted)
            right[threshold].append(int(answer.logits[0].argmax()) == label)
            stages = "+".join(map(str, answer.stages or (answer.variant,)))
            seconds[threshold][stages].append(1e6 * answer.compute_s)
        advance(number + 1)
    rows: list[AccuracyRow] = []
    for threshold in (0.0, *thresholds):
        rows.append(_accuracy_row(threshold, right[threshold], seconds[threshold], rows))
    return rows


def _accuracy_row(
    threshold: float, right: list[bool], us: dict[str, list[float]], rows: list[AccuracyRow]
) -> AccuracyRow:
    """Return one row; the first of `rows`, if any, is that of the best variant."""
    ends = binomtest(sum(right), len(right)).proportion_ci(CONFIDENCE, method="wilson")
    mean_us = fmean(value for values in us.values() for value in values)
    busy_us = sum(len(values) * median(values) for values in us.values()) / len(right)
    best = rows[0] if rows else None
    return AccuracyRow(
        min_confidence=threshold,
        accuracy=sum(right) / len(right),
        low=round(float(ends.low), 5),
        high=round(float(ends.high), 5),
        overlaps=best is None or (float(ends.high) >= best.low and float(ends.low) <= best.high),
        compute_us=round(mean_us, 1),
        compute_ratio=1.0 if best is None else round(mean_us / best.compute_us, 4),
        busy_us=round(busy_us, 1),
        busy_ratio=1.0 if best is None else round(busy_us / best.busy_us, 4),
        stages={stages: len(values) for stages, values in sorted(us.items())},
    )


async def measure_budgets(
    client: AsyncClient,
    images: LabelledImages,
    threshold: float,
    *,
    loads: Sequence[float],
    seconds: float,
    rounds: int,
    advance: Callable[[str], None],
) -> list[BudgetRow]:
    """Return the attainment of a server with and without a minimum confidence.

    A load is the rate over what the best variant answers one by one. Half of the requests have a
    budget of two and a half times its time in addition to the time around it, half of ten times.
    """
    model = await client.get_model()
    best = model.frontier[-1]
    pixels = images.pixels.numpy()
    alone = [await client.predict(pixels[:1], variant=best) for _ in range(200)]
    compute_s = median(answer.compute_s for answer in alone)
    around_s = float(np.quantile([a.total_s - a.compute_s for a in alone], 0.99))
    classes = [BudgetClass(f"{n:g}x", around_s + n * compute_s) for n in (2.5, 10)]
    call = client.channel.unary_unary(INFER)
    rows = []
    for load in loads:
        shares: dict[float, list[float]] = {0.0: [], threshold: []}
        quality: dict[float, list[float]] = {0.0: [], threshold: []}
        for turn in range(rounds):
            advance(f"load {load:g}, round {turn + 1} of {rounds}")
            arrivals = _draw(pixels, classes, load / compute_s, seconds, turn)
            for confidence in (0.0, threshold) if turn % 2 else (threshold, 0.0):
                samples = await send_open_loop(call, _plan(arrivals, confidence))
                shares[confidence].append(fmean(s.met for s in samples))
                quality[confidence].append(fmean(s.quality * s.met for s in samples))
        rows.append(_budget_row(f"load {load:g}", threshold, shares, quality))
    return rows


Arrival = tuple[float, BudgetClass, Uint8Pixels]


def _draw(
    pixels: Uint8Pixels, classes: Sequence[BudgetClass], rate: float, seconds: float, seed: int
) -> list[Arrival]:
    """Return arrivals, each with a class and an image [1, C, H, W]."""
    rng = np.random.default_rng(seed)
    return [
        (at, classes[int(rng.integers(len(classes)))], pixels[[rng.integers(len(pixels))]])
        for at in poisson(rate, seconds, rng)
    ]


def _plan(arrivals: Sequence[Arrival], confidence: float) -> list[PlannedRequest]:
    return [
        (
            at,
            one,
            infer_request(
                image, budget_s=one.budget_s, min_confidence=confidence or None
            ).SerializeToString(),
        )
        for at, one, image in arrivals
    ]


def _budget_row(
    load: str,
    threshold: float,
    shares: dict[float, list[float]],
    quality: dict[float, list[float]],
) -> BudgetRow:
    ahead, half_width = paired_difference(shares[threshold], shares[0.0])
    return BudgetRow(
        load=load,
        attainment=round(fmean(shares[threshold]), 5),
        attainment_without=round(fmean(shares[0.0]), 5),
        ahead=round(100 * ahead, 3),
        half_width=round(100 * half_width, 3),
        quality=round(fmean(quality[threshold]), 5),
        quality_without=round(fmean(quality[0.0]), 5),
    )


def simulate_budgets(
    family: Family, threshold: float, seeds: int, advance: Callable[[str], None]
) -> list[BudgetRow]:
    """Return the attainment in the simulator with and without a minimum confidence.

    Its qualities are calibrated ones: those of the answers that are sure, and of the others.
    """
    settings = policy_settings("adaptive")
    rows = []
    for scenario in SIMULATED:
        advance(f"simulating {scenario.name}")
        shares: dict[float, list[float]] = {0.0: [], threshold: []}
        quality: dict[float, list[float]] = {0.0: [], threshold: []}
        for seed in range(seeds):
            trace = scenario.trace(family, seed)
            for confidence in shares:
                machine = Machine(min_confidence=confidence)
                found = simulate(family, trace, settings, machine, seed=seed).summary()
                shares[confidence].append(found.attainment)
                quality[confidence].append(found.effective_quality)
        rows.append(_budget_row(scenario.name, threshold, shares, quality))
    return rows
