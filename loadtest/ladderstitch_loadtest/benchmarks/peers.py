"""One network behind NVIDIA Triton, behind ladderstitch, and a bare echo, under equal load."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch_loadtest.benchmarks.peer_servers import Peer, call, start_peers
from ladderstitch_loadtest.load.closed_loop import Generator, LoopError, run_loop
from ladderstitch_loadtest.servers.peer_packages import TRITON, PeerError, installed_packages

CALLERS = (1, 8, 32)
WARM_UP_S = 0.7
"""Length of the run before the first measured one, which has 8 callers."""
STATISTICS = "/inference.GRPCInferenceService/ModelStatistics"
QUANTITIES = ("mean_ms", "p50_ms", "answers_per_s", "compute_ms", "beyond_compute_ms")
"""What a run measures; the server reports the last two, as means per request.

Triton counts the way to the process of its Python backend and back as compute."""


@dataclass(frozen=True, slots=True)
class Times:
    """The statistics of a model since its start: answers, failures, and seconds of both kinds."""

    answers: int
    failures: int
    total_s: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity of one variant at a number of callers: medians over the rounds by peer.

    `over_triton` and `over_echo` are medians of ladderstitch's ratio in each round. A quantity that
    a peer does not report is NaN.
    """

    variant: int
    callers: int
    quantity: str
    values: dict[str, float]
    over_triton: float
    over_echo: float


@dataclass(frozen=True, slots=True)
class PeerComparison:
    """All figures, with what they depend on; `load_before` is the load average before the start."""

    figures: list[Figure]
    generator: Generator
    packages: tuple[str, ...]
    largest_difference: float
    rounds: int
    seconds: float
    load_before: float

    def to_dict(self) -> dict[str, object]:
        """Return the fields for a result file."""
        return asdict(self)


Run = dict[str, float]
"""The quantities of one run."""
Runs = dict[tuple[int, str], list[Run]]
"""The runs of each round, by number of callers and name of the peer."""


def compare(
    variants: Sequence[int],
    rounds: int,
    seconds: float,
    generator: Generator,
    advance: Callable[[str], None],
) -> PeerComparison:
    """Start all peers, check that they agree, and measure each at 1, 8 and 32 callers.

    The variants follow one another. All runs of a round follow each other, and the order of the
    peers changes from round to round. `advance` is called with what is being done. Raises
    `PeerError` if a peer cannot be started or fails, or if the logits of a network differ.
    """
    load = os.getloadavg()[0]
    advance("installing")
    packages = installed_packages(TRITON)
    figures, differences = [], []
    for variant in variants:
        advance(f"variant {variant}: starting")
        with start_peers(packages, variant) as (peers, difference):
            runs = measure(peers, rounds, seconds, generator, advance)
        figures += summarise(variant, runs)
        differences.append(difference)
    return PeerComparison(
        figures, generator, TRITON, max(differences), rounds, seconds, round(load, 2)
    )


def measure(
    peers: Sequence[Peer],
    rounds: int,
    seconds: float,
    generator: Generator,
    advance: Callable[[str], None],
) -> Runs:
    """Return all runs; the peers take turns at each number of callers."""
    runs: Runs = {(callers, peer.name): [] for callers in CALLERS for peer in peers}
    for peer in peers:
        measure_run(peer, 8, WARM_UP_S, generator)
    for number in range(rounds):
        turn = number % len(peers)
        for callers in CALLERS:
            for peer in (*peers[turn:], *peers[:turn]):
                advance(f"round {number + 1} of {rounds}: {peer.name}, {callers} callers")
                runs[callers, peer.name].append(measure_run(peer, callers, seconds, generator))
    return runs


def measure_run(peer: Peer, callers: int, seconds: float, generator: Generator) -> Run:
    """Return the quantities of one run.

    Raises `PeerError` if a call failed, by the server's statistics, too. These may count one
    failure per caller: h2load ends a run without waiting for the last answers.
    """
    before = _read_times(peer)
    try:
        found = run_loop(peer.target, callers, seconds, generator)
    except LoopError as error:
        raise PeerError(f"{peer.name}: {error}") from error
    after = _read_times(peer)
    answers, failures = after.answers - before.answers, after.failures - before.failures
    if peer.model and (answers < found.answers or failures > callers):
        raise PeerError(
            f"{peer.name}: expected {found.answers} or more answers and at most {callers} "
            f"failures, got {answers} and {failures}"
        )
    compute_ms = total_ms = float("nan")
    if answers:
        compute_ms = 1e3 * (after.compute_s - before.compute_s) / answers
        total_ms = 1e3 * (after.total_s - before.total_s) / answers
    values = (found.mean_ms, found.p50_ms, found.answers_per_s, compute_ms, total_ms - compute_ms)
    return dict(zip(QUANTITIES, values, strict=True))


def _read_times(peer: Peer) -> Times:
    """Return the statistics of the peer's model, all zero for the echo."""
    if not peer.model:
        return Times(0, 0, 0.0, 0.0)
    request = oip.ModelStatisticsRequest(name=peer.model).SerializeToString()
    reply = call(peer.target.address, STATISTICS, request)
    (model,) = oip.ModelStatisticsResponse.FromString(reply).model_stats
    stats = model.inference_stats
    return Times(
        stats.success.count, stats.fail.count, stats.success.ns / 1e9, stats.compute_infer.ns / 1e9
    )


def summarise(variant: int, runs: Runs) -> list[Figure]:
    """Return the medians over the rounds, and ladderstitch's ratios to the others."""
    figures = []
    for callers in dict.fromkeys(callers for callers, _ in runs):
        rows = {name: found for (count, name), found in runs.items() if count == callers}
        for quantity in QUANTITIES:
            series = {name: [run[quantity] for run in found] for name, found in rows.items()}
            figures.append(
                Figure(
                    variant,
                    callers,
                    quantity,
                    {name: round(median(values), 3) for name, values in series.items()},
                    _ratio(series["ladderstitch"], series["triton"]),
                    _ratio(series["ladderstitch"], series["echo"]),
                )
            )
    return figures


def _ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    pairs = zip(numerators, denominators, strict=True)
    return round(median(numerator / denominator for numerator, denominator in pairs), 2)
