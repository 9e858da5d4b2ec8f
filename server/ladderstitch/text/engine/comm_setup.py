"""How the ranks of a group reach each other: what is wanted, and what each time comes of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ladderstitch.text.comm.shared_memory import SharedRegion
from ladderstitch.text.comm.specs import (
    LinkChoice,
    LinkKind,
    LinkSpec,
    NcclSpec,
    SharedMemorySpec,
    SingleSpec,
    SymmetricSpec,
    TcpSpec,
)
from ladderstitch.text.engine.rank_config import ModelJob

Address = tuple[str, int]


class Region(Protocol):
    """Memory of a group, made by whoever watches over it."""

    def abort(self) -> None:
        """Make every `wait` of the group raise `LinkBroken`, now and later."""

    def forget(self) -> None:
        """Remove its name; the memory goes with its last user."""


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """How ranks reach each other and how many stand by."""

    link: LinkChoice = "auto"
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    spares: int = 0
    listen: str = ""
    """HOST:PORT at which ranks of other machines connect; unset: a socket file of this one."""
    secret: str = ""
    """What ranks that others start must know; unset: a random one."""


def link_kind(job: ModelJob, options: GroupOptions) -> LinkKind:
    """What `auto` means for this job."""
    if options.link != "auto":
        return options.link
    return "shared_memory" if job.device == "cpu" else "nccl"


def mendable(job: ModelJob, options: GroupOptions) -> bool:
    """Whether survivors may join a new link; NCCL's communicators are lost with a rank."""
    kind = link_kind(job, options)
    return kind != "nccl" and not (kind == "symmetric" and job.device != "cpu")


ArrangeLink = Callable[
    ["ModelJob", "GroupOptions", Sequence[Address]], tuple[LinkSpec, Region | None]
]
"""Makes the link of a group anew, as `arrange_link` does."""


def arrange_link(
    job: ModelJob, options: GroupOptions, listening: Sequence[Address]
) -> tuple[LinkSpec, Region | None]:
    """A new link between ranks that listen at these addresses, and its memory if it has any."""
    if job.ranks == 1:
        return SingleSpec(), None
    kind = link_kind(job, options)
    if kind == "tcp":
        return TcpSpec(addresses=tuple(listening), secret=secrets.token_hex(16)), None
    if kind == "nccl":
        return NcclSpec(store=listening[0]), None
    if kind == "symmetric":
        from ladderstitch.text.comm.symmetric import SymmetricRegion

        folder = SymmetricRegion()
        return SymmetricSpec(path=folder.path, store=listening[0]), folder
    region = SharedRegion(job.ranks, job.message_bytes)
    spec = SharedMemorySpec(
        path=region.path,
        slot_bytes=region.slot_bytes,
        latency_s=options.latency_s,
        bytes_per_s=options.bytes_per_s,
    )
    return spec, region
