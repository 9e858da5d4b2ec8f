"""The configuration of ranks: model, shard, cache and communicator."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ladderstitch.errors import ConfigError
from ladderstitch.runtime.device import DTYPES
from ladderstitch.runtime.low_bit import LowBitPrecision
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.comm import CommChoice, CommKind
from ladderstitch.text.comm.base import (
    CommSpec,
    NcclSpec,
    SharedMemorySpec,
    SingleSpec,
    SymmetricSpec,
    TcpSpec,
)
from ladderstitch.text.comm.shared_memory import SharedRegion
from ladderstitch.text.engine.liveness import Liveness
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import DecoderFamily, Route
from ladderstitch.text.model.family_weights import family_shapes
from ladderstitch.text.model.residual import LayerPlan, ResidualScheme, narrow_plans, plan_layers
from ladderstitch.text.model.weight_reader import RandomWeights, Weights
from ladderstitch.text.model.weights import expected_shapes


class RankConfig(BaseModel):
    """The configuration that all ranks of a group share.

    `paths` are the residual schemes that a forward pass can use, by index, on the same weights.
    `bundle` is a bundle's folder; unset: random weights (benchmarks only).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: DecoderConfig
    paths: tuple[ResidualScheme, ...] = (ResidualScheme(),)
    deltas: tuple[Path | None, ...] = Field(
        (), description="the delta (LoRA) file of each path; empty: no path has one"
    )
    precisions: tuple[LowBitPrecision | None, ...] = Field(
        (), description="the precision of each path's matrices; unset: `dtype`; empty: all of them"
    )
    anchors: tuple[DecoderConfig, ...] = Field(
        (), description="the smaller anchors of a family; `model` is the largest one"
    )
    routes: tuple[Route, ...] = Field(
        (), description="the route of each path; empty: all paths run all layers of `model`"
    )
    ffn_widths: tuple[tuple[int, ...], ...] = Field(
        (), description="columns of each path's MLPs, by layer or for all; empty: all columns"
    )
    bundle: Path | None = None
    shared_norm: bool = False
    ranks: int = Field(1, gt=0)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    threads: int = Field(1, gt=0)
    max_model_len: int = Field(gt=0, description="most tokens of a sequence")
    sequences: int = Field(1, gt=0, description="sequences of full length that the cache holds")
    kv_cache_tokens: int | None = Field(
        None, gt=0, description="tokens that the cache holds; unset: derived from `sequences`"
    )
    block_tokens: int = Field(16, gt=0, description="tokens of one block of the cache")
    max_batched_tokens: int = Field(
        512, gt=0, description="most new tokens of one forward pass, over all sequences"
    )

    @classmethod
    def of(cls, bundle: TextBundle, **fields: object) -> RankConfig:
        """Return the configuration for a bundle with all its paths; `fields` override it."""
        manifest = bundle.manifest
        return cls.model_validate(
            {
                "model": manifest.config,
                "paths": tuple(variant.residual for variant in manifest.variants),
                "deltas": bundle.delta_files(),
                "precisions": bundle.precisions(),
                "anchors": manifest.anchors,
                "routes": tuple(v.route for v in manifest.variants) if manifest.anchors else (),
                "ffn_widths": bundle.ffn_widths(),
                "bundle": bundle.path.resolve(),
                "shared_norm": bundle.shared_norm,
                "max_model_len": manifest.config.max_positions,
            }
            | fields
        )

    @model_validator(mode="after")
    def _check_paths(self) -> RankConfig:
        if len(self.deltas) not in (0, len(self.paths)):
            raise ValueError(f"deltas: expected {len(self.paths)}, got {len(self.deltas)}")
        if len(self.precisions) not in (0, len(self.paths)):
            raise ValueError(f"precisions: expected {len(self.paths)}, got {len(self.precisions)}")
        if len(self.routes) not in (0, len(self.paths)):
            raise ValueError(f"routes: expected {len(self.paths)}, got {len(self.routes)}")
        if len(self.ffn_widths) not in (0, len(self.paths)):
            raise ValueError(f"ffn_widths: expected {len(self.paths)}, got {len(self.ffn_widths)}")
        for widths in self.ffn_widths:
            if (problem := self.model.find_width_problem(widths)) is not None:
                raise ValueError(problem)
        if any(self.precisions) and self.device != "cpu":
            raise ValueError(
                f"device: expected cpu, the only one for int8 and int4 paths, got {self.device}"
            )
        return self

    @property
    def path_precisions(self) -> tuple[LowBitPrecision | None, ...]:
        """The precision of each path's matrices; None stands for `dtype`."""
        return self.precisions or (None,) * len(self.paths)

    @property
    def path_deltas(self) -> tuple[Path | None, ...]:
        """The delta file of each path."""
        return self.deltas or (None,) * len(self.paths)

    @property
    def path_routes(self) -> tuple[Route, ...]:
        """The route of each path."""
        return self.routes or ((),) * len(self.paths)

    def plans(self, path: int) -> tuple[LayerPlan, ...]:
        """Return the plan of each layer of a path; raises `ConfigError` if it does not fit."""
        plans = plan_layers(self.paths[path], self.family.deepest, self.ranks)
        widths = self.ffn_widths[path] if self.ffn_widths else ()
        return narrow_plans(plans, widths, self.model.intermediate_size)

    @property
    def family(self) -> DecoderFamily:
        """All anchors."""
        return DecoderFamily((*self.anchors, self.model))

    @property
    def alternatives(self) -> tuple[frozenset[int], ...]:
        """By path: those that differ in precision or in the widths of MLPs only, itself included.

        A sequence may change between them from one token to the next.
        """
        kinds = list(zip(self.paths, self.path_deltas, self.path_routes, strict=True))
        return tuple(
            frozenset(other for other, same in enumerate(kinds) if same == kind) for kind in kinds
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and partials of paths without a precision of their own."""
        return DTYPES[self.dtype]

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of keys and values, which all paths share: float32 if a path has low-bit ones.

        Products with low-bit matrices take and return float32.
        """
        return torch.float32 if any(self.precisions) else self.torch_dtype

    @property
    def sequence_blocks(self) -> int:
        """The number of blocks of a sequence of full length."""
        return -(-self.max_model_len // self.block_tokens)

    @property
    def blocks(self) -> int:
        """The number of blocks of the cache."""
        if self.kv_cache_tokens is not None:
            return -(-self.kv_cache_tokens // self.block_tokens)
        return self.sequences * self.sequence_blocks

    @property
    def partial_bytes(self) -> int:
        """The size of the largest partial that ranks exchange: [max_batched_tokens, D]."""
        return self.max_batched_tokens * self.family.width * self.cache_dtype.itemsize

    def weights(self) -> Weights:
        """Return the weights of the bundle, or random weights if there is no bundle.

        Raises `BundleError` if the bundle cannot be loaded.
        """
        if self.bundle is not None:
            return TextBundle.load(self.bundle, calibrated=False).weights()
        if self.anchors:
            return RandomWeights(family_shapes(self.family))
        return RandomWeights(expected_shapes(self.model, shared_norm=self.shared_norm))


class Assignment(BaseModel):
    """The header of `LOAD_MODEL`: the group's configuration and this rank's number."""

    rank_config: RankConfig
    rank: int


class CommInit(BaseModel):
    """The header of `INIT_COMM`: the parameters of the new communicator."""

    spec: CommSpec


Address = tuple[str, int]


class CommRegion(Protocol):
    """The memory of a communicator, which the group creates and the ranks map."""

    def abort(self) -> None:
        """Make every current and later `wait` of the group raise `PeerLost`."""

    def unlink(self) -> None:
        """Remove its name; the memory is freed when its last user unmaps it."""


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """The options of a group: how its ranks communicate and connect, and the number of spares."""

    link: CommChoice = "auto"
    latency_s: float = 0.0
    """One-way latency to emulate on shared memory, seconds."""
    bytes_per_s: float | None = None
    """Bandwidth to emulate on shared memory, bytes per second; unset: no limit."""
    spares: int = 0
    """Ranks that are started in advance and wait, without a model, to replace a lost one."""
    listen: str = ""
    """HOST:PORT at which ranks of other machines connect; unset: a socket file."""
    secret: str = ""
    """The secret that ranks must know if an operator starts them; unset: a random one."""
    liveness: Liveness = field(default_factory=Liveness)
    """The limits by which a rank that hangs is recognised."""


def comm_kind(rank_config: RankConfig, options: GroupOptions) -> CommKind:
    """Return the kind of communicator, which for `auto` depends on the device."""
    if options.link != "auto":
        return options.link
    return "shared_memory" if rank_config.device == "cpu" else "nccl"


def survives_rank_loss(rank_config: RankConfig, options: GroupOptions) -> bool:
    """Return whether surviving ranks can join a new communicator.

    A process that lost a peer in NCCL, or in symmetric memory on a GPU, has to be restarted.
    """
    kind = comm_kind(rank_config, options)
    return kind != "nccl" and not (kind == "symmetric" and rank_config.device != "cpu")


CreateCommSpec = Callable[
    ["RankConfig", "GroupOptions", Sequence[Address]], tuple[CommSpec, CommRegion | None]
]
"""A function that creates a new communicator of a group, such as `create_comm_spec`."""


def create_comm_spec(
    rank_config: RankConfig, options: GroupOptions, addresses: Sequence[Address]
) -> tuple[CommSpec, CommRegion | None]:
    """Return the spec of a new communicator, and its memory if its kind has any.

    `addresses` are those on which the ranks listen for peers, in the order of the ranks.
    """
    if rank_config.ranks == 1:
        return SingleSpec(), None
    kind = comm_kind(rank_config, options)
    if kind == "tcp":
        return TcpSpec(addresses=tuple(addresses), secret=secrets.token_hex(16)), None
    if kind == "nccl":
        return NcclSpec(store=addresses[0]), None
    if kind == "symmetric":
        if rank_config.model.qk_norm == "all":
            raise ConfigError(
                "link: expected nccl, shared_memory or tcp for norms over all heads, got symmetric"
            )
        from ladderstitch.text.comm.symmetric import SymmetricRegion

        folder = SymmetricRegion()
        return SymmetricSpec(path=folder.path, store=addresses[0]), folder
    region = SharedRegion(rank_config.ranks, rank_config.partial_bytes)
    spec = SharedMemorySpec(
        path=region.path,
        slot_bytes=region.slot_bytes,
        latency_s=options.latency_s,
        bytes_per_s=options.bytes_per_s,
    )
    return spec, region
