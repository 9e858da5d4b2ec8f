"""The comparison with peers: medians, ratios, checks and table; Triton itself is not needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from rich.console import Console

from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch_loadtest.benchmarks import peers
from ladderstitch_loadtest.benchmarks.echo import METHOD
from ladderstitch_loadtest.benchmarks.peer_servers import (
    INFER,
    Peer,
    find_difference,
    infer,
    make_request,
)
from ladderstitch_loadtest.benchmarks.peers import (
    QUANTITIES,
    STATISTICS,
    PeerComparison,
    Run,
    measure,
    measure_run,
    summarise,
)
from ladderstitch_loadtest.benchmarks.peers_cli import format_table
from ladderstitch_loadtest.load.closed_loop import LoopTarget
from ladderstitch_loadtest.servers.peer_packages import PeerError
from ladderstitch_loadtest.servers.processes import echo_server


class FakeTriton:
    """A server whose answers lack logits; each adds 3 ms, 2 ms of them compute, to statistics.

    `counted` says whether an answer counts as a success, a failure or not at all.
    """

    def __init__(self, counted: str) -> None:
        self.counted, self.answers = counted, 0

    def infer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Return an answer without logits."""
        self.answers += 1
        response = oip.ModelInferResponse(raw_output_contents=[b""])
        response.outputs.add(name="logits", datatype="FP32", shape=[1, 10])
        return response.SerializeToString()

    def statistics(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Return the statistics of the model `net`."""
        response = oip.ModelStatisticsResponse()
        model = response.model_stats.add(name="net", execution_count=self.answers // 2)
        stats = model.inference_stats
        if self.counted == "success":
            stats.success.count, stats.success.ns = self.answers, 3_000_000 * self.answers
            stats.compute_infer.ns = 2_000_000 * self.answers
        elif self.counted == "fail":
            stats.fail.count = self.answers
        return response.SerializeToString()


@contextmanager
def fake_triton(counted: str) -> Iterator[Peer]:
    """Run a `FakeTriton` during the `with` block."""
    fake, server = FakeTriton(counted), grpc.server(ThreadPoolExecutor(2))
    methods = {INFER: fake.infer, STATISTICS: fake.statistics}
    handlers = {
        name.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(method)
        for name, method in methods.items()
    }
    service = INFER.split("/")[1]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield Peer("triton", LoopTarget(f"127.0.0.1:{port}", INFER, b""), "net")
    finally:
        server.stop(None).wait()


def make_run(value: float, *, echo: bool = False) -> Run:
    """Return a run in which every quantity that is reported has this value."""
    run = dict.fromkeys(QUANTITIES, value)
    return run | dict.fromkeys(QUANTITIES[3:], math.nan) if echo else run


def make_comparison() -> PeerComparison:
    """Return a comparison of three rounds at 1 and 8 callers."""
    rounds = {
        "echo": [make_run(value, echo=True) for value in (1.0, 2.0, 4.0)],
        "triton": [make_run(value) for value in (2.0, 10.0, 4.0)],
        "ladderstitch": [make_run(value) for value in (3.0, 5.0, 8.0)],
    }
    runs = {(callers, name): found for callers in (1, 8) for name, found in rounds.items()}
    return PeerComparison(summarise(7, runs), "grpc", ("triton==1",), 1e-6, 3, 2.0, 0.5)


def test_summarise_takes_medians_of_values_and_of_ratios() -> None:
    figures = make_comparison().figures
    assert [(one.callers, one.quantity) for one in figures] == [
        (callers, quantity) for callers in (1, 8) for quantity in QUANTITIES
    ]
    first = figures[0]
    assert first.values == {"echo": 2.0, "triton": 4.0, "ladderstitch": 5.0}
    assert first.over_triton == 1.5  # of 1.5, 0.5 and 2
    assert first.over_echo == 2.5  # of 3, 2.5 and 2


def test_summarise_of_what_the_echo_lacks_is_nan() -> None:
    (compute, _) = (f for f in make_comparison().figures if f.quantity == "compute_ms")
    assert math.isnan(compute.values["echo"])
    assert math.isnan(compute.over_echo)
    assert compute.over_triton == 1.5


def test_format_table_has_latency_for_one_caller_only() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(format_table(make_comparison()))
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in captured.get().splitlines()
        if line.startswith("│")
    ]
    assert rows == [
        ["7, 1: mean latency, ms", "2.00", "4.00", "5.00", "1.50", "2.50"],
        ["7, 1: p50 latency, ms", "2.00", "4.00", "5.00", "1.50", "2.50"],
        ["7, 1: compute, ms", "-", "4.00", "5.00", "1.50", "-"],
        ["7, 1: total - compute, ms", "-", "4.00", "5.00", "1.50", "-"],
        ["7, 8: answers/s", "2", "4", "5", "1.50", "2.50"],
        ["7, 8: compute, ms", "-", "4.00", "5.00", "1.50", "-"],
        ["7, 8: total - compute, ms", "-", "4.00", "5.00", "1.50", "-"],
    ]


def test_make_request_holds_one_image_and_the_variant() -> None:
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    request = oip.ModelInferRequest.FromString(make_request("net", image, 0))
    assert request.model_name == "net"
    assert list(request.inputs[0].shape) == [1, 1, 2, 3]
    assert request.raw_input_contents[0] == bytes(range(6))
    assert request.parameters["variant_id"].int64_param == 0
    unpinned = oip.ModelInferRequest.FromString(make_request("net", image))
    assert not unpinned.parameters


def test_find_difference_above_the_tolerance_fails() -> None:
    first, second = np.zeros((1, 2), np.float32), np.array([[0.0, 0.0005]], np.float32)
    assert find_difference([first, first], [first, second]) == pytest.approx(0.0005)
    for wrong in (4 * second, np.array([[0.0, np.nan]], np.float32)):
        with pytest.raises(PeerError, match=r"expected a difference of 0\.001 at most, got"):
            find_difference([first], [wrong])


def test_infer_with_an_answer_without_logits_fails() -> None:
    with fake_triton("success") as peer, pytest.raises(PeerError, match=r"\[1, 10\], got 0"):
        infer(peer.target.address, b"")


def test_measure_run_reports_the_statistics_of_the_server() -> None:
    with fake_triton("success") as peer:
        run = measure_run(peer, 2, 0.1, "grpc")
    assert run["compute_ms"] == pytest.approx(2)
    assert run["beyond_compute_ms"] == pytest.approx(1)
    assert run["answers_per_s"] > 0


@pytest.mark.parametrize("counted", ["fail", "nothing"])
def test_measure_run_with_uncounted_answers_fails(counted: str) -> None:
    with fake_triton(counted) as peer, pytest.raises(PeerError, match=r"triton: expected \d+ or"):
        measure_run(peer, 1, 0.1, "grpc")


def test_measure_lets_the_peers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[str, int]] = []

    def record(peer: Peer, callers: int, seconds: float, generator: str) -> Run:
        runs.append((peer.name, callers))
        return make_run(1.0)

    monkeypatch.setattr(peers, "measure_run", record)
    names = ("echo", "triton", "ladderstitch")
    found = measure(
        [Peer(name, LoopTarget("", METHOD, b"")) for name in names], 3, 1.0, "grpc", lambda _: None
    )
    assert all(len(one) == 3 for one in found.values())
    measured = [name for name, callers in runs[3:] if callers == 32]
    turns = [names[turn:] + names[:turn] for turn in range(3)]
    assert measured == [name for turn in turns for name in turn]


def test_measure_run_of_the_echo_has_no_compute() -> None:
    with echo_server() as address:
        peer = Peer("echo", LoopTarget(address, METHOD, b"message"))
        run = measure_run(peer, 2, 0.1, "grpc")
    assert math.isnan(run["compute_ms"])
    assert run["p50_ms"] > 0
