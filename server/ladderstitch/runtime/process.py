"""Memory settings of a long-lived process, and free ports."""

from __future__ import annotations

import ctypes
import gc
import random
import socket
import sys
from itertools import chain

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
MIB = 1 << 20


def tune_malloc() -> None:
    """Fix glibc's thresholds for returning freed memory to the operating system.

    Otherwise they rise with the largest block ever freed: after one image of 50 megapixels the heap
    would keep hundreds of MiB until the process ends. Other C libraries are not changed.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MIB)
        libc.mallopt(M_TRIM_THRESHOLD, 4 * MIB)
        libc.mallopt(M_ARENA_MAX, 2)


SWITCH_INTERVAL_S = 5e-5
"""Longest time that a thread with work waits for the interpreter's lock, instead of 5 ms."""


def shorten_lock_waits() -> None:
    """Let a thread that ends a batch continue soon, although the event loop is busy."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def freeze_gc() -> None:
    """Exclude all current objects from garbage collection; call it after everything is loaded.

    A full collection of the libraries' 200,000 objects takes 70 ms, during which no request is
    answered.
    """
    gc.collect()
    gc.freeze()


FIRST_PORT, END_PORT = 20_000, 32_000
"""Ports below the range that Linux uses for outgoing connections."""


def free_port(address: str) -> int:
    """Return a free port that no outgoing connection takes, so that it can be bound later.

    Raises `OSError` if no port of the range is free.
    """
    start = random.randrange(FIRST_PORT, END_PORT)
    for port in chain(range(start, END_PORT), range(FIRST_PORT, start)):
        if port_is_free(address, port):
            return port
    raise OSError(
        f"port: expected a free one on {address} from {FIRST_PORT} to {END_PORT - 1}, got none"
    )


def port_is_free(address: str, port: int) -> bool:
    """Return whether no process listens on the port of an IPv4 or IPv6 address; 0 is always free.

    The check is needed because gRPC itself would share a port with another process.
    """
    if port == 0:
        return True
    family, address = socket.AF_INET, address.strip("[]")
    if ":" in address:
        family = socket.AF_INET6
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
