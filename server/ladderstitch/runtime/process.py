"""How a long-lived process keeps its memory: what it gives back, what it never looks at again."""

from __future__ import annotations

import ctypes
import gc
import random
import socket
import sys
from itertools import chain

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MIB = 1 << 20


def return_freed_memory() -> None:
    """Fix glibc's thresholds, which otherwise rise with the largest block ever freed.

    After one picture of 50 megapixels the heap would keep hundreds of MiB for good. Other C
    libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MIB)
        libc.mallopt(M_TRIM_THRESHOLD, 4 * MIB)
        libc.mallopt(M_ARENA_MAX, 2)


def settle_for_good() -> None:
    """Spare the garbage collector all that is there now, once everything is loaded.

    Some 200,000 objects of libraries take 70 ms to look through, while nobody is answered.
    """
    gc.collect()
    gc.freeze()


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
