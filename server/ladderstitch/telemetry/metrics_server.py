"""The HTTP server of the metrics port: the page for Prometheus, and two for probes."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, disable_created_metrics, make_wsgi_app

from ladderstitch.addresses import join_address, strip_brackets
from ladderstitch.runtime.process import address_family

POLL_S = 0.1
"""Interval at which the server checks whether it has to stop."""
MAX_CONNECTIONS = 32
"""Maximum number of open connections; the oldest one is closed for a further one."""
CONNECTION_TIMEOUT_S = 30.0
"""Seconds in which a connection must send its request and read the response."""
PAGE_METHODS = ("GET", "HEAD")
Page = Callable[[dict[str, Any], Callable[..., Any]], Any]
"""A WSGI application that answers one path."""

if "PROMETHEUS_DISABLE_CREATED_SERIES" not in os.environ:
    # They are a quarter of a page, and Prometheus does not need them.
    disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Probes:
    """What `/healthz` and `/readyz` report; each returns why not, or nothing if all is well.

    They are called in threads of the server.
    """

    alive: Callable[[], str] = lambda: ""
    ready: Callable[[], str] = lambda: ""


def metrics_pages(
    registry: CollectorRegistry, probes: Probes, more: Mapping[str, Page] | None = None
) -> Page:
    """Return the application of `/metrics`, `/healthz`, `/readyz` and the pages in `more`.

    Probes get 200, or 503 with the reason. Any other path is 404, any other method 405.
    """
    pages: dict[str, Page] = {
        "/metrics": make_wsgi_app(registry),
        "/healthz": _probe_page(probes.alive),
        "/readyz": _probe_page(probes.ready),
        **(more or {}),
    }

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        page = pages.get(environ["PATH_INFO"].rstrip("/"))
        if page is None:
            text = f"expected one of {', '.join(pages)}"
            return _send_text(start_response, "404 Not Found", text)
        if environ["REQUEST_METHOD"] not in PAGE_METHODS:
            allow = ("Allow", ", ".join(PAGE_METHODS))
            return _send_text(start_response, "405 Method Not Allowed", "expected GET", allow)
        body = page(environ | {"REQUEST_METHOD": "GET"}, start_response)
        return body if environ["REQUEST_METHOD"] == "GET" else []

    return application


def _probe_page(probe: Callable[[], str]) -> Page:
    def page(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if reason := probe():
            return _send_text(start_response, "503 Service Unavailable", reason)
        return _send_text(start_response, "200 OK", "ok")

    return page


def _send_text(
    start_response: Callable[..., Any], status: str, text: str, *headers: tuple[str, str]
) -> list[bytes]:
    body = f"{text}\n".encode()
    length = ("Content-Length", str(len(body)))
    start_response(status, [("Content-Type", "text/plain; charset=utf-8"), length, *headers])
    return [body]


def expose(
    application: Any, port: int, address: str, *, share_port: bool = False
) -> tuple[int, Callable[[], None]]:
    """Serve a WSGI application; return the bound port and a function that stops the server.

    Port 0 binds a free port. With `share_port` a rolling replacement may listen on the same port
    as its predecessor for a while. Raises `OSError` if the port is taken.
    """
    server_class: type[_ThreadingServer] = _SharedPortServer if share_port else _ThreadingServer
    try:
        family = address_family(address)
        server_class = type("_Server", (server_class,), {"address_family": family})
        host = strip_brackets(address)
        server = make_server(host, port, application, server_class, handler_class=_QuietHandler)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot listen on {join_address(address, port)}: {reason}") from error
    thread = threading.Thread(
        target=server.serve_forever, args=(POLL_S,), name="metrics", daemon=True
    )
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, close


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    """A server that answers one request a connection, and closes those that last too long."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._opened: dict[Any, float] = {}
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection; the oldest one above the maximum is closed."""
        with self._lock:
            self._opened[request] = time.monotonic()
            if len(self._opened) > MAX_CONNECTIONS:
                _end_connection(next(iter(self._opened)))
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._opened.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End the connections whose time is up."""
        until = time.monotonic() - CONNECTION_TIMEOUT_S
        with self._lock:
            for request in [found for found, at in self._opened.items() if at <= until]:
                _end_connection(request)


def _end_connection(request: Any) -> None:
    """End a connection, so that the thread that reads or writes it closes it."""
    with contextlib.suppress(OSError):  # the client may have closed it
        request.shutdown(socket.SHUT_RDWR)


class _SharedPortServer(_ThreadingServer):
    allow_reuse_port = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Suppress access logs."""
