"""A TCP proxy that delays every byte, which benchmarks use as a slow link."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Sequence
from statistics import median

Address = tuple[str, int]
CHUNK_BYTES = 1 << 18


class DelayProxy:
    """A TCP proxy in front of each address given to `route`, with one delay for all."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self._delays: list[float] = []
        self._sockets: list[socket.socket] = []

    def route(self, addresses: Sequence[Address]) -> list[Address]:
        """Return the addresses to connect to instead."""
        return [self._listen(address) for address in addresses]

    @property
    def delay_median_s(self) -> float:
        """The measured median time from receiving to forwarding a chunk, seconds."""
        return median(self._delays) if self._delays else 0.0

    def close(self) -> None:
        """Close all sockets."""
        for each in self._sockets:
            each.close()

    def _listen(self, to: Address) -> Address:
        listener = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(listener)
        threading.Thread(target=self._accept, args=(listener, to), daemon=True).start()
        address: Address = listener.getsockname()
        return address

    def _accept(self, listener: socket.socket, to: Address) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(to)
            except OSError:
                return  # the proxy is closed
            self._sockets += (near, far)
            for source, sink in ((near, far), (far, near)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                chunks: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                for work in ((self._receive, source, chunks), (self._send, sink, chunks)):
                    threading.Thread(target=work[0], args=work[1:], daemon=True).start()

    @staticmethod
    def _receive(source: socket.socket, chunks: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        chunk = b"more"
        while chunk:
            try:
                chunk = source.recv(CHUNK_BYTES)
            except OSError:
                chunk = b""
            chunks.put((time.perf_counter(), chunk))

    def _send(self, sink: socket.socket, chunks: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        while True:
            received, chunk = chunks.get()
            time.sleep(max(0.0, received + self.delay_s - time.perf_counter()))
            try:
                sink.sendall(chunk)
                if not chunk:
                    sink.shutdown(socket.SHUT_WR)
            except OSError:
                return
            if not chunk:
                return
            self._delays.append(time.perf_counter() - received)
