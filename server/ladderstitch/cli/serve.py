"""The commands `serve`, which runs a server until Ctrl-C, and `rank`."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ladderstitch.addresses import DEFAULT_ADDRESS, join_address
from ladderstitch.bundles import EMBEDDED, find_bundle, is_language_bundle
from ladderstitch.cli.console import err, out, progress_bar, user_errors
from ladderstitch.cli.lifecycle import (
    Interrupt,
    InterruptingSignals,
    ending_at_once,
    exit_now,
    run_until_stopped,
)
from ladderstitch.cli.options import with_config_options
from ladderstitch.cli.supervisor import BEAT_S, end_directly, fork_servers
from ladderstitch.config import DEFAULT_HTTP_PORT, ServerConfig
from ladderstitch.errors import ConfigError
from ladderstitch.runtime.process import free_port, freeze_gc, release_ports, reserve_port

if TYPE_CHECKING:
    import asyncio  # imported late: the help page needs none

EXAMPLE_IMAGES = Path("examples/fashion-mnist/images")
"""Images for the embedded model in the repository; the package has others."""
UNKNOWN_BUDGET = "100ms"
HINT_TIMEOUT_S = 5.0
AROUND_COMPUTE_MS = 2
"""Milliseconds of a suggested budget for everything but the model."""
CLUSTER_CHECK_S = 0.5
"""Period of the check whether Ray's processes run."""
GATEWAY_PORTS = ("port", "metrics_port", "http_port")
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
    `ladderstitch generate "The house was" --per-token 4ms`.
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
        release_ports(_reserve_ports(parsed))  # a taken port is reported before the slow imports
        modules = ["ladderstitch.ray_serve.local_cluster"] if ray else _lazy_modules(parsed)
        for module in modules:
            import_module(module)
        if ray:
            _check_before_start(parsed)
    with user_errors():
        send_beat: Callable[[], None] | None = None
        if spare:
            parsed = _choose_ports(parsed)
            send_beat = fork_servers()
            started = time.monotonic()
    with end_directly() if spare else contextlib.nullcontext(), user_errors():
        reserved = _reserve_ports(parsed)
        if ray:
            _serve_on_ray(parsed, started)
        else:
            release_ports(reserved)  # most servers without Ray do not share their ports
            _run_alone(parsed, started, send_beat)
        err.print("stopped")


def _check_before_start(config: ServerConfig) -> None:
    """Raise now the `UserError` that a process of Ray would raise seconds later."""
    from ladderstitch.api.listener import ListenerConfig
    from ladderstitch.hosting.model_manager import make_runner
    from ladderstitch.hosting.registry import ModelRegistry
    from ladderstitch.telemetry.metrics import Metrics
    from ladderstitch.text.engine.rank_handle import launch_process

    make_runner(config, ModelRegistry("check"), Metrics(), launch_process)
    ListenerConfig.from_config(config, lambda reason: None)


def _reserve_ports(config: ServerConfig) -> list[socket.socket]:
    """Return sockets that reserve all ports; raises `ConfigError` that names all taken ones."""
    reserved: list[socket.socket] = []
    taken: dict[str, str] = {}
    for field, host in config.port_fields():
        number = getattr(config, field)
        if number is None or (field == "metrics_port" and config.replicas > 1):
            continue  # gateways take over the port of metrics from each other, and do not share it
        try:
            reserved += reserve_port(host, number)
        except OSError as error:
            address = join_address(host, number)
            if error.errno != errno.EADDRINUSE:
                release_ports(reserved)
                raise ConfigError(
                    f"{field}: cannot listen on {address}: {error.strerror}"
                ) from error
            taken[field] = address
    if taken:
        release_ports(reserved)
        raise ConfigError(_describe_taken(taken))
    return reserved


