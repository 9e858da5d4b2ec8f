"""`ladderstitch serve`: one model on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from ladderstitch.api.listener import Transport
from ladderstitch.bundles.registry import EMBEDDED, find_bundle, is_language_bundle
from ladderstitch.cli.console import err, out, progress_bar, user_errors
from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError
from ladderstitch.hosting.model_manager import make_runner
from ladderstitch.hosting.registry import Host
from ladderstitch.replica.replica import Replica
from ladderstitch.runtime.process import free_port, port_is_free, settle_for_good
from ladderstitch.telemetry.logs import configure as configure_logs
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.text.engine.rank_handle import launch_process

EXAMPLES = Path("examples/fashion-mnist/images")
ACCESS = "Who may call"
GATEWAY_PORTS = ("port", "metrics_port")


def serve(
    config: Annotated[
        Path | None, typer.Option(help="YAML file, e.g. examples/serve.yaml; flags override it.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--bundle",
            help="Name of a fetched model, or a bundle's folder "
            "(default: fashion-mnist, which is embedded).",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind (default: 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port, 0: any (default: 8001)")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus port, 0: any (default: 9464)")
    ] = None,
    http_port: Annotated[
        int | None, typer.Option(help="OpenAI's API for language models, e.g. 8081; unset: none")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda[:N] (default: auto)")] = None,
    replicas: Annotated[
        int | None,
        typer.Option(help="Copies of the model here, behind gateways; needs Ray (default: 1)"),
    ] = None,
    gateways: Annotated[
        int | None,
        typer.Option(help="Before several replicas; they share the port (default: 2)"),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Language models: processes to split over (default: 1)")
    ] = None,
    spare_ranks: Annotated[
        int | None, typer.Option(help="Language models: warm stand-ins for lost ranks (default: 0)")
    ] = None,
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
            help="Bearer tokens, scopes, limits; see examples/tokens.yaml.", rich_help_panel=ACCESS
        ),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(
            help="Admin rpcs here, on loopback, and nowhere else.", rich_help_panel=ACCESS
        ),
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
    record: Annotated[
        Path | None,
        typer.Option(help="Folder for all that is planned, to `ladderstitch-loadtest replay`."),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray/--no-ray", help="Run under Ray Serve, or in this process alone.")
    ] = True,
) -> None:
    """Serve a model over gRPC, with metrics for Prometheus. Ctrl-C drains and stops.

    From another terminal: `ladderstitch predict IMAGE --budget 5ms`, or for a language model
    (`ladderstitch fetch smollm2`) `ladderstitch generate "The capital of France is"`.
    """
    started = time.monotonic()
    with user_errors():
        parsed = ServerConfig.load(
            config,
            bundle=find_bundle(model) if model is not None else None,
            host=host,
            port=port,
            metrics_port=metrics_port,
            http_port=http_port,
            device=device,
            replicas=replicas,
            gateways=gateways,
            ranks=ranks,
            spare_ranks=spare_ranks,
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            token_file=token_file,
            admin_port=admin_port,
            health_port=health_port,
            insecure_public=insecure_public or None,
            record=record.absolute() if record is not None else None,
        )
        if parsed.replicas > 1 and not ray:
            raise ConfigError(
                "replicas: several need Ray; without it, start each with its own --port and "
                "`ladderstitch gateway --replica HOST:PORT ...` before them"
            )
        _check_before_start(parsed)
        if ray:
            _serve_on_ray(parsed, started)
        else:
            asyncio.run(_serve_alone(parsed, started))
    err.print("stopped")


def _check_before_start(config: ServerConfig) -> None:
    """What would otherwise come up seconds later, out of another process."""
    make_runner(config, Host("check"), Metrics(), launch_process)
    Transport.of(config, lambda reason: None)
    for field, address in config.listening():
        number = getattr(config, field)
        if number is not None and not port_is_free(address, number):
            raise ConfigError(
                f"{field}: {address}:{number} is taken; name another with "
                f"--{field.replace('_', '-')}, or 0 for any"
            )


def _serve_on_ray(config: ServerConfig, started: float) -> None:
    from ladderstitch.ray_serve.local_cluster import local_ray

    stop = threading.Event()
    status = err.status("starting Ray and Serve, then warming every stitch and batch size ...")
    actors = config.replicas * (1 + config.ranks + config.spare_ranks)
    if config.replicas > 1:  # all gateways take the same, those that are started anew, too
        ports = {name: getattr(config, name) or free_port(config.host) for name in GATEWAY_PORTS}
        config = config.model_copy(update=ports)
    with status, local_ray(actors) as cluster:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        port, metrics_port = cluster.run(config)
        status.stop()
        if not stop.is_set():
            _say_ready(config, port, metrics_port, config.http_port, started)
        stop.wait()
        err.print("draining ...")
        cluster.drain()


async def _serve_alone(config: ServerConfig, started: float) -> None:
    configure_logs(config.log_format)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    replica = Replica(config)
    with progress_bar() as progress:
        task = progress.add_task("warming up", total=None)
        await replica.start(lambda done, total: progress.update(task, completed=done, total=total))
    settle_for_good()
    http_port = replica.http.port if replica.http is not None else None
    _say_ready(config, replica.port, replica.metrics_port, http_port, started)
    await stop.wait()
    err.print("draining ...")
    await replica.stop()


def _say_ready(
    config: ServerConfig, port: int, metrics_port: int, http_port: int | None, started: float
) -> None:
    seconds = time.monotonic() - started
    where = f"gRPC on {config.host}:{port}, metrics on http://{config.host}:{metrics_port}/metrics"
    if http_port is not None:
        scheme = "https" if config.tls_certificate is not None else "http"
        where += f", OpenAI API on {scheme}://{config.host}:{http_port}/v1"
    out.print(f"[bold green]ready[/] after {seconds:.1f} s: {where}", soft_wrap=True)
    address = "" if port == 8001 else f" --address {config.host}:{port}"
    if is_language_bundle(config.bundle):
        command = f'{sys.argv[0]} generate "The capital of France is"{address}'
    else:
        ours = EXAMPLES.is_dir() and config.bundle == EMBEDDED
        images = f"{EXAMPLES}/*.png --budget 5ms" if ours else "IMAGE.png --budget 100ms"
        command = f"{sys.argv[0]} predict {images}{address}"
    out.print(f"try:  {command}", soft_wrap=True, highlight=False)


def rank(
    address: Annotated[str, typer.Argument(help="HOST:PORT: the server's `rank_address`.")],
    secret_file: Annotated[Path, typer.Option(help="The same file as its `rank_secret_file`.")],
) -> None:
    """Be one rank of a language model that is served on another machine, until it lets go."""
    from ladderstitch.text.engine.rank import run

    with user_errors():
        try:
            run(address, secret_file.read_text().strip())
        except OSError as error:
            raise ConfigError(f"rank: {error}") from error


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Serve")(serve)
    app.command(rich_help_panel="Serve")(rank)
