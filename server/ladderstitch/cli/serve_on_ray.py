"""A server on Ray Serve, from its start to its end."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from ladderstitch.addresses import join_address
from ladderstitch.cli.console import err
from ladderstitch.cli.lifecycle import (
    Interrupt,
    InterruptingSignals,
    exit_now,
)
from ladderstitch.config import ServerConfig
from ladderstitch.runtime.process import free_port

if TYPE_CHECKING:
    pass  # imported late: the help page needs none
from ladderstitch.cli.ready_line import print_ready

CLUSTER_CHECK_S = 0.5
"""Period of the check whether Ray's processes run."""
GATEWAY_PORTS = ("port", "metrics_port", "http_port")
"""Fields of the ports that all gateways of one machine share."""


def check_before_start(config: ServerConfig) -> None:
    """Raise now the `UserError` that a process of Ray would raise seconds later."""
    from ladderstitch.api.listener import ListenerConfig
    from ladderstitch.hosting.model_manager import make_runner
    from ladderstitch.hosting.registry import ModelRegistry
    from ladderstitch.telemetry.metrics import Metrics
    from ladderstitch.text.engine.rank_handle import launch_process

    make_runner(config, ModelRegistry("check"), Metrics(), launch_process)
    ListenerConfig.from_config(config, lambda reason: None)


def serve_on_ray(config: ServerConfig, started: float) -> None:
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
                print_ready(config, port, metrics_port, config.http_port, started)
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
