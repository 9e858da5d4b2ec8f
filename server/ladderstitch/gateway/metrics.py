"""What Prometheus sees of a gateway, and where it finds the replicas' own pages (`/sd`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from ladderstitch.gateway.replica_connection import ReplicaConnection
from ladderstitch.gateway.upstream_call import RequestAttempts
from ladderstitch.telemetry.metrics import SECONDS
from ladderstitch.telemetry.metrics_server import expose

Links = Callable[[], Iterable[ReplicaConnection]]


class GatewayMetrics:
    """One registry; labels are bounded: `method` is one that is forwarded, `code` a gRPC status."""

    def __init__(self, links: Links = tuple) -> None:
        """`links` tells the replicas of the moment."""
        self._links = links
        self.other_pages: frozenset[str] = frozenset()
        """HOST:PORT of other gateways' pages, for `/sd`; who knows them sets it."""
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry, namespace="ladderstitch_gateway")
        gauge = partial(Gauge, registry=self.registry, namespace="ladderstitch_gateway")
        self.requests = counter("requests", "Calls ended, by status.", ["method", "code"])
        self.retries = counter("retries", "Attempts after the first.", ["method"])
        self.seconds = Histogram(
            "seconds",
            "Arrival to end of a call.",
            ["method"],
            buckets=SECONDS,
            registry=self.registry,
            namespace="ladderstitch_gateway",
        )
        self.denials = counter("denied_calls", "Calls refused by token or scope.", ["reason"])
        self.replicas = gauge("replicas", "Replicas, by whether they serve.", ["state"])
        for state, count in (("serving", self._serving), ("not_serving", self._not_serving)):
            self.replicas.labels(state).set_function(count)

    def ended(self, method: str, code: str, attempts: RequestAttempts) -> None:
        """A call ended; CANCELLED if the caller left."""
        self.requests.labels(method, code).inc()
        self.seconds.labels(method).observe(attempts.elapsed_s)
        if attempts.count > 1:
            self.retries.labels(method).inc(attempts.count - 1)

    def denied(self, reason: str) -> None:
        self.denials.labels(reason).inc()

    def expose(self, port: int, address: str) -> tuple[int, Callable[[], None]]:
        """Serve `/metrics` and `/sd`; the bound port and a function that stops it."""
        return expose(self._pages(), port, address)

    def _pages(self) -> Any:
        metrics = make_wsgi_app(self.registry)

        def pages(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            if environ["PATH_INFO"].rstrip("/") != "/sd":
                return metrics(environ, start_response)
            start_response("200 OK", [("Content-Type", "application/json")])
            found = targets(self._links(), self.other_pages)
            return [json.dumps(found).encode()]

        return pages

    def _serving(self) -> float:
        return float(sum(link.serving for link in self._links()))

    def _not_serving(self) -> float:
        return float(sum(not link.serving for link in self._links()))


def targets(links: Iterable[ReplicaConnection], gateways: Iterable[str]) -> list[dict[str, Any]]:
    """Metrics pages of replicas and other gateways, as Prometheus' HTTP discovery wants them."""
    replicas = [
        {
            "targets": [f"{link.address.rpartition(':')[0]}:{link.state.metrics_port}"],
            "labels": {"replica": link.state.replica},
        }
        for link in links
        if link.state is not None
    ]
    return replicas + [{"targets": [page], "labels": {}} for page in sorted(gateways)]
