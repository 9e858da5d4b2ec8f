"""One language model behind ladderstitch and behind other servers, over the same HTTP API."""

from __future__ import annotations

import http.client
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from statistics import median

from ladderstitch.errors import UserError
from ladderstitch_loadtest.benchmarks.completions import measure_server
from ladderstitch_loadtest.benchmarks.language_contenders import LADDERSTITCH, Contender, Peer
from ladderstitch_loadtest.benchmarks.language_model_files import ModelFiles, model_files

FAILURES = (UserError, OSError, http.client.HTTPException, ValueError, ZeroDivisionError)
"""What ends the measurement of a peer, but not that of the others."""


@dataclass(frozen=True, slots=True)
class LanguageFigure:
    """One quantity of one precision on a number of threads: medians over the rounds by server.

    `ratios` has for each other server the median of ladderstitch's value over its own in each
    round.
    """

    threads: int
    precision: str
    quantity: str
    values: dict[str, float]
    ratios: dict[str, float]


@dataclass(frozen=True, slots=True)
class LanguageComparison:
    """All figures, with what they depend on.

    `unavailable` has the reason of each server, with its precision, that was not measured.
    """

    figures: list[LanguageFigure]
    unavailable: dict[str, str]
    model: str
    path: str
    packages: dict[str, tuple[str, ...]]
    rounds: int
    tokens: int
    load_before: float

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


Runs = dict[tuple[str, str], dict[str, list[float]]]
"""The values of each round, by precision and quantity, and by server."""


@dataclass(slots=True)
class Measurement:
    """The rounds of all servers, on one number of threads after another."""

    model: str
    rounds: int
    tokens: int
    advance: Callable[[str], None]
    unavailable: dict[str, str] = field(default_factory=dict)

    def run(self, contenders: Sequence[Contender], files: ModelFiles, threads: int) -> Runs:
        """Return the values of all rounds; the first round, which warms up, is dropped."""
        with self._started(contenders, files, threads) as addresses:
            return self._measure(addresses)

    @contextmanager
    def _started(
        self, contenders: Sequence[Contender], files: ModelFiles, threads: int
    ) -> Iterator[dict[Contender, str]]:
        """Run all servers that start; yield the address of each."""
        addresses: dict[Contender, str] = {}
        with ExitStack() as stack:
            for one in contenders:
                if label(one) in self.unavailable:
                    continue
                self.advance(f"{threads} threads: starting {label(one)}")
                try:
                    addresses[one] = stack.enter_context(one.server(files, threads))
                except FAILURES as error:
                    self._give_up(one, error)
            yield addresses

    def _measure(self, addresses: Mapping[Contender, str]) -> Runs:
        found: Runs = {}
        order = list(addresses)
        for number in range(self.rounds + 1):
            turn = number % len(order)
            for one in (*order[turn:], *order[:turn]):
                if label(one) in self.unavailable:
                    continue
                self.advance(f"round {number} of {self.rounds}: {label(one)}")
                for quantity, value in self._round(one, addresses[one], number).items():
                    by_name = found.setdefault((one.precision, quantity), {})
                    by_name.setdefault(one.name, []).append(value)
        complete = self.rounds + 1
        return {
            key: {name: v[1:] for name, v in by_name.items() if len(v) == complete}
            for key, by_name in found.items()
        }

    def _round(self, one: Contender, address: str, number: int) -> dict[str, float]:
        """Return the quantities of one server, or nothing if it fails."""
        try:
            return measure_server(
                address, self.model, number, tokens=self.tokens, batched=one.batched
            )
        except FAILURES as error:
            self._give_up(one, error)
            return {}

    def _give_up(self, one: Contender, error: Exception) -> None:
        """Note why a peer is not measured any more; raise the error if it is ladderstitch's."""
        if one.name == LADDERSTITCH:
            raise error
        self.unavailable[label(one)] = format_reason(error)


def compare(
    model: str,
    contenders: Sequence[Contender],
    threads: Sequence[int],
    rounds: int,
    tokens: int,
    advance: Callable[[str], None],
) -> LanguageComparison:
    """Measure all servers on the weights of a fetched model, interleaved.

    Answers have at most `tokens` tokens. A peer that cannot be installed or started, or that fails,
    is noted as unavailable. Raises `UserError` if ladderstitch's server cannot be started or an
    answer of it fails.
    """
    load = os.getloadavg()[0]
    measurement = Measurement(model, rounds, tokens, advance)
    figures: list[LanguageFigure] = []
    with model_files(model) as files:
        for count, group in product(threads, _by_precision(contenders)):
            figures += summarise(count, measurement.run(group, files, count))
    return LanguageComparison(
        figures=figures,
        unavailable=measurement.unavailable,
        model=model,
        path=contenders[0].precision,
        packages={
            one.name: one.requirements.packages for one in contenders if isinstance(one, Peer)
        },
        rounds=rounds,
        tokens=tokens,
        load_before=round(load, 2),
    )


def _by_precision(contenders: Sequence[Contender]) -> list[list[Contender]]:
    """Return groups of servers that run at the same time; some keep a core busy when idle."""
    names = dict.fromkeys(one.precision for one in contenders)
    return [[one for one in contenders if one.precision == name] for name in names]


def label(one: Contender) -> str:
    """Return the name and the precision of a server."""
    return f"{one.name}, {one.precision}"


def format_reason(error: Exception) -> str:
    """Return "not available" with the last line of an error, which ends a log."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"not available: {lines[-1] if lines else type(error).__name__}"


def summarise(threads: int, runs: Runs) -> list[LanguageFigure]:
    """Return the medians of all values, and of ladderstitch's ratio to each other server."""
    figures = []
    for (precision, quantity), by_name in runs.items():
        values = {name: round(median(values), 1) for name, values in by_name.items()}
        ratios = {
            name: round(median(a / b for a, b in zip(by_name[LADDERSTITCH], v, strict=True)), 3)
            for name, v in by_name.items()
            if name != LADDERSTITCH
        }
        figures.append(LanguageFigure(threads, precision, quantity, values, ratios))
    return figures