def _describe_taken(taken: Mapping[str, str]) -> str:
    """Return an error for the addresses of fields whose ports are taken, and what to do."""
    found = "; ".join(
        f"{field}: expected a free port, got {address}, which is taken"
        for field, address in taken.items()
    )
    options = " ".join(f"--{field.replace('_', '-')} 0" for field in taken)
    return f"{found}. Another server may run already; {options} picks free ports for this one"


def _serve_on_ray(config: ServerConfig, started: float) -> None:
    """Serve until a signal; a signal while the model is loaded, or a second one, ends it at once.

    If Ray loses a process that it needs, the server drains and exits with 1.
    """
    from ladderstitch.ray_serve.local_cluster import ClusterLost, local_ray

    signals = InterruptingSignals()
    actors = config.replicas * (1 + config.tensor_parallel_size + config.spare_ranks)
    fixed = GATEWAY_PORTS if config.replicas > 1 else ("http_port",)
    ports = {name: free_port(config.host) for name in fixed if getattr(config, name) == 0}
    config = config.model_copy(update=ports)  # restarted gateways need the same ports
    try:
        with local_ray(actors) as cluster:
            signals.install()  # Ray has installed its own
            with err.status("loading the model ..."):
                port, metrics_port = cluster.run(config)
            signals.interrupts = False
            if not signals.received.is_set():
                _print_ready(config, port, metrics_port, config.http_port, started)
            try:
                while not signals.received.wait(CLUSTER_CHECK_S):
                    cluster.check()
            except ClusterLost as error:
                err.print(f"[bold red]error:[/] {error}; draining ...")
                _drain_without_ray(config, port)
                raise
            err.print("draining ...")
            signals.interrupts = True
            cluster.drain()
            signals.interrupts = False
    except (Interrupt, SystemExit):  # the latter is of Ray's own handler, while Serve starts
        exit_now(1 if signals.count > 1 else 0)
    except ClusterLost:
        exit_now(1)


def _drain_without_ray(config: ServerConfig, port: int) -> None:
    """Let the accepted requests end while Ray cannot; callers with tokens lose theirs."""
    from ladderstitch.client import Client, RequestFailed

    if config.tls_certificate is not None or config.token_file is not None:
        return
    with (
        contextlib.suppress(RequestFailed),  # also if the replica has ended with Ray
        Client(join_address(config.host, port), timeout_s=config.drain_s + 5) as client,
    ):
        client.drain()


def _choose_ports(config: ServerConfig) -> ServerConfig:
    """Return a configuration with free ports instead of 0, so that a restart keeps them."""
    ports: dict[str, int] = {}
    for field, host in config.port_fields():
        while getattr(config, field) == 0 and (
            field not in ports or list(ports.values()).count(ports[field]) > 1
        ):
            ports[field] = free_port(host)
    return config.model_copy(update=ports)


def _lazy_modules(config: ServerConfig) -> list[str]:
    """Return the modules that a server with this configuration imports when it starts."""
    # numpy.random draws the tokens or the requests of a warm-up
    modules = ["ladderstitch.replica.replica", "numpy.random"]
    if config.http_port is not None:
        modules += ["ladderstitch.api.http_server", "ladderstitch.api.openai.app"]
    if not is_language_bundle(config.bundle):
        modules += ["PIL.JpegImagePlugin", "PIL.PngImagePlugin"]
    return modules


def _run_alone(config: ServerConfig, started: float, send_beat: Callable[[], None] | None) -> None:
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

    async def print_ready() -> None:
        freeze_gc()
        if send_beat is not None:
            beating.append(asyncio.create_task(_send_beats(send_beat), name="beats"))
        http_port = replica.http.port if replica.http is not None else None
        ports = (replica.port, replica.metrics_port, http_port)
        await asyncio.to_thread(_print_ready, config, *ports, started)

    await run_until_stopped(replica, start(), print_ready)
    if replica.failed:
        exit_now(1)


async def _send_beats(send_beat: Callable[[], None]) -> None:
    """Show the supervisor that this event loop runs."""
    import asyncio

    while True:
        send_beat()
        await asyncio.sleep(BEAT_S)


