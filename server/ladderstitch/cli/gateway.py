"""`ladderstitch gateway`: one address in front of several replicas."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.cli.console import err, out, user_errors
from ladderstitch.errors import ConfigError
from ladderstitch.gateway.config import GatewaySettings
from ladderstitch.gateway.gateway import Gateway
from ladderstitch.gateway.replica_pool import named
from ladderstitch.runtime.process import return_freed_memory, settle_for_good
from ladderstitch.telemetry.logs import configure as configure_logs

ACCESS = "Who may call"
HOP = "How replicas are reached"


def gateway(
    replica: Annotated[
        list[str] | None,
        typer.Option(
            help="HOST:PORT of a replica, once for each; or dns:HOST:PORT for every address that a "
            "name has, looked up every two seconds."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the fields below; flags override it.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind (default: 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port, 0: any (default: 8001)")] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Prometheus port: /metrics, and /sd for the replicas' (default: 9464)"),
    ] = None,
    share_port: Annotated[
        bool, typer.Option("--share-port", help="Let several gateways here listen on these ports.")
    ] = False,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM chain; reread when it changes.", rich_help_panel=ACCESS)
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.", rich_help_panel=ACCESS)] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            help="Callers must show a certificate signed by it (mutual TLS).",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Bearer tokens to check here; replicas get the caller's token either way.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(help="Admin rpcs here, on loopback only.", rich_help_panel=ACCESS),
    ] = None,
    health_port: Annotated[
        int | None, typer.Option(help="Plaintext health for probes.", rich_help_panel=ACCESS)
    ] = None,
    insecure_public: Annotated[
        bool,
        typer.Option(
            "--insecure-public",
            help="Bind beyond loopback without TLS and tokens: whoever can reach it may use it.",
            rich_help_panel=ACCESS,
        ),
    ] = False,
    replica_ca: Annotated[
        Path | None,
        typer.Option(help="PEM of who signed the replicas' certificates.", rich_help_panel=HOP),
    ] = None,
    replica_certificate: Annotated[
        Path | None, typer.Option(help="PEM to show to replicas.", rich_help_panel=HOP)
    ] = None,
    replica_key: Annotated[Path | None, typer.Option(help="Its key.", rich_help_panel=HOP)] = None,
    replica_server_name: Annotated[
        str | None,
        typer.Option(help="Name in the replicas' certificates.", rich_help_panel=HOP),
    ] = None,
    replica_token_file: Annotated[
        Path | None,
        typer.Option(help="Holds a token to watch replicas with.", rich_help_panel=HOP),
    ] = None,
    patience: Annotated[
        float | None,
        typer.Option(help="Seconds that a request waits for a replica at most (default: 30)"),
    ] = None,
) -> None:
    """Forward every request to the replica that leaves it the most slack.

    What a replica cannot answer goes to another one while time is left; Ctrl-C drains and stops.
    docs/gateway.md tells the rest.
    """
    with user_errors():
        settings = GatewaySettings.load(
            config,
            replicas=tuple(replica) if replica else None,
            host=host,
            port=port,
            metrics_port=metrics_port,
            share_port=share_port or None,
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            token_file=token_file,
            admin_port=admin_port,
            health_port=health_port,
            insecure_public=insecure_public or None,
            replica_ca=replica_ca,
            replica_certificate=replica_certificate,
            replica_key=replica_key,
            replica_server_name=replica_server_name,
            replica_token_file=replica_token_file,
            patience_s=patience,
        )
        if not settings.replicas:
            raise ConfigError("replica: expected at least one; e.g. --replica 127.0.0.1:8011")
        asyncio.run(_run(settings))
    err.print("stopped")


async def _run(settings: GatewaySettings) -> None:
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
