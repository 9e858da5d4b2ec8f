"""A small HTTP server for pages that Prometheus reads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

POLL_S = 0.1
"""How soon it notices that it is to stop."""


def expose(
    pages: Any, port: int, address: str, *, share_port: bool = False
) -> tuple[int, Callable[[], None]]:
    """Serve a WSGI application; the bound port (0 takes a free one) and a function that stops it.

    With `share_port` a rolling replacement may listen beside its predecessor for a while. Raises
    `OSError` if the port is taken.
    """
    kind = _SharedServer if share_port else _Server
    server = make_server(address, port, pages, kind, handler_class=_QuietHandler)
    thread = threading.Thread(
        target=server.serve_forever, args=(POLL_S,), name="metrics", daemon=True
    )
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, close


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _SharedServer(_Server):
    allow_reuse_port = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """A line a scrape would drown the log."""
