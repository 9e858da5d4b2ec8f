"""Ports of a server: a taken one is reported before the slow start."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ladderstitch.addresses import join_address
from ladderstitch.config import ServerConfig
from ladderstitch.errors import ConfigError
from ladderstitch.runtime.process import free_port, release_ports, reserve_port

if TYPE_CHECKING:
    pass  # imported late: the help page needs none


def reserve_ports(config: ServerConfig) -> list[socket.socket]:
    """Return sockets that reserve all ports; raises `ConfigError` that names all taken ones."""
    reserved: list[socket.socket] = []
    taken: dict[str, str] = {}
    for field, host in config.port_fields():
        number = getattr(config, field)
        if number is None or (field == "metrics_port" and config.replicas > 1):
            continue  # gateways take over the port of metrics from each other, and do not share it
        try:
            reserved += reserve_port(host, number)
        except OSError as error:
            address = join_address(host, number)
            if error.errno != errno.EADDRINUSE:
                release_ports(reserved)
                raise ConfigError(
                    f"{field}: cannot listen on {address}: {error.strerror}"
                ) from error
            taken[field] = address
    if taken:
        release_ports(reserved)
        raise ConfigError(_describe_taken(taken))
    return reserved


def _describe_taken(taken: Mapping[str, str]) -> str:
    """Return an error for the addresses of fields whose ports are taken, and what to do."""
    found = "; ".join(
        f"{field}: expected a free port, got {address}, which is taken"
        for field, address in taken.items()
    )
    options = " ".join(f"--{field.replace('_', '-')} 0" for field in taken)
    return f"{found}. Another server may run already; {options} picks free ports for this one"


def choose_ports(config: ServerConfig) -> ServerConfig:
    """Return a configuration with free ports instead of 0, so that a restart keeps them."""
    ports: dict[str, int] = {}
    for field, host in config.port_fields():
        while getattr(config, field) == 0 and (
            field not in ports or list(ports.values()).count(ports[field]) > 1
        ):
            ports[field] = free_port(host)
    return config.model_copy(update=ports)
