"""Step times that stay as they are given, for tests that must not depend on the machine."""

from __future__ import annotations

from collections.abc import Sequence

from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.text.scheduler.step_times import ExtraTimes, StepTimes


class FixedTimes(StepTimes):
    """Step times that do not learn from the steps."""

    def __init__(self, seconds: Sequence[float], translation_s: float = 0.0) -> None:
        """Set up with the seconds of any step of each variant."""
        profile = LatencyProfile(
            device="none",
            threads=1,
            date="",
            versions={},
            batch_sizes=(1, 48),
            variants={v: Latency(median_s=(s, s), p99_s=(s, s)) for v, s in enumerate(seconds)},
        )
        super().__init__(profile, ExtraTimes(translation_s=translation_s))

    def observe(
        self, variant: int, num_tokens: int, num_sequences: int, num_cached: int, seconds: float
    ) -> float:
        """Learn nothing."""
        return 1.0

    def observe_gap(self, num_sequences: int, seconds: float) -> None:
        """Learn nothing."""
