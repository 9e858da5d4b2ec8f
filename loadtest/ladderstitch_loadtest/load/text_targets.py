"""Servers that stream text: our own API, or the Open Inference Protocol's streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import numpy as np

from ladderstitch.client.messages import generate_request
from ladderstitch.oip import grpc_service_pb2 as oip
from ladderstitch.v1 import generation_pb2
from ladderstitch.v1 import inference_pb2 as pb
from ladderstitch_loadtest.load.prompts import TokenClass
from ladderstitch_loadtest.load.targets import Kind

UNKNOWN_CONTEXT = 1024
"""Tokens that a server is thought to take which does not say."""
WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world")


@dataclass(frozen=True, slots=True)
class Told:
    """What a server says of an answer, with its last piece; None where it says nothing.

    `kept` is whether it counts both budgets as kept; `quality` is the path's.
    """

    queue_s: float | None = None
    kept: bool | None = None
    path: str = ""
    quality: float | None = None


class TextTarget(Protocol):
    """How to ask for a stream, and what its pieces say: None for all but the last."""

    @property
    def max_model_len(self) -> int: ...
    def ask(
        self, channel: grpc.aio.Channel, prompt: int, answer: int, wanted: TokenClass, seed: int
    ) -> AsyncIterator[Told | None]:
        """`prompt` and `answer` in tokens; raises `grpc.aio.AioRpcError`."""


@dataclass(frozen=True, slots=True)
class NativeText:
    """`ladderstitch.v1`: random tokens, so that lengths are exact and no two prompts alike."""

    model: str
    vocabulary: int
    max_model_len: int

    async def ask(
        self, channel: grpc.aio.Channel, prompt: int, answer: int, wanted: TokenClass, seed: int
    ) -> AsyncIterator[Told | None]:
        tokens = np.random.default_rng(seed).integers(0, self.vocabulary, prompt).tolist()
        request = generate_request(
            tokens,
            model=self.model,
            max_tokens=answer,
            first_token_budget_s=wanted.first_s,
            token_budget_s=wanted.per_token_s,
        )
        call = channel.unary_stream(
            "/ladderstitch.v1.GenerationService/Generate",
            request_serializer=generation_pb2.GenerateRequest.SerializeToString,
            response_deserializer=generation_pb2.GenerateResponse.FromString,
        )
        async for piece in call(request):
            yield _told(piece.accounting) if piece.finish_reason else None


def _told(cost: generation_pb2.GenerationAccounting) -> Told:
    single = not cost.HasField("token_budget_met")
    return Told(
        queue_s=cost.queue_us / 1e6,
        kept=cost.first_token_budget_met and (single or cost.token_budget_met),
        path=cost.path,
        quality=cost.quality if cost.HasField("quality") else None,
    )


@dataclass(frozen=True, slots=True)
class OipText:
    """`text_input` to `text_output` by ModelStreamInfer; a word is taken for a token."""

    model: str
    max_model_len: int = UNKNOWN_CONTEXT

    async def ask(
        self, channel: grpc.aio.Channel, prompt: int, answer: int, wanted: TokenClass, seed: int
    ) -> AsyncIterator[Told | None]:
        words = " ".join(np.random.default_rng(seed).choice(WORDS, prompt))
        request = oip.ModelInferRequest(model_name=self.model)
        tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(words.encode())
        request.parameters["max_tokens"].int64_param = answer

        async def one() -> AsyncIterator[oip.ModelInferRequest]:
            yield request

        call: Any = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=oip.ModelInferRequest.SerializeToString,
            response_deserializer=oip.ModelStreamInferResponse.FromString,
        )(one())
        async for piece in call:
            if piece.error_message:
                raise StreamRefused(piece.error_message)
            final = piece.infer_response.parameters["triton_final_response"].bool_param
            if piece.infer_response.outputs or not final:
                yield Told() if final else None


class StreamRefused(Exception):
    """A stream of the Open Inference Protocol ended with an error instead of a piece."""


def find_text_target(address: str, kind: Kind, model: str) -> TextTarget:
    """Ask the server what it takes; raises `ValueError` for one that does not generate text."""
    if kind == "oip":
        return OipText(model)
    with grpc.insecure_channel(address) as channel:
        get = channel.unary_unary("/ladderstitch.v1.InferenceService/GetModel")
        answer = get(pb.GetModelRequest(model_name=model).SerializeToString(), timeout=10)
    described = pb.GetModelResponse.FromString(answer)
    if not described.HasField("language"):
        raise ValueError(f"model: expected one that generates text, {described.name!r} does not")
    language = described.language
    return NativeText(model, language.vocabulary_size, language.max_model_len)
