"""A server in this process alone, without Ray."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ladderstitch.bundles import is_language_bundle
from ladderstitch.cli.console import progress_bar
from ladderstitch.cli.lifecycle import (
    exit_now,
    run_until_stopped,
)
from ladderstitch.cli.ready_line import print_ready
from ladderstitch.cli.supervisor import BEAT_S
from ladderstitch.config import ServerConfig
from ladderstitch.runtime.process import freeze_gc

if TYPE_CHECKING:
    import asyncio  # imported late: the help page needs none


def lazy_modules(config: ServerConfig) -> list[str]:
    """Return the modules that a server with this configuration imports when it starts."""
    # numpy.random draws the tokens or the requests of a warm-up
    modules = ["ladderstitch.replica.replica", "numpy.random"]
    if config.http_port is not None:
        modules += ["ladderstitch.api.http_server", "ladderstitch.api.openai.app"]
    if not is_language_bundle(config.bundle):
        modules += ["PIL.JpegImagePlugin", "PIL.PngImagePlugin"]
    return modules


def run_alone(config: ServerConfig, started: float, send_beat: Callable[[], None] | None) -> None:
    """Serve until a signal; `send_beat` is called when the server is ready, then every `BEAT_S`."""
    import asyncio

    asyncio.run(_serve_alone(config, started, send_beat))


async def _serve_alone(
    config: ServerConfig, started: float, send_beat: Callable[[], None] | None
) -> None:
    """Serve until a signal; `send_beat` is called when the server is ready, then every `BEAT_S`."""
    import asyncio

    from ladderstitch.replica.replica import Replica
    from ladderstitch.telemetry.logs import configure as configure_logs

    configure_logs(config.log_format)
    replica = Replica(
        config,
        name=f"{socket.gethostname()}-{os.getpid()}",
        on_failure=partial(signal.raise_signal, signal.SIGTERM),  # drain, then end
    )

    beating: list[asyncio.Task[None]] = []  # the loop alone would not keep it

    async def start() -> None:
        with progress_bar() as progress:
            task = progress.add_task("warming up", total=None)
            await replica.start(
                lambda done, total: progress.update(task, completed=done, total=total)
            )

    async def announce() -> None:
        freeze_gc()
        if send_beat is not None:
            beating.append(asyncio.create_task(_send_beats(send_beat), name="beats"))
        http_port = replica.http.port if replica.http is not None else None
        ports = (replica.port, replica.metrics_port, http_port)
        await asyncio.to_thread(print_ready, config, *ports, started)

    await run_until_stopped(replica, start(), announce)
    if replica.failed:
        exit_now(1)


async def _send_beats(send_beat: Callable[[], None]) -> None:
    """Show the supervisor that this event loop runs."""
    import asyncio

    while True:
        send_beat()
        await asyncio.sleep(BEAT_S)
