"""The command `serve`, which runs a server until Ctrl-C."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import err, user_errors
from ladderstitch.cli.lifecycle import (
    ending_at_once,
)
from ladderstitch.cli.options import with_config_options
from ladderstitch.cli.supervisor import end_directly, fork_servers
from ladderstitch.config import DEFAULT_HTTP_PORT, ServerConfig
from ladderstitch.errors import ConfigError
from ladderstitch.runtime.process import release_ports

if TYPE_CHECKING:
    pass  # imported late: the help page needs none
from ladderstitch.cli.listen_ports import choose_ports, reserve_ports
from ladderstitch.cli.serve_alone import lazy_modules, run_alone
from ladderstitch.cli.serve_on_ray import check_before_start, serve_on_ray


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
    spare: Annotated[
        bool,
        typer.Option(
            "--spare",
            help="Without Ray: keep a process that has imported everything, and starts the server "
            "again within seconds if it dies, or if its event loop hangs for 10 s.",
        ),
    ] = False,
    http: Annotated[
        bool,
        typer.Option(
            "--http/--no-http",
            help="Without --http-port, on loopback, and without --port or with --page on: open "
            f"HTTP port {DEFAULT_HTTP_PORT}, too.",
        ),
    ] = True,
) -> None:
    """Serve a model over gRPC and HTTP until Ctrl-C.

    Ctrl-C drains and stops the server, a second one ends it at once. Call it from another terminal:
    `ladderstitch predict IMAGE --budget 5ms`, or for a language model (`--model elastic-text`)
    `ladderstitch generate "The house was" --per-token 8ms`.
    """
    started = time.monotonic()
    with user_errors(), ending_at_once():
        if model is not None:
            given["bundle"] = find_bundle(model)
        if "record" in given:  # Ray's workers have another working directory
            given["record"] = given["record"].absolute()
        parsed = ServerConfig.load(config, given)
        if http:
            parsed = parsed.with_default_http()
        elif parsed.page == "on" and parsed.http_port is None:
            raise ConfigError(
                "page: expected http_port along with it and --no-http, e.g. "
                f"--http-port {DEFAULT_HTTP_PORT}, got none"
            )
        if parsed.replicas > 1 and not ray:
            raise ConfigError(
                f"replicas: expected 1 without Ray, got {parsed.replicas}; start each replica with "
                "its own --port, and `ladderstitch gateway --replica HOST:PORT ...` in front of "
                "them"
            )
        if spare and ray:
            raise ConfigError(
                "spare: expected --no-ray along with it; Ray restarts replicas itself"
            )
        release_ports(reserve_ports(parsed))  # a taken port is reported before the slow imports
        modules = ["ladderstitch.ray_serve.local_cluster"] if ray else lazy_modules(parsed)
        for module in modules:
            import_module(module)
        if ray:
            check_before_start(parsed)
    with user_errors():
        send_beat: Callable[[], None] | None = None
        if spare:
            parsed = choose_ports(parsed)
            send_beat = fork_servers()
            started = time.monotonic()
    with end_directly() if spare else contextlib.nullcontext(), user_errors():
        reserved = reserve_ports(parsed)
        if ray:
            serve_on_ray(parsed, started)
        else:
            release_ports(reserved)  # most servers without Ray do not share their ports
            run_alone(parsed, started, send_beat)
        err.print("stopped")
