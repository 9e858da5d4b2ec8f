"""Addresses HOST:PORT: the default one, and how they are taken apart and put together."""

from __future__ import annotations

import ipaddress

DEFAULT_ADDRESS = "127.0.0.1:8001"
"""The gRPC address that a server has, and that clients call, unless another one is given."""
MAX_PORT = 65_535


def strip_brackets(host: str) -> str:
    """Return a host without the brackets around an IPv6 address; others are returned unchanged."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT; an IPv6 address is put in brackets."""
    host = strip_brackets(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; the host has no brackets.

    Raises `ValueError` without a port from 0 to 65,535, and for an IPv6 address without brackets,
    whose last group could be taken for a port.
    """
    host, _, port = address.rpartition(":")
    bare = strip_brackets(host)
    if not bare or not (port.isascii() and port.isdigit()) or int(port) > MAX_PORT:
        raise ValueError(f"expected HOST:PORT, got {address[:200]!r}")
    if ":" in host and bare == host:
        raise ValueError(
            f"expected HOST:PORT with an IPv6 address in brackets, such as [::1]:8001, got "
            f"{address[:200]!r}"
        )
    return bare, int(port)


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach an address; of names, only for `localhost`."""
    try:
        return address == "localhost" or ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False
