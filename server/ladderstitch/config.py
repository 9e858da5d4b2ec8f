"""Configuration of a server: a YAML file, overridden by command-line options, checked once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic.config import JsonDict

from ladderstitch.addresses import is_loopback, split_address
from ladderstitch.bundles import EMBEDDED
from ladderstitch.scheduling.settings import SchedulerSettings
from ladderstitch.security.listen_config import (
    IMAGE_DECODE_TIMEOUT_S,
    IMAGE_DECODERS,
    LIMITS,
    MAX_IMAGE_MB,
    MAX_IMAGE_PIXELS,
    ListenConfig,
)
from ladderstitch.text.comm import CommChoice

DEFAULT_HTTP_PORT = 8081
"""The HTTP port that `serve` opens unless it is given ports or an address."""
TEXT: JsonDict = {"panel": "Language models"}
OBSERVABILITY: JsonDict = {"panel": "Observability"}


class ServerConfig(ListenConfig):
    """Configuration of a server: what is fixed while a replica runs, and its initial scheduling."""

    bundle: Path = Field(EMBEDDED, description="model bundle directory")
    page: Literal["auto", "on", "off"] = Field(
        "auto",
        description="the page at / of the HTTP port; auto: on if only this machine can reach it, "
        "or if callers need tokens, which the page asks for",
    )
    device: str = Field("auto", description="device: auto, cpu or cuda[:N]")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="number format; auto: float32 on CPUs, bfloat16 on GPUs"
    )
    runtime: Literal["auto", "onnx", "torch"] = Field(
        "auto",
        description="what runs image models: onnx (compiled, on CPUs in float32) or torch; "
        "auto: onnx where it can",
    )
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1,
        description="number of threads that compute one batch; auto: the cores that the process "
        "may use, shared by ranks and replicas",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="copies of the model on this machine, behind gateways; more than 1 needs Ray",
    )
    gateways: int = Field(
        2, ge=1, le=16, description="gateways in front of more than one replica; they share `port`"
    )
    drain_s: float = Field(
        20.0, ge=0, description="seconds for accepted requests to end on shutdown"
    )
    inline_batch_limit_ms: float = Field(
        1.0,
        ge=0,
        le=10,
        description="batches of a single caller that take at most this long run on the event loop, "
        "not in a thread; image models on CPUs only",
        json_schema_extra=LIMITS,
    )
    max_batch_size: int = Field(
        32,
        ge=1,
        le=4096,
        description="maximum number of images in one batch",
        json_schema_extra=LIMITS,
    )
    max_image_pixels: int = Field(
        MAX_IMAGE_PIXELS,
        ge=1,
        description="maximum number of pixels of an encoded image, read from its header",
        json_schema_extra=LIMITS,
    )
    max_image_mb: int = Field(
        MAX_IMAGE_MB,
        ge=1,
        le=1024,
        description="maximum size of the file of an encoded image, MiB",
        json_schema_extra=LIMITS,
    )
    image_decoders: int = Field(
        IMAGE_DECODERS,
        ge=1,
        le=64,
        description="maximum number of processes that decode small images, as many for medium and "
        "for large ones, and one for the most costly; they start when they are first needed",
        json_schema_extra=LIMITS,
    )
    image_decode_timeout_s: float = Field(
        IMAGE_DECODE_TIMEOUT_S,
        gt=0,
        le=3600,
        description="seconds after which the decoding of an image is ended and the image rejected",
        json_schema_extra=LIMITS,
    )
    non_finite_inputs: Literal["compute", "refuse"] = Field(
        "compute",
        description="FP32 inputs with NaN or infinity over the Open Inference Protocol: compute "
        "them, as Triton does, or refuse them; the native protocol always refuses them",
    )
    max_prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="maximum number of tokens of a prompt; unset: that of the context",
        json_schema_extra=LIMITS,
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="ranks: number of processes that a language model is split over",
        json_schema_extra=TEXT,
    )
    paths: tuple[str, ...] = Field(
        (),
        description="paths of a language model to load, by name; empty: all of its bundle",
        json_schema_extra={**TEXT, "flags": ["--path"]},
    )
    spare_ranks: int = Field(
        0,
        ge=0,
        le=8,
        description="number of warm processes that replace lost ranks",
        json_schema_extra=TEXT,
    )
    link: CommChoice = Field(
        "auto",
        description="communication between ranks; auto: shared memory on CPUs, NCCL on GPUs; "
        "symmetric: Triton kernels between the GPUs of one machine",
        json_schema_extra=TEXT,
    )
    rank_address: str = Field(
        "",
        description="HOST:PORT that ranks on other machines connect to; unset: this machine only",
        json_schema_extra=TEXT,
    )
    rank_secret_file: Path | None = Field(
        None,
        description="file with the secret that ranks started by `ladderstitch rank` must know",
        json_schema_extra=TEXT,
    )
    max_model_len: int = Field(
        2048,
        ge=2,
        description="maximum number of tokens of a prompt and its answer together",
        json_schema_extra=TEXT,
    )
    kv_cache_tokens: int = Field(
        8192, ge=16, description="tokens that the KV cache holds", json_schema_extra=TEXT
    )
    max_sequences: int = Field(
        32,
        ge=1,
        le=4096,
        description="maximum number of sequences that run concurrently",
        json_schema_extra=TEXT,
    )
    max_batched_tokens: int = Field(
        256,
        ge=1,
        le=65_536,
        description="maximum number of tokens in one step",
        json_schema_extra=TEXT,
    )
    emulated_link_ms: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="delay of every message between ranks, for experiments",
        json_schema_extra=TEXT,
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="format of the log", json_schema_extra=OBSERVABILITY
    )
    log_requests: bool = Field(
        False,
        description="log one line per request: id, variant, cost, status",
        json_schema_extra=OBSERVABILITY,
    )
    record: Path | None = Field(
        None,
        description="directory where the planner of an image model records its inputs and "
        "decisions, as MODEL-PID.jsonl for `ladderstitch-loadtest replay`",
        json_schema_extra=OBSERVABILITY,
    )
    otlp_endpoint: str | None = Field(
        None,
        description="endpoint that receives traces, e.g. http://HOST:4317; needs the extra "
        "`telemetry`",
        json_schema_extra=OBSERVABILITY,
    )
    scheduling: SchedulerSettings = Field(default_factory=SchedulerSettings)

    @field_validator("rank_address")
    @classmethod
    def _check_rank_address(cls, address: str) -> str:
        """Raise `ValueError` for an address that is not HOST:PORT."""
        if address:
            split_address(address)
        return address

    @model_validator(mode="after")
    def _check_rank_secret(self) -> ServerConfig:
        if self.rank_secret_file is not None and not self.rank_address:
            raise ValueError(
                "rank_address: expected HOST:PORT along with rank_secret_file, got none"
            )
        return self

    @model_validator(mode="after")
    def _check_one_replica(self) -> ServerConfig:
        """Raise `ValueError` for several replicas with one address that ranks must know."""
        if self.rank_address and self.replicas > 1:
            raise ValueError(
                f"rank_address: expected replicas 1 along with it, got {self.replicas}"
            )
        return self

    @model_validator(mode="after")
    def _check_page(self) -> ServerConfig:
        """Raise `ValueError` for a page without a port that `with_default_http` would not open."""
        has_default = "http_port" not in self.model_fields_set and is_loopback(self.host)
        if self.page == "on" and self.http_port is None and not has_default:
            raise ValueError(
                f"page: expected http_port along with it, e.g. --http-port {DEFAULT_HTTP_PORT}, "
                "got none; only a server on loopback opens one by itself"
            )
        return self

    def with_default_http(self) -> ServerConfig:
        """Return the configuration with the default HTTP port if all addresses are the default.

        A server that others can reach, or that has a port of its own, opens HTTP only if asked to,
        on loopback also by `page: on`.
        """
        given = self.model_fields_set - ({"port"} if self.page == "on" else set())
        if {"port", "http_port"} & given or not is_loopback(self.host):
            return self
        return self.model_copy(update={"http_port": DEFAULT_HTTP_PORT})

    @property
    def serves_page(self) -> bool:
        """Whether the HTTP port has a page at `/`."""
        if self.http_port is None or self.page != "auto":
            return self.page == "on"
        return self.token_file is not None or is_loopback(self.host)
