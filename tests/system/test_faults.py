"""Real processes, killed under load: whatever was accepted is answered.

`ladderstitch-loadtest kills` does the same for longer, and on Ray.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ladderstitch.client import Client, Credentials, infer_request
from ladderstitch_loadtest.faults.cli import pids_of
from ladderstitch_loadtest.faults.fault_injection import Killing, kill_under_load, until_all_serve
from ladderstitch_loadtest.servers.process_supervisor import Process, stage
from tests.conftest import make_tiny_bundle
from tests.support.servers import pixels
from tests.system.test_serve import ladderstitch, served_on_ray

Stage = tuple[list[Process], list[Process]]
PATIENCE_S = 300
"""Deadline of requests and patience of gateways: replicas are back by then on any machine."""
TOKENS = "tokens:\n  - {name: user, token: user-secret-0123456789}\n"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    bundle = make_tiny_bundle(tmp_path_factory.mktemp("kills") / "tiny").path
    patience = ("--retry-timeout-s", str(PATIENCE_S))
    with stage(2, 2, "--bundle", str(bundle), gateway_flags=patience) as processes:
        yield processes


async def killed(running: Stage, kill: Callable[[], None]) -> Killing:
    replicas, gateways = running
    until_all_serve([gateway.metrics for gateway in gateways], len(replicas))
    return await kill_under_load(
        gateways[0].address, "", kill, rate=50, seconds=2.5, deadline_s=PATIENCE_S
    )


async def test_one_of_two_replicas(running: Stage) -> None:
    found = await killed(running, running[0][0].kill)
    assert found.answered == found.requests > 80
    assert running[0][0].starts == 2


async def test_a_gateway(running: Stage) -> None:
    found = await killed(running, running[1][1].kill)
    assert found.answered == found.requests > 80


async def test_all_replicas(running: Stage) -> None:
    def both() -> None:
        for replica in running[0]:
            replica.kill()

    found = await killed(running, both)
    assert found.answered == found.requests > 80


def test_existing_clients_go_through(running: Stage) -> None:
    """The command line, and what it says of all replicas."""
    address = running[1][0].address
    until_all_serve([gateway.metrics for gateway in running[1]], 2)
    listed = ladderstitch("models", "--address", address)
    assert "tiny version 1" in listed.stdout
    assert ladderstitch("health", "--address", address).stdout.strip() == "SERVING"
    changed = ladderstitch("schedule", "--pin", 3, "--address", address)
    assert "pinned_variant: 3" in changed.stdout
    with Client(address) as client:
        assert {client.predict(pixels(seed=n)).variant for n in range(8)} == {3}


def test_on_ray_replicas_and_gateways_are_replaced(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny").path
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(TOKENS)
    flags = ("--replicas", "2", "--token-file", str(tokens))
    access = Credentials(token="user-secret-0123456789")
    with (
        served_on_ray(bundle, tmp_path, *flags) as (server, _),
        Client(server.address, access=access) as client,
    ):
        request, metadata = infer_request(pixels()), access.metadata
        answered = [client.inference.Infer(request, metadata=metadata) for _ in range(20)]
        assert len({answer.accounting.replica for answer in answered}) == 2
        for deployment in ("replica", "gateway"):
            os.kill(pids_of(server.process.pid, deployment)[0], signal.SIGKILL)
            for n in range(20):
                assert client.predict(pixels(seed=n)).label
