"""Families to simulate: how good each variant is and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ladderstitch.scheduling.profiles import Latency, LatencyProfile, frontier
from ladderstitch.vision.bundle import Bundle

SUPERNET_QUALITY = (0.7382, 0.7669, 0.7764, 0.7825, 0.7944, 0.8016)
SUPERNET_FIXED_MS = (1.05, 1.35, 1.45, 1.70, 2.25, 2.95)
SUPERNET_ROW_MS = (0.36, 0.48, 0.59, 0.75, 1.08, 1.73)
SUPERNET_ROWS = 16


@dataclass(frozen=True, slots=True)
class Family:
    """What policies know of a model."""

    name: str
    quality: Mapping[int, float]
    profile: LatencyProfile

    @property
    def frontier(self) -> tuple[int, ...]:
        alone = {variant: self.profile.alone_s(variant) for variant in self.profile.variants}
        return tuple(point.variant for point in frontier(self.quality, alone))

    @property
    def capacity_rps(self) -> float:
        """Rows a second of one engine: full batches on the variant that is fastest at them."""
        rows = self.profile.max_batch
        return max(rows / self.profile.variants[s].median_s[-1] for s in self.frontier)


def supernet() -> Family:
    """Six subnets like SuperServe's (NSDI'25): A + C * batch ms, without any spread."""
    sizes = tuple(range(1, SUPERNET_ROWS + 1))
    variants = {}
    for variant, (fixed, row) in enumerate(zip(SUPERNET_FIXED_MS, SUPERNET_ROW_MS, strict=True)):
        seconds = tuple((fixed + row * n) / 1e3 for n in sizes)
        variants[variant] = Latency(median_s=seconds, p99_s=seconds)
    profile = LatencyProfile(
        device="made up",
        threads=1,
        date="2025-04-28",
        versions={},
        batch_sizes=sizes,
        variants=variants,
    )
    return Family("supernet", dict(enumerate(SUPERNET_QUALITY)), profile)


def of_bundle(bundle: Bundle) -> Family:
    """A bundle's own measurements; raises `ValueError` if it has none."""
    if bundle.quality is None or bundle.latency is None:
        raise ValueError(f"{bundle.path}: expected quality.json and latency.json beside the model")
    quality = {variant: q.value for variant, q in bundle.quality.variants.items()}
    return Family(bundle.manifest.name, quality, bundle.latency)
