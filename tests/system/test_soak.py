"""Mixed load: images and text, cancels, bad input, killed and restarted replicas, reloads.

`make soak` makes it an hour and writes figures.
"""

from __future__ import annotations

import pytest

from ladderstitch_loadtest.faults.fault_injection import until_all_serve
from ladderstitch_loadtest.faults.soak import ALLOWED, Soak
from ladderstitch_loadtest.faults.soak_cli import IMAGES, models, shortfalls
from ladderstitch_loadtest.servers.process_supervisor import stage

SECONDS = 20.0
"""Least duration; a slow machine takes longer, until each disturbance has happened once."""
STUCK_S = 200.0
"""Deadline of every request: it guards against hanging, whatever the machine's speed."""
SETTLED_MB = 40.0
"""Between the means of the second and the last quarter: caches still fill."""


@pytest.mark.timeout(1200)
async def test_nothing_leaks_sticks_or_surprises() -> None:
    with models(), stage(2, 1, "--model", IMAGES) as ((survivor, victim), (gateway,)):
        until_all_serve([gateway.metrics], 2)
        found = await Soak(survivor, victim, gateway, SECONDS, stuck_s=STUCK_S).run()
        assert (survivor.starts, gateway.starts) == (1, 1)
        assert victim.starts >= 3
    assert shortfalls(found, STUCK_S) == []
    assert found.unexplained == []
    assert found.ends.keys() == ALLOWED.keys()
    assert {name for _, name in found.disturbances} == {"kill -9", "workers", "SIGTERM", "reload"}
    assert found.grown_mb("gateway") < SETTLED_MB
    assert found.grown_mb("survivor") < SETTLED_MB
