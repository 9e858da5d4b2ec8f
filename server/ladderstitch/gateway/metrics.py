"""Prometheus metrics of a gateway, its probes, and HTTP discovery of the replicas' metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ladderstitch.gateway.replica_connection import ReplicaConnection
from ladderstitch.gateway.upstream_call import RequestAttempts
from ladderstitch.telemetry.metrics import SECONDS_BUCKETS
from ladderstitch.telemetry.metrics_server import Probes, expose, metrics_pages
from ladderstitch.telemetry.process_metrics import ProcessCollector, define_build_info

ListReplicas = Callable[[], Iterable[ReplicaConnection]]


class GatewayMetrics:
    """The metrics of one gateway, in a registry of their own.

    An attribute has the name of its metric without the prefix `ladderstitch_gateway_`. Labels are
    bounded: `method` is a forwarded method, and `code` is the name of a gRPC status.
    """

    def __init__(self, list_replicas: ListReplicas = tuple) -> None:
        """Register the metrics; `list_replicas` returns the current replicas."""
        self._list_replicas = list_replicas
        self.other_endpoints: frozenset[str] = frozenset()
        """HOST:PORT of the metrics of other gateways, for `/sd`; set by the deployment."""
        self.registry = CollectorRegistry()
        self.build_info = define_build_info(self.registry)
        self._counts_processes = False
        namespace = "ladderstitch_gateway"
        counter = partial(Counter, registry=self.registry, namespace=namespace)
        self.requests = counter("requests", "Calls ended, by status.", ["method", "code"])
        self.retries = counter("retries", "Attempts after the first.", ["method"])
        self.request_duration_seconds = Histogram(
            "request_duration_seconds",
            "Arrival at the gateway to end of a call.",
            ["method"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
            namespace=namespace,
        )
        self.denied_calls = counter(
            "denied_calls", "Calls denied for their token, its scope or its limits.", ["reason"]
        )
        self.buffered_bytes = Gauge(
            "buffered_bytes",
            "Bytes of requests held until their calls end.",
            registry=self.registry,
            namespace=namespace,
        )
        self.replicas = Gauge(
            "replicas",
            "Replicas, by whether they serve.",
            ["state"],
            registry=self.registry,
            namespace=namespace,
        )
        self.replicas.labels("serving").set_function(partial(self._count, True))
        self.replicas.labels("not_serving").set_function(partial(self._count, False))

    def observe_call(self, method: str, code: str, attempts: RequestAttempts) -> None:
        """Count a call that ended; the code is CANCELLED if the caller disconnected."""
        self.requests.labels(method, code).inc()
        self.request_duration_seconds.labels(method).observe(attempts.elapsed_s)
        if attempts.count > 1:
            self.retries.labels(method).inc(attempts.count - 1)

    def observe_denial(self, reason: str) -> None:
        """Count a call that was denied before it was forwarded."""
        self.denied_calls.labels(reason).inc()

    def expose(
        self, port: int, address: str, probes: Probes | None = None
    ) -> tuple[int, Callable[[], None]]:
        """Serve `/metrics`, `/sd` and probes; return the bound port and a function to stop it."""
        if not self._counts_processes:
            self.registry.register(ProcessCollector(main="gateway"))
            self._counts_processes = True
        pages = metrics_pages(self.registry, probes or Probes(), {"/sd": self._discovery_page})
        return expose(pages, port, address)

    def _discovery_page(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("200 OK", [("Content-Type", "application/json")])
        targets = scrape_targets(self._list_replicas(), self.other_endpoints)
        return [json.dumps(targets).encode()]

    def _count(self, serving: bool) -> float:
        return float(sum(replica.serving == serving for replica in self._list_replicas()))


def scrape_targets(
    replicas: Iterable[ReplicaConnection], gateways: Iterable[str]
) -> list[dict[str, Any]]:
    """Return the metrics endpoints of reachable replicas and of other gateways.

    The format is that of Prometheus' HTTP service discovery.
    """
    targets = [
        {
            "targets": [f"{replica.address.rpartition(':')[0]}:{replica.state.metrics_port}"],
            "labels": {"replica": replica.state.replica},
        }
        for replica in replicas
        if replica.state is not None
    ]
    return targets + [{"targets": [endpoint], "labels": {}} for endpoint in sorted(gateways)]
