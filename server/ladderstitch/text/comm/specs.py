"""How the ranks of a group reach each other, as data that a group sends to its ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

LinkKind = Literal["shared_memory", "tcp", "nccl", "symmetric"]
LinkChoice = Literal["auto", LinkKind]


class SharedMemorySpec(BaseModel):
    kind: Literal["shared_memory"] = "shared_memory"
    path: Path
    slot_bytes: int
    latency_s: float = 0.0
    bytes_per_s: float | None = None


class TcpSpec(BaseModel):
    kind: Literal["tcp"] = "tcp"
    addresses: tuple[tuple[str, int], ...]
    secret: str


class NcclSpec(BaseModel):
    kind: Literal["nccl"] = "nccl"
    store: tuple[str, int]


class SymmetricSpec(BaseModel):
    kind: Literal["symmetric"] = "symmetric"
    path: Path
    store: tuple[str, int]


class SingleSpec(BaseModel):
    kind: Literal["single"] = "single"


LinkSpec = Annotated[
    SharedMemorySpec | TcpSpec | NcclSpec | SymmetricSpec | SingleSpec, Field(discriminator="kind")
]
"""How the ranks of one group, as it stands at present, reach each other."""
