"""Where the replicas are: addresses that were named, or whatever a DNS name stands for."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ladderstitch.gateway.config import DNS

log = logging.getLogger(__name__)

LOOK_UP_S = 2.0

Discovery = AsyncIterator[frozenset[str]]
"""All addresses (HOST:PORT), at once and whenever they have changed."""


async def named(replicas: Sequence[str]) -> Discovery:
    """`HOST:PORT` as it is, `dns:HOST:PORT` looked up every two seconds; errors change nothing."""
    fixed = frozenset(replica for replica in replicas if not replica.startswith(DNS))
    names = [replica.removeprefix(DNS) for replica in replicas if replica.startswith(DNS)]
    found: dict[str, frozenset[str]] = dict.fromkeys(names, frozenset())
    told: frozenset[str] | None = None
    while True:
        for name in names:
            found[name] = await _look_up(name, found[name])
        addresses = fixed.union(*found.values())
        if addresses != told:
            told = addresses
            yield addresses
        if not names:
            return
        await asyncio.sleep(LOOK_UP_S)


async def _look_up(name: str, before: frozenset[str]) -> frozenset[str]:
    host, _, port = name.rpartition(":")
    loop = asyncio.get_running_loop()
    try:
        entries = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if before:
            log.warning("%s: %s; the %d known replicas stay", name, error.strerror, len(before))
        return before
    return frozenset(_address(family, sockaddr) for family, *_, sockaddr in entries)


def _address(family: int, sockaddr: tuple[Any, ...]) -> str:
    host, port = sockaddr[:2]
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
