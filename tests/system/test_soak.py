"""Mixed load: images and text, cancels, bad input, killed and restarted replicas, reloads.

`make soak` runs it for an hour and writes figures.
"""

from __future__ import annotations

import pytest

from ladderstitch_loadtest.faults.soak import IMAGES, Soak
from ladderstitch_loadtest.faults.soak_cli import list_failures, tiny_model_home
from ladderstitch_loadtest.faults.soak_result import ALLOWED
from ladderstitch_loadtest.servers.process_supervisor import (
    replicas_and_gateways,
    wait_until_serving,
)

SECONDS = 20.0
"""Minimum duration; a slow machine takes longer, until each disturbance has happened once."""
DEADLINE_S = 200.0
"""Deadline of every request, which only guards against hanging."""
MAX_GROWTH_MB = 150.0
"""Limit between the means of the second and the last quarter.

In between a model is loaded again, and half of the memory of two models is kept for the next time.
"""


@pytest.mark.timeout(1200)
async def test_soak_short_run_has_no_leak_or_stuck_request() -> None:
    replicas = replicas_and_gateways(2, 1, "--model", IMAGES)
    with tiny_model_home(), replicas as ((survivor, victim), (gateway,)):
        wait_until_serving([gateway], 2)
        found = await Soak(survivor, victim, gateway, SECONDS, deadline_s=DEADLINE_S).run()
        assert (survivor.starts, gateway.starts) == (1, 1)
        assert victim.starts >= 3
    assert list_failures(found, DEADLINE_S) == []
    assert found.unexplained == []
    assert found.ends.keys() == ALLOWED.keys()
    assert {name for _, name in found.disturbances} == {
        "kill -9",
        "workers",
        "SIGTERM",
        "reload",
        "SIGSTOP",
        "given up",
    }
    assert found.growth_mb("gateway") < MAX_GROWTH_MB
    assert found.growth_mb("survivor") < MAX_GROWTH_MB
