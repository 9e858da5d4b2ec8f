"""The cost of a change of variant between two consecutive requests.

The measure is excess compute time: the compute time of a call minus the median of its variant over
the calls that kept the variant. By construction the p50 of kept calls is about 0.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from ladderstitch.client import AsyncClient
from ladderstitch.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class SwitchingResult:
    """Quantiles of excess compute time in microseconds, for calls that kept and that switched.

    `p50_difference_us` is the typical cost of a switch: the difference of the two medians.
    `p99_difference_us` is the difference of the two p99s, and shows whether switching lengthens the
    tail. It is not the p99 of the cost of a switch: no call is measured both ways.
    """

    calls: int
    variants: int
    kept_excess_p50_us: float
    kept_excess_p99_us: float
    switched_excess_p50_us: float
    switched_excess_p99_us: float
    p50_difference_us: float
    p99_difference_us: float

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


async def measure(
    address: str, calls: int, seed: int, advance: Callable[[], None]
) -> SwitchingResult:
    """Return the excess compute time of one caller whose calls keep or switch the variant.

    Each call keeps the last variant or takes a random frontier variant, with equal probability.
    Kept and switched calls of a variant alternate at random, so that the machine's noise affects
    both. `advance` is called after each call.
    """
    rng = random.Random(seed)
    compute_s: dict[tuple[int, bool], list[float]] = defaultdict(list)
    async with AsyncClient(address) as client:
        model = await client.get_model()
        image, last = _make_image(model), model.frontier[0]
        await client.predict(image, variant=last)
        for _ in range(calls):
            variant = last if rng.random() < 0.5 else rng.choice(list(model.frontier))
            answer = await client.predict(image, variant=variant)
            compute_s[variant, variant != last].append(answer.compute_s)
            last = variant
            advance()
    return _compare(calls, compute_s)


def _make_image(model: pb.GetModelResponse) -> np.ndarray:
    inputs = model.preprocessing
    return np.zeros((1, inputs.channels, inputs.height, inputs.width), np.uint8)


def _compare(calls: int, compute_s: Mapping[tuple[int, bool], Sequence[float]]) -> SwitchingResult:
    """Return the result of compute times by (variant, whether the call switched)."""
    medians = {v: median(times) for (v, switched), times in compute_s.items() if not switched}
    excess_us: dict[bool, list[float]] = {False: [], True: []}
    for (variant, switched), times in compute_s.items():
        if variant in medians:
            excess_us[switched] += [1e6 * (t - medians[variant]) for t in times]
    kept = np.quantile(excess_us[False], [0.5, 0.99]).tolist()
    switched_ = np.quantile(excess_us[True], [0.5, 0.99]).tolist()
    figures = (*kept, *switched_, switched_[0] - kept[0], switched_[1] - kept[1])
    return SwitchingResult(calls, len(medians), *(round(figure, 1) for figure in figures))
