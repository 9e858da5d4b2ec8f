"""The end of a command that runs until a signal: in order at first, then at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, NoReturn, Protocol

from ladderstitch.cli.console import err

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CANCEL_S = 1.0
"""Seconds for which the work that a signal cancels may clean up before the service closes."""
CLOSE_S = 3.0
"""Seconds within which a server closes that has to end at once; then its process ends."""


class Service(Protocol):
    """What runs until a signal: a replica or a gateway."""

    async def stop(self) -> None:
        """Finish the accepted requests, then close."""

    async def close(self) -> None:
        """Close at once; requests in flight are cancelled."""


def handled_signals() -> list[signal.Signals]:
    """Return the signals that stop a command: SIGHUP unless it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or not ignored]


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process at a signal, at once, while it only imports modules and reads files.

    The interrupt of Python would wait for an event loop, or appear as an error of the library that
    is being imported.
    """
    before = {number: signal.getsignal(number) for number in handled_signals()}
    for number in before:
        signal.signal(number, lambda *_: exit_now(0))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """The signals that a command has received, for the coroutine that runs it.

    A thread receives them, so that they have an effect while the event loop is blocked.
    """

    def __init__(self) -> None:
        """Handle the signals from now on; call it in the running event loop."""
        import asyncio  # here: the help page needs none

        self.count = 0
        self._ends_at, self._status = 1, 0
        self._loop = asyncio.get_running_loop()
        self._received = asyncio.Event()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno())
        for number in handled_signals():
            signal.signal(number, lambda *_: None)  # the number arrives at the wake-up socket
        threading.Thread(target=self._receive, name="signals", daemon=True).start()

    def _receive(self) -> None:
        while True:
            self.count += sum(number in STOP_SIGNALS for number in self._reader.recv(64))
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nothing to wake
                self._loop.call_soon_threadsafe(self._received.set)
            if self.count >= self._ends_at:
                time.sleep(CLOSE_S)
                exit_now(self._status)

    async def wait(self, count: int = 1) -> None:
        """Wait until `count` signals have been received."""
        while self.count < count:
            self._received.clear()
            await self._received.wait()

    async def cancel_at(self, count: int, work: Coroutine[Any, Any, None], status: int) -> bool:
        """Run `work` and cancel it at the signal number `count`; return whether it finished.

        The process ends with `status` at most `CLOSE_S` after that signal. Raises what `work`
        raises.
        """
        import asyncio

        self._ends_at, self._status = count, status
        task, signalled = asyncio.create_task(work), asyncio.create_task(self.wait(count))
        await asyncio.wait({task, signalled}, return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if task.done():
            self._ends_at = count + 1
            task.result()
            return True
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_S)
        return False


async def run_until_stopped(
    service: Service, start: Coroutine[Any, Any, None], on_ready: Callable[[], Awaitable[None]]
) -> None:
    """Start a service, run it until a signal, and stop it.

    A signal during `start` ends the process at once, and so does a second one during `stop`: the
    service has `CLOSE_S` to close then.
    """
    signals = StopSignals()
    if not await signals.cancel_at(1, start, status=0):
        await service.close()
        exit_now(0)
    await on_ready()
    await signals.wait()
    err.print("draining ...")
    if not await signals.cancel_at(2, service.stop(), status=1):
        await service.close()
        exit_now(1)


class Interrupt(BaseException):
    """The end of a command without an event loop by a signal."""


class InterruptingSignals:
    """The signals that a command without an event loop has received.

    While `interrupts` is true, the next one raises `Interrupt` in the main thread.
    """

    def __init__(self) -> None:
        """Handle the signals from now on."""
        self.received = threading.Event()
        self.count = 0
        self.interrupts = True
        self._numbers = handled_signals()
        self.install()

    def install(self) -> None:
        """Handle the signals again, after a library has installed handlers of its own."""
        for number in self._numbers:
            signal.signal(number, self._handle)

    def _handle(self, *_: object) -> None:
        self.count += 1
        self.received.set()
        if self.interrupts:
            self.interrupts = False  # what it ends cleans up
            raise Interrupt


def exit_now(status: int) -> NoReturn:
    """End the process without waiting for its threads, which may compute for a long time."""
    err.print("stopped" if status == 0 else "stopped before all requests had ended")
    sys.stdout.flush()
    os._exit(status)
