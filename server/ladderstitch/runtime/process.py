"""Memory settings of a long-lived process, its ports, and the state of other processes."""

from __future__ import annotations

import ctypes
import errno
import gc
import random
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

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


def trim_heap() -> None:
    """Return freed memory to the operating system; other C libraries than glibc may keep it."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


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


def is_stopped(pid: int) -> bool:
    """Return whether a process is stopped, e.g. by SIGSTOP; False on other systems than Linux."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in "Tt"


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
    """Return whether a server can listen on the port of an address or a name; 0 is always free."""
    try:
        release_ports(reserve_port(address, port))
    except OSError:
        return False
    return True


def reserve_port(address: str, port: int) -> list[socket.socket]:
    """Return sockets that keep other servers from a port, until `release_ports`; none for port 0.

    gRPC servers share their port (SO_REUSEPORT), and sockets that share a port do not exclude each
    other. These sockets do not listen. They exclude each other, because each is bound before it
    allows sharing, and servers of this user that share the port can be bound next to them. Raises
    `OSError` if another socket is bound to an address that overlaps, or if the address is not one
    of this machine. Systems other than Linux check only.
    """
    if port == 0:
        return []
    held: list[socket.socket] = []
    try:
        with _port_mutex(port):
            for family, target in _resolve(address, port):
                held.append(_bind_exclusively(family, target))
    except OSError:
        release_ports(held)
        raise
    if sys.platform != "linux":
        release_ports(held)
        return []
    return held


def release_ports(held: list[socket.socket]) -> None:
    """Release the ports that `reserve_port` has reserved."""
    for each in held:
        each.close()


def _resolve(address: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Return the socket addresses of an address or name; raises `OSError` if there is none."""
    host = address.removeprefix("[").removesuffix("]")
    flags = socket.AI_PASSIVE
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    usable: list[tuple[socket.AddressFamily, Any]] = [
        (family, target) for family, *_, target in found if _is_local(family, target)
    ]
    return usable or [(found[0][0], found[0][4])]


def address_family(address: str) -> socket.AddressFamily:
    """Return the family of the first socket address that an address or a name stands for.

    Raises `OSError` if the name stands for none.
    """
    return _resolve(address, 0)[0][0]


def _is_local(family: socket.AddressFamily, target: Any) -> bool:
    """Return whether this machine has the address; `localhost` may stand for ::1 without IPv6."""
    try:
        with socket.socket(family) as probe:
            probe.bind((target[0], 0, *target[2:]))
    except OSError:
        return False
    return True


def _bind_exclusively(family: socket.AddressFamily, target: Any) -> socket.socket:
    """Return a socket bound to an address that no other socket uses.

    SO_REUSEADDR ignores connections that have ended. It is reset, because two sockets with it that
    do not listen would share the address.
    """
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(target)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        if sys.platform == "linux":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        bound.close()
        raise
    return bound


MUTEX_TIMEOUT_S = 5.0


@contextmanager
def _port_mutex(port: int) -> Iterator[None]:
    """Let one process at a time reserve a port, which takes less than a millisecond."""
    if sys.platform != "linux":
        yield
        return
    deadline = time.monotonic() + MUTEX_TIMEOUT_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as lock:
        while True:
            try:
                lock.bind(f"\0ladderstitch port {port}")
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        yield
