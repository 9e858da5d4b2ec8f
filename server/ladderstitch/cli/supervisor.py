"""A supervisor that has imported everything, and forks a server when one has died or hangs."""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import typer

from ladderstitch.cli.lifecycle import handled_signals

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
STEADY_S = 10.0
"""Seconds after which a server that was ready is restarted without a pause when it dies."""
FIRST_DELAY_S, MAX_DELAY_S = 0.5, 30.0
"""Pause before the second restart in a row, which doubles up to the maximum."""
BEAT_S = 1.0
"""Period of the signs of life of a server that is ready."""
LOST_BEATS = 10
"""Beats that may be missing before a server that was ready is killed."""

Poll = Callable[[int, float], bool]
"""Waits until a descriptor is readable, for at most some seconds; returns whether it is."""


def fork_servers() -> Callable[[], None]:
    """Return in a forked server, again and again; the calling process becomes its supervisor.

    The caller has imported what servers need. The supervisor runs no threads of Python, and never
    returns. It passes signals on, and exits as its last server has, after a signal to stop. It also
    does so if the first server dies before it has called the returned function. The server calls it
    when it is ready, and then every `BEAT_S` from its event loop: without a call for `LOST_BEATS`
    it hangs, and is killed. Otherwise the supervisor forks the next one, with growing pauses if
    they die soon.
    """
    gc.freeze()  # the servers share the pages of all objects
    return _Supervisor().run()


@contextmanager
def end_directly() -> Iterator[None]:
    """End a forked server with the status of the block, without the exit handlers of libraries.

    Those of ONNX Runtime wait for a thread that only the supervisor has.
    """
    status = 1
    try:
        yield
        status = 0
    except typer.Exit as end:
        status = end.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


class _Supervisor:
    """The loop of a supervisor; `run` returns in its servers.

    `poll` is replaced in tests, where no time passes.
    """

    def __init__(
        self, poll: Poll = lambda pipe, s: bool(select.select([pipe], [], [], s)[0])
    ) -> None:
        self._poll = poll
        self._server: int | None = None
        self._stopping = False
        self._deaths = 0

    def run(self) -> Callable[[], None]:
        """Fork servers until one ends that may; return in each of them."""
        numbers = handled_signals()
        for number in numbers:
            signal.signal(number, self._forward)
        while True:
            beats, server_end = os.pipe()
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
            self._server = os.fork()
            if self._server == 0:
                os.close(beats)
                return _become_server(numbers, server_end)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            os.close(server_end)
            self._wait(beats)
            os.close(beats)

    def _forward(self, number: int, frame: object) -> None:
        self._stopping = True
        if self._server is not None:
            with suppress(ProcessLookupError):
                os.kill(self._server, number)

    def _wait(self, beats: int) -> None:
        """Wait until the server has ended and the next one may start; exit if none may."""
        assert self._server is not None, "set by `run`"
        ready_at = self._watch(self._server, beats)
        pid, status = os.waitpid(self._server, 0)
        self._server = None
        code = os.waitstatus_to_exitcode(status)
        if self._stopping or (ready_at is None and not self._deaths):
            raise typer.Exit(code if code >= 0 else 128 - code)
        is_steady = ready_at is not None and time.monotonic() - ready_at > STEADY_S
        self._deaths = 1 if is_steady else self._deaths + 1
        delay_s = 0.0
        if self._deaths > 1:
            delay_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(self._deaths - 2, 16))
        reason = f"status={code}" if code >= 0 else f"signal={signal.Signals(-code).name}"
        log.error("the server has died, pid=%d %s; next one in %.1f s", pid, reason, delay_s)
        self._pause(delay_s)

    def _watch(self, server: int, beats: int) -> float | None:
        """Return when the server has closed its pipe; kill it if it hangs.

        The result is the time of its first beat, None without one. Missing beats are counted in
        polls: if this process was stopped, too, the server is not blamed for it.
        """
        ready_at, missing = None, 0
        while True:
            if not self._poll(beats, BEAT_S):
                missing += ready_at is not None
                if missing == LOST_BEATS:
                    log.error(
                        "the server hangs, pid=%d: no beat for %d s; killing it", server, missing
                    )
                    os.kill(server, signal.SIGKILL)
            elif os.read(beats, 64):
                missing, ready_at = 0, ready_at or time.monotonic()
            else:
                return ready_at

    def _pause(self, seconds: float) -> None:
        """Wait before a restart; exit if a signal arrives meanwhile."""
        end = time.monotonic() + seconds
        while not self._stopping and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        if self._stopping:
            raise typer.Exit(0)


def _become_server(numbers: list[signal.Signals], beats: int) -> Callable[[], None]:
    """Detach a forked process from the signals of its supervisor; return what sends a beat."""
    os.setpgid(0, 0)  # Ctrl-C reaches the supervisor, which passes it on
    supervisor = os.getppid()
    if sys.platform == "linux":
        import ctypes  # here: the help page needs none

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    if os.getppid() != supervisor:
        raise typer.Exit(1)  # it died before it could be watched

    os.set_blocking(beats, False)

    def send_beat() -> None:
        # the pipe is full while the supervisor is stopped, and closed after its death
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(beats, b".")

    return send_beat
