"""The link of ranks on several machines: eager TCP, without a helper thread.

A post sends what the sockets take at once, a wait sends the rest while it receives; so the bytes
fly while the rank computes, and two ranks that send much at once cannot block each other.
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

from ladderstitch.text.comm.base import PeerLost, Work, sum_in_rank_order

HEADER = struct.Struct("<qq")
"""Number of the reduction, bytes that follow."""

HELLO = struct.Struct("<q32s")
"""Rank of the one who connects, and the group's secret."""

CONNECT_S = 20.0
GIVE_UP_S = 60.0


class _Peer:
    """One connection: what is still to be sent, and the messages that came."""

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
        """Send what the socket takes."""
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
        """Take what has come; raises `PeerLost` at the end of the connection."""
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
    """One rank's end of a full mesh."""

    def __init__(
        self,
        listener: socket.socket,
        rank: int,
        addresses: Sequence[tuple[str, int]],
        secret: bytes,
    ) -> None:
        """Connect to the lower ranks and be connected to by the higher ones.

        `addresses` are all ranks' listening sockets, in order, this rank's own included. Raises
        `PeerLost` if that takes longer than `CONNECT_S`.
        """
        self.rank, self.ranks = rank, len(addresses)
        self._posted = 0
        self._peers: dict[int, _Peer] = {}
        try:
            for peer in range(rank):
                connection = socket.create_connection(addresses[peer], CONNECT_S)
                connection.sendall(HELLO.pack(rank, secret))
                self._peers[peer] = _Peer(connection)
            listener.settimeout(CONNECT_S)
            while len(self._peers) < self.ranks - 1:
                self._accept(listener, secret)
        except OSError as error:
            raise PeerLost(f"cannot connect the ranks: {error}") from error

    def post(self, partial: Tensor) -> Work:
        self._posted += 1
        payload = partial.contiguous()
        body = memoryview(payload.view(-1).view(torch.uint8).numpy().data)
        header = memoryview(HEADER.pack(self._posted, len(body)))
        try:
            for peer in self._peers.values():
                peer.outgoing += (header, body)
                peer.send()
        except OSError as error:
            raise PeerLost(f"a peer is gone: {error}") from error
        return self._posted, partial

    def wait(self, ticket: Work) -> Tensor:
        number, partial = ticket
        missing = {r for r, peer in self._peers.items() if number not in peer.arrived}
        patience = time.monotonic() + GIVE_UP_S
        while missing or any(peer.outgoing for peer in self._peers.values()):
            self._move(patience)
            missing = {rank for rank in missing if number not in self._peers[rank].arrived}
        return sum_in_rank_order([self._part(rank, number, partial) for rank in range(self.ranks)])

    def close(self) -> None:
        for peer in self._peers.values():
            peer.socket.close()

    def _move(self, patience: float) -> None:
        sockets = {peer.socket: peer for peer in self._peers.values()}
        sending = [peer.socket for peer in self._peers.values() if peer.outgoing]
        try:
            readable, writable, _ = select.select(list(sockets), sending, [], 1.0)
            for connection in writable:
                sockets[connection].send()
            for connection in readable:
                sockets[connection].receive()
        except (OSError, ValueError) as error:  # ValueError: a socket closed under select
            raise PeerLost(f"a peer is gone: {error}") from error
        if time.monotonic() > patience:
            raise PeerLost(f"a peer has not answered for {GIVE_UP_S:.0f} s")

    def _part(self, rank: int, number: int, partial: Tensor) -> Tensor:
        if rank == self.rank:
            return partial
        body = self._peers[rank].arrived.pop(number)
        return torch.frombuffer(body, dtype=partial.dtype).view(partial.shape)

    def _accept(self, listener: socket.socket, secret: bytes) -> None:
        """Take one connection; whoever does not know the secret is sent away."""
        connection, _ = listener.accept()
        connection.settimeout(CONNECT_S)
        hello = connection.recv(HELLO.size, socket.MSG_WAITALL)
        if len(hello) == HELLO.size:
            peer, theirs = HELLO.unpack(hello)
            if theirs == secret and self.rank < peer < self.ranks:
                self._peers[peer] = _Peer(connection)
                return
        connection.close()
