"""A signal while a command only imports modules: it ends at once, as the handler says."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from ladderstitch.cli.lifecycle import STOP_SIGNALS, ending_at_once

WAIT = """
import asyncio
from ladderstitch.cli.lifecycle import ending_at_once

async def block():  # as a library does that catches the interrupt of Python
    print("blocked", flush=True)
    while True:
        try:
            __import__("time").sleep(60)
        except BaseException:
            pass

with ending_at_once():
    asyncio.run(block())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_process_that_catches_interrupts(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "blocked\n"
        process.send_signal(number)
        assert process.wait(timeout=300) == 0
        assert process.stderr.read() == "stopped\n"


def test_handlers_are_those_of_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with ending_at_once():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
