"""What a rank is told to be: a model, its share of it, its memory, and its link."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ladderstitch.runtime.device import DTYPES
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.comm.base import (
    CommChoice,
    CommKind,
    CommSpec,
    NcclSpec,
    SharedMemorySpec,
    SingleSpec,
    SymmetricSpec,
    TcpSpec,
)
from ladderstitch.text.comm.shared_memory import SharedRegion
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.weight_reader import RandomWeights, Weights
from ladderstitch.text.model.weights import expected_shapes


class RankConfig(BaseModel):
    """The same for all ranks of a group.

    `paths` are the residual schemes that a forward pass may take, by index: same weights, another
    flow. `bundle` names a bundle; without one the weights are random (benchmarks).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: LlamaConfig
    paths: tuple[ResidualScheme, ...] = (ResidualScheme(),)
    deltas: tuple[Path | None, ...] = Field(
        (),
        description="a file for each path of what its tensors differ by; none: no path has one",
    )
    bundle: Path | None = None
    shared_norm: bool = False
    ranks: int = Field(1, gt=0)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    threads: int = Field(1, gt=0)
    max_model_len: int = Field(gt=0, description="tokens that a sequence may have")
    sequences: int = Field(1, gt=0, description="sequences of full length that the cache holds")
    kv_cache_tokens: int | None = Field(
        None, gt=0, description="tokens that the cache holds, whatever `sequences` says"
    )
    block_tokens: int = Field(16, gt=0, description="tokens of one block of the cache")
    max_batched_tokens: int = Field(
        512, gt=0, description="most tokens of one forward pass, all rows"
    )

    @classmethod
    def of(cls, bundle: TextBundle, **fields: object) -> RankConfig:
        """A bundle's model, with all its paths."""
        manifest = bundle.manifest
        return cls.model_validate(
            {
                "config": manifest.config,
                "paths": tuple(way.residual for way in manifest.ways),
                "deltas": bundle.delta_files(),
                "bundle": bundle.path.resolve(),
                "shared_norm": bundle.shared_norm,
                "max_model_len": manifest.config.max_positions,
            }
            | fields
        )

    @model_validator(mode="after")
    def _a_delta_for_each_path(self) -> RankConfig:
        if len(self.deltas) not in (0, len(self.paths)):
            raise ValueError(f"deltas: expected {len(self.paths)}, got {len(self.deltas)}")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def sequence_blocks(self) -> int:
        """Blocks of a sequence of full length."""
        return -(-self.max_model_len // self.block_tokens)

    @property
    def blocks(self) -> int:
        """Blocks of the cache."""
        if self.kv_cache_tokens is not None:
            return -(-self.kv_cache_tokens // self.block_tokens)
        return self.sequences * self.sequence_blocks

    @property
    def message_bytes(self) -> int:
        """The largest partial that ranks exchange: [max_batched_tokens, D]."""
        return self.max_batched_tokens * self.config.hidden_size * self.torch_dtype.itemsize

    def weights(self) -> Weights:
        if self.bundle is not None:
            return TextBundle.load(self.bundle).weights()
        return RandomWeights(expected_shapes(self.config, shared_norm=self.shared_norm))


class Assignment(BaseModel):
    """Body of ASSIGN."""

    job: RankConfig
    rank: int


class CommInit(BaseModel):
    """Body of JOIN."""

    link: CommSpec


Address = tuple[str, int]


class CommRegion(Protocol):
    """Memory of a group, made by whoever watches over it."""

    def abort(self) -> None:
        """Make every `wait` of the group raise `PeerLost`, now and later."""

    def forget(self) -> None:
        """Remove its name; the memory goes with its last user."""


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """How ranks reach each other and how many stand by."""

    link: CommChoice = "auto"
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    spares: int = 0
    listen: str = ""
    """HOST:PORT at which ranks of other machines connect; unset: a socket file of this one."""
    secret: str = ""
    """What ranks that others start must know; unset: a random one."""


def comm_kind(job: RankConfig, options: GroupOptions) -> CommKind:
    """What `auto` means for this job."""
    if options.link != "auto":
        return options.link
    return "shared_memory" if job.device == "cpu" else "nccl"


def mendable(job: RankConfig, options: GroupOptions) -> bool:
    """Whether survivors may join a new link; NCCL's communicators are lost with a rank."""
    kind = comm_kind(job, options)
    return kind != "nccl" and not (kind == "symmetric" and job.device != "cpu")


CreateCommSpec = Callable[
    ["RankConfig", "GroupOptions", Sequence[Address]], tuple[CommSpec, CommRegion | None]
]
"""Makes the link of a group anew, as `create_comm_spec` does."""


def create_comm_spec(
    job: RankConfig, options: GroupOptions, listening: Sequence[Address]
) -> tuple[CommSpec, CommRegion | None]:
    """A new link between ranks that listen at these addresses, and its memory if it has any."""
    if job.ranks == 1:
        return SingleSpec(), None
    kind = comm_kind(job, options)
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
