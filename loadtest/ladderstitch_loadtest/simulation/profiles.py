"""Families of variants to simulate: the quality and the latency of each variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ladderstitch.scheduling.cascades import NO_CASCADES, CascadeSet
from ladderstitch.scheduling.profiles import Latency, LatencyProfile, frontier
from ladderstitch.vision.bundle import VisionBundle

SUPERNET_QUALITY = (0.7382, 0.7669, 0.7764, 0.7825, 0.7944, 0.8016)
SUPERNET_FIXED_MS = (1.05, 1.35, 1.45, 1.70, 2.25, 2.95)
SUPERNET_IMAGE_MS = (0.36, 0.48, 0.59, 0.75, 1.08, 1.73)
SUPERNET_MAX_BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Family:
    """The knowledge that policies have of a model: quality and latency by variant id."""

    name: str
    quality: Mapping[int, float]
    profile: LatencyProfile
    cascades: CascadeSet = NO_CASCADES

    @classmethod
    def from_bundle(cls, bundle: VisionBundle) -> Family:
        """Return the family that a bundle measured. Raises `ValueError` if it measured none."""
        if bundle.quality is None or bundle.latency is None:
            raise ValueError(f"{bundle.path}: expected quality.json and latency.json")
        quality = {variant: q.value for variant, q in bundle.quality.variants.items()}
        return cls(bundle.manifest.name, quality, bundle.latency, bundle.quality.cascade_set)

    @property
    def frontier(self) -> tuple[int, ...]:
        """Variant ids on the frontier, fastest first."""
        alone = {variant: self.profile.alone_s(variant) for variant in self.profile.variants}
        return tuple(point.variant for point in frontier(self.quality, alone))

    @property
    def capacity_rps(self) -> float:
        """Images per second of one engine: full batches on the variant that is fastest at them."""
        batch_size = self.profile.max_batch_size
        return max(batch_size / self.profile.variants[v].median_s[-1] for v in self.frontier)


def supernet() -> Family:
    """Return six subnets like SuperServe's (NSDI'25): A + C * batch size ms, without variation."""
    sizes = tuple(range(1, SUPERNET_MAX_BATCH_SIZE + 1))
    variants = {}
    for variant, (fixed, image) in enumerate(
        zip(SUPERNET_FIXED_MS, SUPERNET_IMAGE_MS, strict=True)
    ):
        seconds = tuple((fixed + image * n) / 1e3 for n in sizes)
        variants[variant] = Latency(median_s=seconds, p99_s=seconds)
    profile = LatencyProfile(
        device="synthetic",
        threads=1,
        date="2025-04-28",
        versions={},
        batch_sizes=sizes,
        variants=variants,
    )
    return Family("supernet", dict(enumerate(SUPERNET_QUALITY)), profile)
