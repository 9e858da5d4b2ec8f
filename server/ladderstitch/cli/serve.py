"""The commands `serve`, which runs a server until Ctrl-C, and `rank`."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ladderstitch.api.listener import ListenerConfig
from ladderstitch.bundles import EMBEDDED, find_bundle, is_language_bundle
from ladderstitch.cli.console import err, out, progress_bar, user_errors
from ladderstitch.cli.options import with_config_options
from ladderstitch.client import Client, RequestFailed
from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError
from ladderstitch.hosting.model_manager import make_runner
from ladderstitch.hosting.registry import ModelRegistry
from ladderstitch.replica.replica import Replica
from ladderstitch.runtime.process import free_port, freeze_gc, port_is_free
from ladderstitch.telemetry.logs import configure as configure_logs
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.text.engine.rank_handle import launch_process

EXAMPLE_IMAGES = Path("examples/fashion-mnist/images")
UNKNOWN_BUDGET = "100ms"
HINT_TIMEOUT_S = 5.0
AROUND_COMPUTE_MS = 2
"""Milliseconds of a suggested budget for everything but the model."""
GATEWAY_PORTS = ("port", "metrics_port")
"""Fields of the ports that all gateways of one machine share."""


@with_config_options(ServerConfig, skip=("bundle",), panels={"scheduling": "Scheduling"})
def serve(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="YAML file, e.g. examples/serve.yaml; options override it.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--bundle",
            help="Name of a fetched model, or the directory of a bundle.",
            show_default="fashion-mnist",
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray/--no-ray", help="Run on Ray Serve, or in this process alone.")
    ] = True,
) -> None:
    """Serve a model over gRPC, with metrics for Prometheus. Ctrl-C drains and stops the server.

    Call it from another terminal: `ladderstitch predict IMAGE --budget 5ms`, or for a language
    model (`ladderstitch fetch smollm2`) `ladderstitch generate "The capital of France is"`.
    """
    started = time.monotonic()
    with user_errors():
        if model is not None:
            given["bundle"] = find_bundle(model)
        if "record" in given:  # Ray's workers have another working directory
            given["record"] = given["record"].absolute()
        parsed = ServerConfig.load(config, given)
        if parsed.replicas > 1 and not ray:
            raise ConfigError(
                f"replicas: expected 1 without Ray, got {parsed.replicas}; start each replica with "
                "its own --port, and `ladderstitch gateway --replica HOST:PORT ...` in front of "
                "them"
            )
        _check_before_start(parsed)
        if ray:
            _serve_on_ray(parsed, started)
        else:
            asyncio.run(_serve_alone(parsed, started))
    err.print("stopped")


def _check_before_start(config: ServerConfig) -> None:
    """Raise now the `UserError` that another process would raise seconds later."""
    make_runner(config, ModelRegistry("check"), Metrics(), launch_process)
    ListenerConfig.from_config(config, lambda reason: None)
    for field, address in config.port_fields():
        number = getattr(config, field)
        if number is not None and not port_is_free(address, number):
            raise ConfigError(
                f"{field}: expected a free port, got {address}:{number}, which is taken; choose "
                f"another one with --{field.replace('_', '-')}, or 0 for any"
            )


def _serve_on_ray(config: ServerConfig, started: float) -> None:
    from ladderstitch.ray_serve.local_cluster import local_ray

    stop = threading.Event()
    status = err.status("starting Ray and Serve, then loading the model ...")
    actors = config.replicas * (1 + config.tensor_parallel_size + config.spare_ranks)
    if config.replicas > 1:  # restarted gateways need the same ports
        ports = {name: getattr(config, name) or free_port(config.host) for name in GATEWAY_PORTS}
        config = config.model_copy(update=ports)
    with status, local_ray(actors) as cluster:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        port, metrics_port = cluster.run(config)
        status.stop()
        if not stop.is_set():
            _print_ready(config, port, metrics_port, config.http_port, started)
        stop.wait()
        err.print("draining ...")
        cluster.drain()


async def _serve_alone(config: ServerConfig, started: float) -> None:
    configure_logs(config.log_format)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    replica = Replica(config, name=f"{socket.gethostname()}-{os.getpid()}")
    with progress_bar() as progress:
        task = progress.add_task("warming up", total=None)
        await replica.start(lambda done, total: progress.update(task, completed=done, total=total))
    freeze_gc()
    http_port = replica.http.port if replica.http is not None else None
    ports = (replica.port, replica.metrics_port, http_port)
    await asyncio.to_thread(_print_ready, config, *ports, started)
    await stop.wait()
    err.print("draining ...")
    await replica.stop()


def _print_ready(
    config: ServerConfig, port: int, metrics_port: int, http_port: int | None, started: float
) -> None:
    """Print the addresses of the server, and a command that calls it."""
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
        has_examples = EXAMPLE_IMAGES.is_dir() and config.bundle == EMBEDDED
        images = f"{EXAMPLE_IMAGES}/*.png" if has_examples else "IMAGE.png"
        budget = _suggest_budget(config, port)
        command = f"{sys.argv[0]} predict {images} --budget {budget}{address}"
    out.print(f"try:  {command}", soft_wrap=True, highlight=False)


def _suggest_budget(config: ServerConfig, port: int) -> str:
    """Return a latency budget that this machine keeps with the most accurate variant.

    Without an answer, e.g. because only callers with credentials get one, it is 100 ms: a server
    that has started does not end because of a hint.
    """
    if config.tls_certificate is not None or config.token_file is not None:
        return UNKNOWN_BUDGET
    try:
        with Client(f"{config.host}:{port}", timeout_s=HINT_TIMEOUT_S) as client:
            model = client.get_model()
    except RequestFailed:
        return UNKNOWN_BUDGET
    planned_us = {v.id: v.planned_latency_us for v in model.variants if v.id in model.frontier}
    return f"{math.ceil(2 * max(planned_us.values()) / 1e3 + AROUND_COMPUTE_MS)}ms"


def rank(
    address: Annotated[str, typer.Argument(help="HOST:PORT, the server's `rank_address`.")],
    secret_file: Annotated[
        Path, typer.Option(help="File with the secret; the server's `rank_secret_file`.")
    ],
) -> None:
    """Run one tensor-parallel rank for a server on another machine.

    The command exits when the server disconnects.
    """
    from ladderstitch.text.engine.rank import run

    with user_errors():
        try:
            run(address, secret_file.read_text().strip())
        except OSError as error:
            raise ConfigError(f"rank: {error}") from error


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(rich_help_panel="Serve")(serve)
    app.command(rich_help_panel="Serve")(rank)
