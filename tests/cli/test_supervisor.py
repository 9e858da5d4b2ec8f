"""The supervisor of `serve --spare` watches its server's beats; no time passes in these tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from ladderstitch.cli.supervisor import LOST_BEATS, _Supervisor

BEAT, MISSING, END = "beat", "missing", "end"


class Script:
    """A poll that reports events in order: a beat, no beat in time, the end of the server."""

    def __init__(self, *events: str) -> None:
        self.events = list(events)
        self.pipe, self.server_end = os.pipe()

    def __call__(self, pipe: int, seconds: float) -> bool:
        event = self.events.pop(0)
        if event == BEAT:
            os.write(self.server_end, b".")
        elif event == END:
            os.close(self.server_end)
        return event != MISSING


@pytest.mark.parametrize(
    ("events", "killed", "ready"),
    [
        ([BEAT, *LOST_BEATS * [MISSING], END], True, True),
        ([BEAT, BEAT, *(LOST_BEATS + 5) * [MISSING], END], True, True),
        (
            [BEAT, *(LOST_BEATS - 1) * [MISSING], BEAT, *(LOST_BEATS - 1) * [MISSING], END],
            False,
            True,
        ),
        ([BEAT, END], False, True),
        ([*100 * LOST_BEATS * [MISSING], END], False, False),
        ([*100 * LOST_BEATS * [MISSING], BEAT, END], False, True),
    ],
    ids=["hangs", "hangs later", "slow", "dies", "cannot start", "starts slowly"],
)
def test_watch_kills_a_ready_server_without_beats(
    events: list[str], killed: bool, ready: bool
) -> None:
    poll = Script(*events)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as server:
        ready_at = _Supervisor(poll)._watch(server.pid, poll.pipe)
        os.close(poll.pipe)
        assert (ready_at is not None) == ready
        assert poll.events == []
        if killed:
            assert server.wait(300) == -signal.SIGKILL
        else:
            server.communicate(b"\n", timeout=300)
            assert server.returncode == 0
