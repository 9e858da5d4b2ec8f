"""What it costs to change the variant between two consecutive requests."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from ladderstitch.client import AsyncClient


@dataclass(frozen=True, slots=True)
class Switching:
    """Excess compute time over the variant's own median, microseconds, by whether the variant was
    another one than the last."""

    calls: int
    variants: int
    same_p50_us: float
    same_p99_us: float
    switched_p50_us: float
    switched_p99_us: float
    p50_cost_us: float
    p99_cost_us: float

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


async def measure(address: str, calls: int, seed: int, advance: Callable[[], None]) -> Switching:
    """One caller; each call keeps the last variant or takes another frontier variant, by a coin.

    Kept and switched calls of a variant alternate at random, so the machine's noise meets both.
    """
    rng = random.Random(seed)
    seconds: dict[tuple[int, bool], list[float]] = defaultdict(list)
    async with AsyncClient(address) as client:
        model = await client.get_model()
        inputs = model.preprocessing
        image = np.zeros((1, inputs.channels, inputs.height, inputs.width), np.uint8)
        last = model.frontier[0]
        await client.predict(image, variant=last)
        for _ in range(calls):
            variant = last if rng.random() < 0.5 else rng.choice(list(model.frontier))
            answer = await client.predict(image, variant=variant)
            seconds[variant, variant != last].append(answer.compute_s)
            last = variant
            advance()
    own = {s: median(times) for (s, switched), times in seconds.items() if not switched}
    excess = {
        kind: [
            1e6 * (t - own[s])
            for (s, switched), times in seconds.items()
            for t in times
            if switched == kind and s in own
        ]
        for kind in (False, True)
    }
    same = np.quantile(excess[False], [0.5, 0.99]).tolist()
    switched = np.quantile(excess[True], [0.5, 0.99]).tolist()
    figures = (*same, *switched, switched[0] - same[0], switched[1] - same[1])
    return Switching(calls, len(own), *(round(figure, 1) for figure in figures))
