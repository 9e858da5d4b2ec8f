"""Arrival processes and budget mixes: when requests arrive, and the budget of each."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

Times = NDArray[np.float64]
"""[N] seconds from the start, ascending."""

INTERPOLATION_POINTS = 256
"""Points per interval of changing rate, between which arrival times are interpolated."""


@dataclass(frozen=True, slots=True)
class BudgetClass:
    """Requests that share a budget of `budget_s` seconds.

    `share` is the relative frequency with which the class is drawn.
    """

    name: str
    budget_s: float
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> BudgetClass:
        """Return the class that NAME:MILLISECONDS[:SHARE] describes.

        Raises `ValueError` for any other text, and for numbers that are not positive.
        """
        name, *numbers = text.split(":")
        try:
            milliseconds, share = map(float, (*numbers, "1")[:2])
        except ValueError as error:
            raise ValueError(f"expected NAME:MILLISECONDS[:SHARE], got {text!r}") from error
        if len(numbers) > 2 or milliseconds <= 0 or share <= 0:
            raise ValueError(f"expected positive milliseconds and share, got {text!r}")
        return cls(name, milliseconds / 1e3, share)


@dataclass(frozen=True, slots=True)
class Trace:
    """A plan of N requests: arrival times [N] and the class index of each request [N]."""

    name: str
    arrivals_s: Times
    picks: NDArray[np.int64]
    classes: tuple[BudgetClass, ...]

    def __len__(self) -> int:
        return len(self.arrivals_s)

    @property
    def budgets_s(self) -> Times:
        """The budget of each request in seconds, [N]."""
        return _times(np.array([c.budget_s for c in self.classes])[self.picks])

    @classmethod
    def draw(
        cls, name: str, arrivals_s: Times, classes: Sequence[BudgetClass], rng: np.random.Generator
    ) -> Trace:
        """Return a trace in which every arrival gets a class at random, independently."""
        shares = np.array([c.share for c in classes])
        picks = rng.choice(len(classes), size=len(arrivals_s), p=shares / shares.sum())
        return cls(name, arrivals_s, picks, tuple(classes))


def gamma(rate: float, cv2: float, seconds: float, rng: np.random.Generator) -> Times:
    """Return arrivals with gamma gaps of mean 1/rate and squared coefficient of variation `cv2`.

    A `cv2` of 0 is a clock, 1 is Poisson, 8 is heavy bursts (shape 1/cv2, scale cv2/rate). The
    renewal process starts at a random instant of its life, so that a short trace, too, has the
    mean rate.
    """
    if cv2 == 0:
        return _times(np.arange(rng.random() / rate, seconds, 1 / rate))
    # The gap that covers a random instant is longer than the others: gamma of shape + 1.
    first = rng.random() * rng.gamma(1 / cv2 + 1, cv2 / rate)
    times = [first]
    while times[-1] < seconds:
        gaps = rng.gamma(1 / cv2, cv2 / rate, size=int(rate * seconds / 4) + 16)
        times += (times[-1] + np.cumsum(gaps)).tolist()
    arrivals = np.array(times)
    return _times(arrivals[arrivals < seconds])


def poisson(rate: float, seconds: float, rng: np.random.Generator) -> Times:
    """Return the arrivals of a Poisson process of `rate` requests/s."""
    return gamma(rate, 1.0, seconds, rng)


def varying(rates: Sequence[tuple[float, float]], rng: np.random.Generator) -> Times:
    """Return the arrivals of a Poisson process whose rate is interpolated between points.

    `rates` holds (seconds, requests/s) pairs in ascending order of time. Two points at one time
    make a step. Arrival times count from the first point.
    """
    at, rate = (np.array(column) for column in zip(*rates, strict=True))
    sums = np.concatenate([[0.0], np.cumsum(np.diff(at) * (rate[1:] + rate[:-1]) / 2)])
    units = poisson(1.0, float(sums[-1]), rng)  # unit rate, stretched by the integral of the rate
    starts, ends = at[:-1], at[1:]
    elapsed = np.linspace(0, 1, INTERPOLATION_POINTS)[:, None] * (ends - starts)  # [points, ends]
    slope = np.diff(rate) / np.maximum(ends - starts, 1e-12)
    integral = sums[:-1] + elapsed * (rate[:-1] + elapsed * slope / 2)
    grid = starts + elapsed
    # A request arrives where the integral of the rate has grown by a gap of the unit process.
    return _times(np.interp(units, integral.T.ravel(), grid.T.ravel()) - at[0])


def ramp(low: float, high: float, seconds: float, rng: np.random.Generator) -> Times:
    """Return arrivals whose rate rises from `low` to `high` and falls again, half the time each."""
    return varying([(0.0, low), (seconds / 2, high), (seconds, low)], rng)


def step(
    base: float,
    burst: float,
    start_s: float,
    end_s: float,
    seconds: float,
    rng: np.random.Generator,
) -> Times:
    """Return arrivals of rate `base`, except `burst` between `start_s` and `end_s`."""
    points = [(0.0, base), (start_s, base), (start_s, burst), (end_s, burst), (end_s, base)]
    return varying([*points, (seconds, base)], rng)


def read_arrivals(file: Path) -> Times:
    """Return the arrival times in a CSV file, in seconds from the first arrival.

    The file has Azure's LLM trace format (column TIMESTAMP) or one column of seconds. Raises
    `ValueError` naming the line that cannot be read, or if the file has no arrival.
    """
    with file.open(newline="") as lines:
        rows = list(csv.reader(lines))
    azure = bool(rows) and rows[0][0].strip().upper() == "TIMESTAMP"
    times = []
    for number, row in enumerate(rows[azure:], start=1 + azure):
        try:
            # Azure writes seven digits of a second; `datetime` reads at most six.
            text = row[0].strip()
            times.append(datetime.fromisoformat(text[:26]).timestamp() if azure else float(text))
        except (ValueError, IndexError) as error:
            expected = "a date and time" if azure else "seconds"
            raise ValueError(f"{file}:{number}: expected {expected}, got {row}") from error
    if not times:
        raise ValueError(f"{file}: expected at least one arrival")
    arrivals = np.sort(np.array(times))
    return _times(arrivals - arrivals[0])


def read_lengths(file: Path) -> NDArray[np.int64]:
    """Return prompt and answer lengths of a CSV file in Azure's LLM trace format.

    The result is [N, 2] tokens in order of arrival. Raises `ValueError` if a column is missing or
    holds no numbers.
    """
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        rows.sort(key=lambda row: row["TIMESTAMP"])
        lengths = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected columns TIMESTAMP, ContextTokens, GeneratedTokens: {error}"
        ) from error
    return np.array(lengths, np.int64).reshape(-1, 2)


def replay(times: Times, rate: float, seconds: float, start: float = 0.0) -> Times:
    """Return recorded arrivals rescaled to a mean of `rate` requests/s, cut off after `seconds`.

    `start` is the share of the recording to skip, in [0, 1).
    """
    chosen = times[int(start * len(times)) :]
    chosen = chosen[: max(2, round(rate * seconds))] - chosen[0]
    scaled = chosen * (len(chosen) / rate / max(chosen[-1], 1e-9))
    return _times(scaled[scaled < seconds])


def _times(values: npt.ArrayLike) -> Times:
    return np.asarray(values, np.float64)
