"""The command `gateway`: one address in front of several replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ladderstitch.addresses import join_address
from ladderstitch.cli.console import err, out, user_errors
from ladderstitch.cli.options import with_config_options
from ladderstitch.errors import ConfigError
from ladderstitch.gateway.config import GatewayConfig


@with_config_options(GatewayConfig)
def gateway(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the same fields; options override it.")
    ] = None,
) -> None:
    """Forward each request to the best of several replicas.

    The best one leaves the request the most slack. A request that one replica rejects is retried on
    another one while its deadline allows. Ctrl-C drains and stops the gateway. Details:
    docs/gateway.md.
    """
    with user_errors():
        parsed = GatewayConfig.load(config, given)
        if not parsed.replicas:
            raise ConfigError(
                "replica: expected at least one, e.g. --replica 127.0.0.1:8011, got none"
            )
        import asyncio

        asyncio.run(_run(parsed))
    err.print("stopped")


async def _run(config: GatewayConfig) -> None:
    from ladderstitch.cli.lifecycle import run_until_stopped
    from ladderstitch.gateway.gateway import Gateway
    from ladderstitch.gateway.replica_pool import discover_replicas
    from ladderstitch.runtime.process import freeze_gc, tune_malloc
    from ladderstitch.telemetry.logs import configure as configure_logs

    tune_malloc()
    configure_logs(config.log_format)
    gateway = Gateway(config, discover_replicas(config.replicas))

    async def print_ready() -> None:
        freeze_gc()
        where = [
            f"gRPC on {join_address(config.host, gateway.port)}",
            f"metrics on http://{join_address(config.host, gateway.metrics_port)}/metrics, "
            "replicas' on /sd",
        ]
        if gateway.http is not None:
            scheme = "https" if config.tls_certificate is not None else "http"
            address = join_address(config.host, gateway.http.port)
            where.append(f"OpenAI API on {scheme}://{address}/v1")
        out.print(f"[bold green]ready[/]: {', '.join(where)}", soft_wrap=True)

    await run_until_stopped(gateway, gateway.start(), print_ready)
