"""Mutated requests of all entrances, next to good callers, against a server as users start it.

`make verify-faults` sends 100,000 of them and measures time and memory, too.
"""

from __future__ import annotations

from ladderstitch_loadtest.faults.fuzz_cli import fuzzed_server, run_fuzz
from ladderstitch_loadtest.faults.fuzzing.entrances import all_entrances

REQUESTS, SEED, RATE = 400, 1, 250.0
QUIET_S = 2.0


def is_failure(end: str) -> bool:
    """Return whether the server is at fault.

    504 is none: a slow machine may miss a hard deadline, and the campaign has checked that the
    request named one.
    """
    return "INTERNAL" in end or (": 5" in end and not end.endswith(": 504"))


def test_mutated_requests_get_their_status_and_leave_nothing() -> None:
    """One decoder for each range of costs, so that overlaps do not decide how many are started."""
    with fuzzed_server(image_decoders=1) as (server, http_address):
        report = run_fuzz(server, http_address, REQUESTS, SEED, RATE, QUIET_S)
    found = report.campaign
    assert found.requests == REQUESTS
    assert found.wrong == []
    assert not [end for end in found.ends if is_failure(end)]
    assert {name.partition(": ")[0] for name in found.kinds} == {e.name for e in all_entrances()}
    assert report.good_faults == ()
    assert report.quiet.answers
    assert report.busy.answers
    assert report.after.descriptors <= report.before.descriptors
    assert report.after.processes <= report.before.processes
