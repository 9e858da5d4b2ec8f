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
from ladderstitch.text.bundle import LanguageBundle
from ladderstitch.text.comm.base import (
    LinkChoice,
    LinkKind,
    LinkSpec,
    NcclSpec,
    SharedMemorySpec,
    SingleSpec,
    SymmetricSpec,
    TcpSpec,
)
from ladderstitch.text.comm.shared_memory import SharedRegion
from ladderstitch.text.model.config import LlamaConfig
from ladderstitch.text.model.residual import Residual
from ladderstitch.text.model.weight_reader import RandomWeights, Weights
from ladderstitch.text.model.weights import expected_shapes


class ModelJob(BaseModel):
    """The same for all ranks of a group.

    `paths` are the residual schemes that a forward pass may take, by index: same weights, another
    flow. `bundle` names a bundle; without one the weights are random (benchmarks).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: LlamaConfig
    paths: tuple[Residual, ...] = (Residual(),)
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
    cache_tokens: int = Field(gt=0, description="tokens that a sequence may have")
    sequences: int = Field(1, gt=0, description="sequences of full length that the cache holds")
    pool_tokens: int | None = Field(
        None, gt=0, description="tokens that the cache holds, whatever `sequences` says"
    )
    block_tokens: int = Field(16, gt=0, description="tokens of one block of the cache")
    chunk_tokens: int = Field(512, gt=0, description="most tokens of one forward pass, all rows")

    @classmethod
    def of(cls, bundle: LanguageBundle, **fields: object) -> ModelJob:
        """A bundle's model, with all its paths."""
        manifest = bundle.manifest
        return cls.model_validate(
            {
                "config": manifest.config,
                "paths": tuple(way.residual for way in manifest.ways),
                "deltas": bundle.delta_files(),
                "bundle": bundle.path.resolve(),
                "shared_norm": bundle.shared_norm,
                "cache_tokens": manifest.config.max_positions,
            }
            | fields
        )

    @model_validator(mode="after")
    def _a_delta_for_each_path(self) -> ModelJob:
        if len(self.deltas) not in (0, len(self.paths)):
            raise ValueError(f"deltas: expected {len(self.paths)}, got {len(self.deltas)}")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def sequence_blocks(self) -> int:
        """Blocks of a sequence of full length."""
        return -(-self.cache_tokens // self.block_tokens)

    @property
    def blocks(self) -> int:
        """Blocks of the cache."""
        if self.pool_tokens is not None:
            return -(-self.pool_tokens // self.block_tokens)
        return self.sequences * self.sequence_blocks

    @property
    def message_bytes(self) -> int:
        """The largest partial that ranks exchange: [chunk_tokens, D]."""
        return self.chunk_tokens * self.config.hidden_size * self.torch_dtype.itemsize

    def weights(self) -> Weights:
        if self.bundle is not None:
            return LanguageBundle.load(self.bundle).weights()
        return RandomWeights(expected_shapes(self.config, shared_norm=self.shared_norm))


class Assignment(BaseModel):
    """Body of ASSIGN."""

    job: ModelJob
    rank: int


class Joining(BaseModel):
    """Body of JOIN."""

    link: LinkSpec


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
