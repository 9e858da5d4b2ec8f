"""How the ranks of a group reach each other: what is wanted, and what each time comes of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ladderstitch.language.job import (
    LinkSpec,
    ModelJob,
    NcclSpec,
    SharedMemorySpec,
    SingleSpec,
    TcpSpec,
)
from ladderstitch.language.links.shared_memory import SharedRegion

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """How ranks reach each other and how many stand by."""

    link: Literal["auto", "shared_memory", "tcp", "nccl"] = "auto"
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    spares: int = 0
    listen: str = ""
    """HOST:PORT at which ranks of other machines connect; unset: a socket file of this one."""
    secret: str = ""
    """What ranks that others start must know; unset: a random one."""
    route: Callable[[Sequence[Address]], Sequence[Address]] = tuple
    """Where the TCP link reaches ranks that listen at these addresses."""


LinkKind = Literal["shared_memory", "tcp", "nccl"]


def link_kind(job: ModelJob, options: GroupOptions) -> LinkKind:
    """What `auto` means for this job."""
    if options.link != "auto":
        return options.link
    return "shared_memory" if job.device == "cpu" else "nccl"


def arrange_link(
    job: ModelJob, options: GroupOptions, listening: Sequence[Address]
) -> tuple[LinkSpec, SharedRegion | None]:
    """A new link between ranks that listen at these addresses, and its memory if it has any."""
    if job.ranks == 1:
        return SingleSpec(), None
    kind = link_kind(job, options)
    if kind == "tcp":
        addresses = tuple(options.route(listening))
        return TcpSpec(addresses=addresses, secret=secrets.token_hex(16)), None
    if kind == "nccl":
        return NcclSpec(store=listening[0]), None
    region = SharedRegion(job.ranks, job.message_bytes)
    spec = SharedMemorySpec(
        path=region.path,
        slot_bytes=region.slot_bytes,
        latency_s=options.latency_s,
        bytes_per_s=options.bytes_per_s,
    )
    return spec, region
