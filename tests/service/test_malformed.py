"""Malformed requests of every kind: each gets its status, good ones are answered all along.

`make verify-serving` sends 10,000 of them and watches the memory; here a few hundred.
"""

from __future__ import annotations

from ladderstitch_loadtest.malformed import process_tree, run
from tests.service.conftest import RunningServer


async def test_each_gets_the_right_status(server: RunningServer) -> None:
    outcome = await run(server.address, process_tree(server.process.pid), 570, 3, lambda: None)
    assert outcome.wrong == []
    assert min(outcome.kinds.values()) == 30
    assert outcome.good_answers == 57
    assert "incident" not in server.log.read_text()