def _print_ready(
    config: ServerConfig, port: int, metrics_port: int, http_port: int | None, started: float
) -> None:
    """Print one line: the addresses of the server, its page, and a command that calls it."""
    address = join_address(config.host, port)
    where = [
        f"gRPC on {address}",
        f"metrics on http://{join_address(config.host, metrics_port)}/metrics",
    ]
    if http_port is not None:
        scheme = "https" if config.tls_certificate is not None else "http"
        http = f"{scheme}://{join_address(config.host, http_port)}"
        where.append(f"OpenAI API on {http}/v1")
        if config.serves_page:
            where.insert(0, f"page on {http}/")
    command = suggest_command(config, address)
    out.print(
        f"[bold green]ready[/] after {time.monotonic() - started:.1f} s: "
        f"{escape(', '.join(where))}, try: {escape(command)}",
        soft_wrap=True,
        highlight=False,
    )


def suggest_command(config: ServerConfig, address: str) -> str:
    """Return a command that calls the server at an address, as a shell takes it."""
    option = [] if address == DEFAULT_ADDRESS else ["--address", address]
    access = " --ca CA.pem" if config.tls_certificate is not None else ""
    access += " --token-file TOKEN" if config.token_file is not None else ""
    program = _program() + access
    if is_language_bundle(config.bundle):
        return f'{program} generate "The capital of France is" {shlex.join(option)}'.rstrip()
    kind, budget = _suggest_call(config, address)
    return f"{program} predict {_example_images(config.bundle) or kind} " + shlex.join(
        ["--budget", budget, *option]
    )


def _program() -> str:
    """Return how this program was started, the shortest form that works in this folder."""
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return shlex.join([sys.executable, "-m", "ladderstitch"])
    found = shutil.which(started.name)
    on_path = found is not None and Path(found).resolve() == started.resolve()
    return shlex.quote(started.name if on_path else str(started))


def _example_images(bundle: Path) -> str:
    """Return a pattern of the example images of a bundle; empty if it has none."""
    if bundle == EMBEDDED and EXAMPLE_IMAGES.is_dir():
        return f"{EXAMPLE_IMAGES}/*.png"
    folder = bundle / "examples"
    return f"{shlex.quote(str(folder))}/*.png" if any(folder.glob("*.png")) else ""


def _suggest_call(config: ServerConfig, address: str) -> tuple[str, str]:
    """Return a name of an input, and a budget that this machine keeps with the best variant.

    Without an answer, e.g. because only callers with credentials get one, it is 100 ms: a server
    that has started does not end because of a hint.
    """
    from ladderstitch.client import Client, RequestFailed

    if config.tls_certificate is not None or config.token_file is not None:
        return "IMAGE.png", UNKNOWN_BUDGET
    try:
        with Client(address, timeout_s=HINT_TIMEOUT_S) as client:
            model = client.get_model()
    except RequestFailed:
        return "IMAGE.png", UNKNOWN_BUDGET
    planned_us = {v.id: v.planned_latency_us for v in model.variants if v.id in model.frontier}
    budget = f"{math.ceil(2 * max(planned_us.values()) / 1e3 + AROUND_COMPUTE_MS)}ms"
    return "IMAGE.png" if model.HasField("preprocessing") else "INPUTS.npy", budget


def rank(
    address: Annotated[str, typer.Argument(help="HOST:PORT, the server's `rank_address`.")],
    secret_file: Annotated[
        Path, typer.Option(help="File with the secret; the server's `rank_secret_file`.")
    ],
) -> None:
    """Run one rank for a server on another machine.

    A rank holds its share of a tensor-parallel model. The command exits when the server
    disconnects.
    """
    from ladderstitch.text.engine.rank import run

    with user_errors():
        try:
            run(address, secret_file.read_text().strip())
        except OSError as error:
            raise ConfigError(f"rank: {error}") from error
