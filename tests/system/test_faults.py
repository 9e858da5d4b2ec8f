"""Real processes that are killed under load: every accepted request is answered.

`ladderstitch-loadtest kills` does the same for longer, and on Ray.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ladderstitch.client import Client, Credentials, infer_request
from ladderstitch_loadtest.faults.cli import serve_pids
from ladderstitch_loadtest.faults.fault_injection import FaultResult, kill_under_load
from ladderstitch_loadtest.servers.process_supervisor import (
    SupervisedProcess,
    replicas_and_gateways,
    wait_until_serving,
)
from tests.conftest import make_tiny_bundle
from tests.support.servers import pixels
from tests.system.test_serve import ladderstitch, served_on_ray

ReplicasAndGateways = tuple[list[SupervisedProcess], list[SupervisedProcess]]
RETRY_TIMEOUT_S = 300
"""Deadline of requests and retry timeout of gateways: replicas restart in time on any machine."""
TOKENS = "tokens:\n  - {name: user, token: user-secret-0123456789}\n"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicasAndGateways]:
    bundle = make_tiny_bundle(tmp_path_factory.mktemp("kills") / "tiny").path
    retry = ("--retry-timeout-s", str(RETRY_TIMEOUT_S))
    with replicas_and_gateways(2, 2, "--bundle", str(bundle), gateway_flags=retry) as processes:
        yield processes


async def kill_while_loaded(running: ReplicasAndGateways, kill: Callable[[], None]) -> FaultResult:
    """Kill processes under load; return what the callers observed."""
    replicas, gateways = running
    wait_until_serving(gateways, len(replicas))
    return await kill_under_load(
        gateways[0].address, "", kill, rate=50, seconds=2.5, deadline_s=RETRY_TIMEOUT_S
    )


async def test_kill_one_replica_loses_no_request(running: ReplicasAndGateways) -> None:
    found = await kill_while_loaded(running, running[0][0].kill)
    assert found.answered == found.requests > 80
    assert running[0][0].starts == 2


async def test_kill_gateway_loses_no_request(running: ReplicasAndGateways) -> None:
    found = await kill_while_loaded(running, running[1][1].kill)
    assert found.answered == found.requests > 80


async def test_kill_all_replicas_loses_no_request(running: ReplicasAndGateways) -> None:
    def both() -> None:
        for replica in running[0]:
            replica.kill()

    found = await kill_while_loaded(running, both)
    assert found.answered == found.requests > 80


def test_command_line_works_through_a_gateway(running: ReplicasAndGateways) -> None:
    """The commands reach a replica, and an admin change reaches all."""
    address = running[1][0].address
    wait_until_serving(running[1], 2)
    listed = ladderstitch("models", "--address", address)
    assert "\ntiny\t0\tanchor-0\t" in listed.stdout
    assert ladderstitch("health", "--address", address).stdout.strip() == "SERVING"
    changed = ladderstitch("schedule", "--pin", 3, "--address", address)
    assert "\npinned_variant\t3\n" in changed.stdout
    with Client(address) as client:
        assert {client.predict(pixels(seed=n)).variant for n in range(8)} == {3}


def test_ray_replaces_killed_replicas_and_gateways(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny").path
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(TOKENS)
    flags = ("--replicas", "2", "--token-file", str(tokens))
    access = Credentials(token="user-secret-0123456789")
    with (
        served_on_ray(bundle, tmp_path, *flags) as (server, _),
        Client(server.address, credentials=access) as client,
    ):
        request, metadata = infer_request(pixels()), access.metadata
        answered = [client.inference.Infer(request, metadata=metadata) for _ in range(20)]
        assert len({answer.accounting.replica for answer in answered}) == 2
        for deployment in ("replica", "gateway"):
            os.kill(serve_pids(server.process.pid, deployment)[0], signal.SIGKILL)
            for n in range(20):
                assert client.predict(pixels(seed=n)).label
