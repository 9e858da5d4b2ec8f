"""The live audit: in idle time, some answered images run again on the best variant.

How often a variant predicts the class of the best one is its agreement. Calibration states it, and
the audit watches whether it still holds for the images that callers send.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ladderstitch.scheduling.requests import ImageAnswer, Pixels, Request

MAX_KEPT = 64
"""Images that wait for idle time; the oldest ones give way."""
MAX_CAPACITY_SHARE = 0.02
"""Largest share of the time that audits take."""
MAX_CREDIT_S = 1.0
"""Seconds of audits that an idle server may save up."""
IDLE_BEFORE_AUDIT_S = 0.005
"""Seconds without any request after which an audit may start."""
WINDOW = 1000
"""Recent audited images of a variant whose agreement is reported."""
SIGMAS = NormalDist().inv_cdf(0.975)
"""Standard deviations from the centre to the ends of a 95 % interval."""
DRIFT = 0.05
"""Fall of the agreement that is looked for."""
DRIFT_THRESHOLD = 5.0
"""Evidence, a log-likelihood ratio, above which the agreement counts as fallen.

At an agreement of 0.90, a false alarm then comes after more than 10,000 images on average, and a
fall to 0.85 is found after about 400.
"""
MIN_RATE, MAX_RATE = 0.02, 0.999


@dataclass(frozen=True, slots=True)
class AuditCase:
    """One image [1, C, H, W] of an answer, the variant that answered, and its class."""

    image: Pixels
    variant: int
    predicted: int


@dataclass(slots=True)
class AgreementMonitor:
    """The agreement of one variant with the best one, and the evidence that it has fallen.

    The evidence is Page's cumulative sum of log-likelihood ratios of `expected - DRIFT` to
    `expected`, which never falls below 0 (Page 1954). Without `expected` there is none.
    """

    expected: float | None
    evidence: float = 0.0
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, agrees: bool) -> None:
        """Count one audited image."""
        self.recent.append(agrees)
        if self.expected is None:
            return
        before = min(max(self.expected, MIN_RATE + DRIFT), MAX_RATE)
        after = before - DRIFT
        ratio = after / before if agrees else (1 - after) / (1 - before)
        # The limit lets the alarm end soon after the cause has ended.
        limit = 2 * DRIFT_THRESHOLD
        self.evidence = min(max(0.0, self.evidence + math.log(ratio)), limit)

    @property
    def drifted(self) -> bool:
        """Whether the agreement has fallen below the expected one."""
        return self.evidence > DRIFT_THRESHOLD

    @property
    def agreement(self) -> tuple[float, float, float]:
        """The agreement of recent images, and both ends of its interval (Wilson 1927).

        SciPy has the interval, but takes half a second to import, which a server would wait for.
        """
        count = len(self.recent)
        share = sum(self.recent) / count
        weight = SIGMAS * SIGMAS / count
        centre = (share + weight / 2) / (1 + weight)
        spread = math.sqrt(share * (1 - share) * weight + weight * weight / 4) / (1 + weight)
        return share, centre - spread, centre + spread


class Auditor:
    """The images that wait for an audit, the time that audits may take, and what they have found.

    `expected` is the calibrated agreement of variants with the best one, by their ids. A share of
    the answers is sampled, and one image of each is kept. Answers of the best variant, and those of
    cascades, which were chosen by their confidence, are not.
    """

    def __init__(self, expected: Mapping[int, float], now: float, seed: int = 0) -> None:
        self.share = 0.0
        self.seconds = 0.0
        """Seconds that audits have taken."""
        self.monitors: dict[int, AgreementMonitor] = {}
        self._expected, self._random = expected, Random(seed)
        self._kept: deque[AuditCase] = deque(maxlen=MAX_KEPT)
        self._credit_s, self._credited_at = 0.0, now

    def sample(self, request: Request, answer: ImageAnswer, best: int) -> bool:
        """Keep an image of an answered request with the probability `share`; return whether."""
        if not self.share or answer.variant == best or answer.certainty is not None:
            return False
        kept = self._random.random() < self.share
        if kept:
            row = self._random.randrange(request.num_images)
            predicted = int(answer.logits[row].argmax())
            image = request.images[row : row + 1].copy()  # not the memory of the whole message
            self._kept.append(AuditCase(image, answer.variant, predicted))
        return kept

    def delay_s(self, expected_s: float, now: float, idle_since: float) -> float | None:
        """Return the seconds until an audit of `expected_s` may start; None if nothing waits."""
        if not self.share:
            self._kept.clear()
        if not self._kept:
            return None
        earned = MAX_CAPACITY_SHARE * (now - self._credited_at)
        self._credit_s = min(MAX_CREDIT_S, self._credit_s + earned)
        self._credited_at = now
        missing_s = max(0.0, expected_s - self._credit_s) / MAX_CAPACITY_SHARE
        return max(0.0, missing_s, idle_since + IDLE_BEFORE_AUDIT_S - now)

    def take(self) -> AuditCase:
        """Return the next image to audit, the latest one."""
        return self._kept.pop()

    def add(self, case: AuditCase, logits: NDArray[np.float32], seconds: float) -> AgreementMonitor:
        """Compare an answer with the best variant's logits [1, K]; return the variant's monitor."""
        self.seconds += seconds
        self._credit_s -= seconds
        if case.variant not in self.monitors:
            self.monitors[case.variant] = AgreementMonitor(self._expected.get(case.variant))
        monitor = self.monitors[case.variant]
        monitor.add(int(logits[0].argmax()) == case.predicted)
        return monitor
