"""Servers that a load test streams text from: ladderstitch, or any OIP server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import numpy as np

from ladderstitch.client.generation import generate_request
from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.oip.grpc_service_pb2_grpc import GRPCInferenceServiceStub
from ladderstitch.v1 import generation_pb2
from ladderstitch.v1 import inference_pb2 as pb
from ladderstitch.v1.generation_pb2_grpc import GenerationServiceStub
from ladderstitch_loadtest.load.prompts import TokenClass
from ladderstitch_loadtest.load.targets import TIMEOUT_S, TargetKind

DEFAULT_MODEL_LEN = 1024
"""Tokens assumed for the context of a server that does not report it."""
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a server reports with the last chunk of a stream; None where it reports nothing.

    `met` is whether the server counts both budgets as met. `quality` is that of the variant.
    """

    queue_s: float | None = None
    met: bool | None = None
    variant: str = ""
    quality: float | None = None


class TextTarget(Protocol):
    """A server that streams text, and how to read the chunks of a stream."""

    @property
    def max_model_len(self) -> int:
        """The length of the context in tokens."""

    def generate(
        self,
        channel: grpc.aio.Channel,
        prompt_tokens: int,
        answer_tokens: int,
        budgets: TokenClass,
        seed: int,
    ) -> AsyncIterator[ServerReport | None]:
        """Start a stream and yield for each chunk: the report with the last one, None before it.

        Raises `grpc.aio.AioRpcError`, or `StreamError` if the server ends the stream by an error.
        """


@dataclass(frozen=True, slots=True)
class NativeTextTarget:
    """A `ladderstitch.v1` server.

    Prompts are random tokens, so that lengths are exact and prompts share no prefix.
    """

    model: str
    vocabulary: int
    max_model_len: int

    async def generate(
        self,
        channel: grpc.aio.Channel,
        prompt_tokens: int,
        answer_tokens: int,
        budgets: TokenClass,
        seed: int,
    ) -> AsyncIterator[ServerReport | None]:
        """Start a stream and yield for each chunk: the report with the last one, None before it."""
        tokens = np.random.default_rng(seed).integers(0, self.vocabulary, prompt_tokens).tolist()
        request = generate_request(
            tokens,
            model=self.model,
            max_tokens=answer_tokens,
            first_token_budget_s=budgets.first_s,
            token_budget_s=budgets.per_token_s,
        )
        stub: Any = GenerationServiceStub(channel)
        async for chunk in stub.Generate(request):
            yield _server_report(chunk.accounting) if chunk.finish_reason else None


def _server_report(accounting: generation_pb2.GenerationAccounting) -> ServerReport:
    single = not accounting.HasField("token_budget_met")
    return ServerReport(
        queue_s=accounting.queue_us / 1e6,
        met=accounting.first_token_budget_met and (single or accounting.token_budget_met),
        variant=accounting.variant_name,
        quality=accounting.quality if accounting.HasField("quality") else None,
    )


@dataclass(frozen=True, slots=True)
class OipTextTarget:
    """A server that streams `text_input` to `text_output` by ModelStreamInfer.

    A prompt of n tokens is n words, because the server's tokenizer is unknown.
    """

    model: str
    max_model_len: int = DEFAULT_MODEL_LEN

    async def generate(
        self,
        channel: grpc.aio.Channel,
        prompt_tokens: int,
        answer_tokens: int,
        budgets: TokenClass,
        seed: int,
    ) -> AsyncIterator[ServerReport | None]:
        """Start a stream and yield an empty report with the last chunk, None before it."""
        words = " ".join(np.random.default_rng(seed).choice(WORDS, prompt_tokens))
        request = oip.ModelInferRequest(model_name=self.model)
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(words.encode())
        request.parameters["max_tokens"].int64_param = answer_tokens
        stub: Any = GRPCInferenceServiceStub(channel)
        async for chunk in stub.ModelStreamInfer(iter([request])):
            if chunk.error_message:
                raise StreamError(chunk.error_message)
            final = chunk.infer_response.parameters["triton_final_response"].bool_param
            if chunk.infer_response.outputs or not final:
                yield ServerReport() if final else None


class StreamError(Exception):
    """A stream of the Open Inference Protocol ended with an error message instead of a chunk."""


def find_text_target(address: str, kind: TargetKind, model: str) -> TextTarget:
    """Return the target for a model, with the vocabulary and context that the server reports.

    An empty `model` is a ladderstitch server's only model. Raises `ValueError` if the model does
    not generate text, and `grpc.RpcError` if the server does not answer.
    """
    if kind == "oip":
        return OipTextTarget(model)
    with grpc.insecure_channel(address) as channel:
        get = channel.unary_unary("/ladderstitch.v1.InferenceService/GetModel")
        reply = get(pb.GetModelRequest(model_name=model).SerializeToString(), timeout=TIMEOUT_S)
    described = pb.GetModelResponse.FromString(reply)
    if not described.HasField("language"):
        raise ValueError(f"model: expected one that generates text, got {described.name!r}")
    language = described.language
    return NativeTextTarget(model, language.vocabulary_size, language.max_model_len)
