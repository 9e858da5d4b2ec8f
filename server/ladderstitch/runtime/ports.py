"""Free TCP ports of this machine."""

from __future__ import annotations

import random
import socket
from itertools import chain

FIRST_PORT, END_PORT = 20_000, 32_000
"""Below those that Linux gives to outgoing connections."""


def free_port(address: str) -> int:
    """One that nobody has, and no outgoing connection will take: it can be had again later.

    Raises `OSError` if there is none.
    """
    start = random.randrange(FIRST_PORT, END_PORT)
    for port in chain(range(start, END_PORT), range(FIRST_PORT, start)):
        if port_is_free(address, port):
            return port
    raise OSError(f"no port of {address} from {FIRST_PORT} to {END_PORT} is free")


def port_is_free(address: str, port: int) -> bool:
    """Whether nobody listens there; gRPC itself would share a port with another process."""
    if port == 0:
        return True
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
