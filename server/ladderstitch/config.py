"""How a server is configured: a YAML file, command-line flags over it, checked once."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ladderstitch.bundles.registry import EMBEDDED
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.security.listen_config import AccessSettings
from ladderstitch.text.comm.base import LinkChoice


class ServerConfig(AccessSettings):
    """Everything that is fixed while a replica runs, and the scheduling it starts with."""

    bundle: Path = Field(EMBEDDED, description="model bundle directory")
    device: str = Field("auto", description="auto, cpu or cuda[:N]")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(1, ge=1, description="torch threads of the worker process")
    inline_limit_ms: float = Field(
        1.0, ge=0, le=10, description="shorter batches of light models run in the replica's process"
    )
    max_batch_rows: int = Field(32, ge=1, le=4096)
    replicas: int = Field(
        1, ge=1, le=64, description="copies of the model on this machine, behind gateways"
    )
    gateways: int = Field(
        2, ge=1, le=16, description="before several replicas; they share `port`, one may be lost"
    )
    ranks: int = Field(1, ge=1, le=64, description="processes that a language model is split over")
    spare_ranks: int = Field(0, ge=0, le=8, description="warm processes that replace lost ranks")
    link: LinkChoice = Field(
        "auto",
        description="between ranks; auto: shared memory on CPUs, NCCL on GPUs; symmetric: Triton's "
        "kernels between the GPUs of one machine",
    )
    rank_address: str = Field(
        "", description="HOST:PORT at which ranks of other machines connect; unset: none do"
    )
    rank_secret_file: Path | None = Field(
        None, description="secret of ranks that are started by hand (`ladderstitch rank`)"
    )
    context_tokens: int = Field(2048, ge=2, description="prompt and answer of a language model")
    cache_tokens: int = Field(
        8192, ge=16, description="tokens of all answers of a language model that its cache holds"
    )
    max_sequences: int = Field(
        32, ge=1, le=4096, description="answers of a language model that are computed on at a time"
    )
    chunk_tokens: int = Field(
        256, ge=1, le=65_536, description="most tokens of one step of a language model"
    )
    emulated_link_ms: float = Field(
        0.0, ge=0, le=1000, description="for experiments: delay every message between ranks"
    )
    log_format: Literal["text", "json"] = "text"
    log_requests: bool = Field(False, description="a line a request: id, stitch, cost, status")
    record: Path | None = Field(
        None,
        description="folder: all that is planned for a model of images goes to MODEL-PID.jsonl, "
        "for `ladderstitch-loadtest replay`",
    )
    otlp_endpoint: str | None = Field(
        None, description="http://HOST:4317: traces go there; needs the extra `telemetry`"
    )
    drain_s: float = Field(20.0, ge=0, description="time for accepted requests on shutdown")
    scheduling: SchedulerSettings = SchedulerSettings()

    @model_validator(mode="after")
    def _ranks_by_hand_have_an_address(self) -> ServerConfig:
        if self.rank_secret_file is not None and not self.rank_address:
            raise ValueError("rank_address: expected HOST:PORT along with rank_secret_file")
        return self

    @model_validator(mode="after")
    def _what_belongs_to_one_replica(self) -> ServerConfig:
        """Ranks of other machines know one address; gateways forward gRPC alone."""
        for field, value in (("rank_address", self.rank_address), ("http_port", self.http_port)):
            if value not in ("", None) and self.replicas > 1:
                raise ValueError(f"{field}: expected replicas: 1 along with it")
        return self

    def listening(self) -> tuple[tuple[str, str], ...]:
        """Fields of ports, each with the address that it is bound to."""
        return (*super().listening(), ("http_port", self.host))
