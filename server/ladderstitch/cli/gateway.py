"""`ladderstitch gateway`: one address in front of several replicas."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from ladderstitch.cli.console import err, out, user_errors
from ladderstitch.cli.options import with_config_options
from ladderstitch.errors import ConfigError
from ladderstitch.gateway.config import GatewayConfig
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.gateway.replica_pool import named
from ladderstitch.runtime.process import return_freed_memory, settle_for_good
from ladderstitch.telemetry.logs import configure as configure_logs


@with_config_options(GatewayConfig)
def gateway(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the same fields; options override it.")
    ] = None,
) -> None:
    """Forward every request to the replica that leaves it the most slack.

    A request that a replica cannot answer goes to another one while its deadline allows. Ctrl-C
    drains and stops. Details: docs/gateway.md.
    """
    with user_errors():
        parsed = GatewayConfig.load(config, given)
        if not parsed.replicas:
            raise ConfigError("replica: expected at least one, e.g. --replica 127.0.0.1:8011")
        asyncio.run(_run(parsed))
    err.print("stopped")


async def _run(settings: GatewayConfig) -> None:
    return_freed_memory()
    configure_logs(settings.log_format)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    gateway = Gateway(settings, named(settings.replicas))
    try:
        await gateway.start()
    except OSError as error:
        raise ConfigError(f"port: {error}; name another with --port") from error
    settle_for_good()
    out.print(
        f"[bold green]ready[/]: gRPC on {settings.host}:{gateway.port}, metrics on "
        f"http://{settings.host}:{gateway.metrics_port}/metrics, replicas' on /sd",
        soft_wrap=True,
    )
    await stop.wait()
    err.print("draining ...")
    await gateway.stop()


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Serve")(gateway)
