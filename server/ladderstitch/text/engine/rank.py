"""A rank: the process that holds one shard of a language model and runs its forward passes.

A rank is started as `python -m ladderstitch.text.engine.rank ADDRESS` on the group's machine, and
reads the group's secret from its standard input. On another machine, an operator starts it with
`ladderstitch rank`. It exits when the group disconnects.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys

from ladderstitch.addresses import split_address
from ladderstitch.text.comm.base import PeerLost
from ladderstitch.text.engine.rank_config import Assignment, CommInit
from ladderstitch.text.engine.rank_engine import RankEngine
from ladderstitch.text.messages import Kind, Message, receive_message, send_message

log = logging.getLogger(__name__)

SECRET_VARIABLE = "LADDERSTITCH_RANK_SECRET"
"""Environment variable for the secret of a rank that is started by hand."""
CONNECT_TIMEOUT_S = 20.0
MAX_ERROR_CHARACTERS = 4096


def serve(group: socket.socket, listener: socket.socket) -> None:
    """Answer the group's messages until it closes the socket.

    An error is reported to the group and does not end the rank.
    """
    rank: RankEngine | None = None
    while True:
        try:
            message = receive_message(group)
        except (EOFError, OSError):
            return
        try:
            if message.kind == Kind.PING:
                reply = Message(Kind.READY)
            elif message.kind == Kind.LOAD_MODEL:
                rank = RankEngine(Assignment.model_validate(message.header))
                reply = Message(Kind.MODEL_LOADED, rank.load_stats)
            elif rank is None:
                reply = Message(Kind.FAILED, {"error": "expected LOAD_MODEL first"})
            elif message.kind == Kind.INIT_COMM:
                rank.init_comm(CommInit.model_validate(message.header).spec, listener)
                reply = Message(Kind.READY)
            else:
                reply = rank.forward(message)
        except Exception as error:
            reply = _failure(error)
            if rank is not None:
                rank.leave_group()
        try:
            send_message(group, reply)
        except OSError:
            return


def _failure(error: Exception) -> Message:
    reason = f"{type(error).__name__}: {error}"
    log.warning("request failed: %s", reason)
    header = {"error": reason[:MAX_ERROR_CHARACTERS], "peer_lost": isinstance(error, PeerLost)}
    return Message(Kind.FAILED, header)


def connect(address: str) -> socket.socket:
    """Return a connection to a group's address, `unix:PATH` or `HOST:PORT`.

    Raises `OSError` if the group cannot be reached.
    """
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address.removeprefix("unix:"))
        return connection
    connection = socket.create_connection(split_address(address), timeout=CONNECT_TIMEOUT_S)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _listen_beside(group: socket.socket) -> socket.socket:
    """Return a listener for other ranks, on the address that leads to the group, or on loopback."""
    if group.family == socket.AF_UNIX:
        return socket.create_server(("127.0.0.1", 0))
    return socket.create_server((group.getsockname()[0], 0), family=group.family)


def run(address: str, secret: str) -> None:
    """Run as a rank of the group at an address until the group disconnects.

    Raises `OSError` if the group cannot be reached.
    """
    with connect(address) as group, _listen_beside(group) as listener:
        registration = {
            "secret": secret,
            "pid": os.getpid(),
            "comm_address": listener.getsockname()[:2],
        }
        send_message(group, Message(Kind.REGISTER, registration))
        serve(group, listener)


def main() -> None:
    """Run as a rank of the group at the address in the first argument.

    Without `SECRET_VARIABLE`, the secret is read from standard input.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the group drains and disconnects
    secret = os.environ.pop(SECRET_VARIABLE, None)
    run(sys.argv[1], sys.stdin.read().strip() if secret is None else secret)


if __name__ == "__main__":
    main()
