"""The communicator of ranks on several machines: eager TCP, without a helper thread.

`all_reduce_async` sends the bytes that the sockets accept without blocking; `wait` sends the rest
while it receives. Most bytes therefore travel while the rank computes, and two ranks that send
large partials at the same time cannot block each other.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ladderstitch.text.comm.base import PEER_TIMEOUT_S, PeerLost, Work, sum_in_rank_order

HEADER = struct.Struct("<qq")
"""The number of the reduction, and the number of bytes that follow."""

HANDSHAKE = struct.Struct("<q32s")
"""The rank that connects, and the group's secret."""

CONNECT_TIMEOUT_S = 20.0


class _Peer:
    """The connection to one peer, with its unsent bytes and its received messages."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self.socket = connection
        self.outgoing: deque[memoryview] = deque()
        self.arrived: dict[int, bytearray] = {}
        self._header = bytearray(HEADER.size)
        self._into = memoryview(self._header)
        self._number: int | None = None
        self._body = bytearray()

    def send(self) -> None:
        """Send as many bytes as the socket accepts without blocking."""
        while self.outgoing:
            try:
                sent = self.socket.send(self.outgoing[0])
            except BlockingIOError:
                return
            if sent == len(self.outgoing[0]):
                self.outgoing.popleft()
            else:
                self.outgoing[0] = self.outgoing[0][sent:]

    def receive(self) -> None:
        """Read the bytes that have arrived; raises `PeerLost` if the connection has ended."""
        while True:
            try:
                got = self.socket.recv_into(self._into)
            except BlockingIOError:
                return
            if not got:
                raise PeerLost("a peer has closed its connection")
            self._into = self._into[got:]
            if not self._into:
                self._complete()

    def _complete(self) -> None:
        if self._number is None:
            self._number, size = HEADER.unpack(self._header)
            self._body = bytearray(size)
            self._into = memoryview(self._body)
        else:
            self.arrived[self._number] = self._body
            self._number, self._into = None, memoryview(self._header)


class TcpCommunicator:
    """One rank's end of a full mesh of TCP connections."""

    def __init__(
        self,
        listener: socket.socket,
        rank: int,
        addresses: Sequence[tuple[str, int]],
        secret: bytes,
    ) -> None:
        """Connect to all lower ranks and accept the connections of all higher ones.

        `addresses` are the listening sockets of all ranks, this one included, in the order of the
        ranks. Raises `PeerLost` if a connection takes longer than `CONNECT_TIMEOUT_S`.
        """
        self.rank, self.ranks = rank, len(addresses)
        self._started = 0
        self._peers: dict[int, _Peer] = {}
        try:
            for peer in range(rank):
                connection = socket.create_connection(addresses[peer], CONNECT_TIMEOUT_S)
                connection.sendall(HANDSHAKE.pack(rank, secret))
                self._peers[peer] = _Peer(connection)
            listener.settimeout(CONNECT_TIMEOUT_S)
            while len(self._peers) < self.ranks - 1:
                self._accept(listener, secret)
        except OSError as error:
            raise PeerLost(f"cannot connect the ranks: {error}") from error

    def all_reduce_async(self, partial: Tensor) -> Work:
        """Queue the partial for every peer and send what the sockets accept.

        Raises `PeerLost` if a connection has ended.
        """
        self._started += 1
        payload = partial.contiguous()
        body = memoryview(payload.view(-1).view(torch.uint8).numpy().data)
        header = memoryview(HEADER.pack(self._started, len(body)))
        try:
            for peer in self._peers.values():
                peer.outgoing += (header, body)
                peer.send()
        except OSError as error:
            raise PeerLost(f"a peer has disconnected: {error}") from error
        return self._started, partial

    def wait(self, work: Work) -> Tensor:
        """Return the sum; raises `PeerLost` if a peer disconnects, or after `PEER_TIMEOUT_S`."""
        number, partial = work
        missing = {r for r, peer in self._peers.items() if number not in peer.arrived}
        deadline = time.monotonic() + PEER_TIMEOUT_S
        while missing or any(peer.outgoing for peer in self._peers.values()):
            self._exchange_bytes(deadline)
            missing = {rank for rank in missing if number not in self._peers[rank].arrived}
        parts = [self._received(rank, number, partial) for rank in range(self.ranks)]
        return sum_in_rank_order(parts)

    def close(self) -> None:
        """Close all connections; peers that wait for this rank get `PeerLost`."""
        for peer in self._peers.values():
            peer.socket.close()

    def _exchange_bytes(self, deadline: float) -> None:
        sockets = {peer.socket: peer for peer in self._peers.values()}
        sending = [peer.socket for peer in self._peers.values() if peer.outgoing]
        try:
            readable, writable, _ = select.select(list(sockets), sending, [], 1.0)
            for connection in writable:
                sockets[connection].send()
            for connection in readable:
                sockets[connection].receive()
        except (OSError, ValueError) as error:  # ValueError: a socket closed under select
            raise PeerLost(f"a peer has disconnected: {error}") from error
        if time.monotonic() > deadline:
            raise PeerLost(f"a peer did not send its partial within {PEER_TIMEOUT_S:.0f} s")

    def _received(self, rank: int, number: int, partial: Tensor) -> Tensor:
        if rank == self.rank:
            return partial
        body = self._peers[rank].arrived.pop(number)
        return torch.frombuffer(body, dtype=partial.dtype).view(partial.shape)

    def _accept(self, listener: socket.socket, secret: bytes) -> None:
        """Accept one connection; close it if the handshake does not have the group's secret."""
        connection, _ = listener.accept()
        connection.settimeout(CONNECT_TIMEOUT_S)
        handshake = connection.recv(HANDSHAKE.size, socket.MSG_WAITALL)
        if len(handshake) == HANDSHAKE.size:
            peer, theirs = HANDSHAKE.unpack(handshake)
            if theirs == secret and self.rank < peer < self.ranks:
                self._peers[peer] = _Peer(connection)
                return
        connection.close()
