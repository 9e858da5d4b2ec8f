"""What variants have in common: the steps of their routes, and the seconds of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ladderstitch.vision.bundle import VisionBundle
from ladderstitch_loadtest.simulation.profiles import Family

Step = tuple[int, int, str]
"""Anchor, index of the block in it, form: variants with one step can share it.

The form is a number format; that of a group of blocks has their number, too.
"""
Part = tuple[int, int]
"""Variant and number of images that run on it."""

LADDER_STEPS = 10
"""Steps of the synthetic ladder."""
TYPICAL_BATCH_SIZE = 8
"""Batch size at which the steps of the synthetic ladder are derived from its seconds."""


@dataclass(frozen=True, slots=True)
class BlockRoutes:
    """The steps of each variant, and the share of its seconds that each step takes."""

    steps: Mapping[int, tuple[Step, ...]]
    shares: Mapping[int, tuple[float, ...]]

    @classmethod
    def from_steps(cls, steps: Mapping[int, tuple[Step, ...]], family: Family) -> BlockRoutes:
        """Return routes in which a step takes its anchor's measured seconds over its steps.

        The steps of a variant are scaled to the measured seconds of the variant. Anchors that no
        variant has alone count as fast as the variant.
        """
        alone: dict[tuple[int, str], float] = {}
        for variant, route in steps.items():
            if len({(anchor, form) for anchor, _, form in route}) == 1:
                alone[route[0][0], route[0][2]] = family.profile.alone_s(variant) / len(route)
        shares = {}
        for variant, route in steps.items():
            mean_s = family.profile.alone_s(variant) / len(route)
            weights = [alone.get((anchor, form), mean_s) for anchor, _, form in route]
            shares[variant] = tuple(weight / sum(weights) for weight in weights)
        return cls(steps, shares)

    @classmethod
    def from_bundle(cls, bundle: VisionBundle, family: Family) -> BlockRoutes:
        """Return the routes of a bundle's variants."""
        steps = {
            stitch.id: tuple(
                (segment.anchor, first, _form(stitch.precision, size))
                for segment in stitch.segments
                for first, size in segment.parts
            )
            for stitch in bundle.manifest.variants()
            if stitch.id in family.profile.variants
        }
        return cls.from_steps(steps, family)

    @classmethod
    def ladder(cls, family: Family) -> BlockRoutes:
        """Return routes like SN-Net's for a family without: its fastest and slowest are anchors.

        Every other variant begins with the fast anchor and ends with the slow one, with as many
        steps of each as its seconds suggest.
        """
        index = family.profile.batch_sizes.index(TYPICAL_BATCH_SIZE)
        seconds = {v: latency.median_s[index] for v, latency in family.profile.variants.items()}
        low, high = min(seconds.values()), max(seconds.values())
        steps = {}
        for variant, own in seconds.items():
            slow = round(LADDER_STEPS * (own - low) / (high - low))
            steps[variant] = tuple(
                (int(i >= LADDER_STEPS - slow), i, "float32") for i in range(LADDER_STEPS)
            )
        return cls.from_steps(steps, family)

    def agree(self, one: int, other: int, depth: int) -> bool:
        """Return whether two variants have the same first `depth` steps."""
        return self.steps[one][:depth] == self.steps[other][:depth]

    def step_s(
        self, parts: Sequence[Part], depth: int, profiled: Mapping[int, Sequence[float]]
    ) -> float:
        """Return the seconds of one step of all parts; those at the same step run together."""
        total = 0.0
        groups: dict[Step, list[Part]] = {}
        for variant, images in parts:
            if depth < len(self.steps[variant]):
                groups.setdefault(self.steps[variant][depth], []).append((variant, images))
        for group in groups.values():
            size = sum(images for _, images in group)
            total += sum(
                images / size * self.shares[variant][depth] * profiled[variant][size]
                for variant, images in group
            )
        return total

    def rest_s(
        self, parts: Sequence[Part], depth: int, profiled: Mapping[int, Sequence[float]]
    ) -> float:
        """Return the seconds of all steps from `depth` on, in step with each other."""
        last = max(len(self.steps[variant]) for variant, _ in parts)
        return sum(self.step_s(parts, d, profiled) for d in range(depth, last))


def _form(precision: str, size: int) -> str:
    return precision if size == 1 else f"{precision}, {size} blocks"
