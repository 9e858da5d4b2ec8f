"""The HTTP server of the pages that Prometheus reads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

POLL_S = 0.1
"""Interval at which the server checks whether it has to stop."""


def expose(
    application: Any, port: int, address: str, *, share_port: bool = False
) -> tuple[int, Callable[[], None]]:
    """Serve a WSGI application; return the bound port and a function that stops the server.

    Port 0 binds a free port. With `share_port` a rolling replacement may listen on the same port
    as its predecessor for a while. Raises `OSError` if the port is taken.
    """
    server_class = _SharedPortServer if share_port else _ThreadingServer
    server = make_server(address, port, application, server_class, handler_class=_QuietHandler)
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
    daemon_threads = True


class _SharedPortServer(_ThreadingServer):
    allow_reuse_port = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Suppress access logs."""
