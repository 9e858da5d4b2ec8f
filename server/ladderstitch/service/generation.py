"""`ladderstitch.v1.GenerationService`: text, token by token."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import aclosing

from ladderstitch.core import Budget
from ladderstitch.errors import BadInput, RequestError
from ladderstitch.hosting import Host, HostedGenerator
from ladderstitch.language.generation import GenerationRequest, Piece
from ladderstitch.language.sampling import Sampling
from ladderstitch.service import budget
from ladderstitch.service.status import Context, statuses
from ladderstitch.v1 import generation_pb2 as pb
from ladderstitch.v1 import generation_pb2_grpc, inference_pb2

DEFAULT_MAX_TOKENS = 128
MAX_STOPS = 16
MAX_CHARACTERS_A_TOKEN = 64
"""Longer texts are refused before they are tokenised, on the event loop."""

FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, host: Host) -> None:
        self.host = host

    @statuses
    async def Generate(  # type: ignore[override] # grpc.aio takes coroutines that write, too
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        arrival = time.monotonic()
        remaining_s = context.time_remaining()
        model = self.host.generator(request.model_name, request.model_version)
        resolved = Budget()
        try:
            deadlines = budget.of_call(remaining_s, context.invocation_metadata(), None)
            resolved = _budget(request, arrival, deadlines)
            accepted = _accept(request, model, arrival, resolved)
            try:
                await self._stream(request.request_id, model, accepted, resolved, context)
            finally:
                model.metrics.generating(0, 0.0)
        except RequestError as error:
            model.metrics.refused(error.code, had_budget=resolved.target != math.inf)
            raise
        except asyncio.CancelledError:
            model.metrics.refused("CANCELLED", had_budget=resolved.target != math.inf)
            raise

    async def _stream(
        self,
        request_id: str,
        model: HostedGenerator,
        request: GenerationRequest,
        resolved: Budget,
        context: Context,
    ) -> None:
        """Write the pieces as they come."""
        first_token = last_token = 0.0
        async with aclosing(model.generator.generate(request)) as pieces:
            async for piece in pieces:
                now = time.monotonic()
                if piece.index == 0:
                    first_token = now
                    model.metrics.first_token(piece.queue_s, now - request.arrival)
                else:
                    model.metrics.next_token(now - last_token)
                last_token = now
                used = (len(request.tokens) + piece.index) / model.generator.max_tokens
                model.metrics.generating(1, used)
                model.metrics.queued(model.generator.waiting)
                response = pb.GenerateResponse(
                    index=piece.index,
                    token_id=piece.token,
                    text=piece.text,
                    request_id=request_id,
                )
                if piece.finish is not None:
                    response.finish_reason = FINISH[piece.finish]
                    accounting = self._accounting(model, request, piece, first_token, resolved)
                    response.accounting.CopyFrom(accounting)
                    met = accounting.budget_met if accounting.HasField("budget_met") else None
                    model.metrics.completed(now - request.arrival, met)
                await context.write(response)

    def _accounting(
        self,
        model: HostedGenerator,
        request: GenerationRequest,
        last: Piece,
        first_token: float,
        resolved: Budget,
    ) -> pb.GenerationAccounting:
        now = time.monotonic()
        accounting = pb.GenerationAccounting(
            prompt_tokens=len(request.tokens),
            generated_tokens=last.index + 1,
            queue_us=round(1e6 * last.queue_s),
            first_token_us=round(1e6 * (first_token - request.arrival)),
            total_us=round(1e6 * (now - request.arrival)),
            path=model.bundle.manifest.residual.scheme,
            replica=self.host.replica,
        )
        if resolved.target != math.inf:
            accounting.budget_us = round(1e6 * (resolved.target - request.arrival))
            accounting.budget_met = now <= resolved.target
        return accounting


def _budget(
    request: pb.GenerateRequest, arrival: float, deadlines: list[budget.Deadline]
) -> Budget:
    if request.HasField("latency_budget_us"):
        seconds = budget.microseconds("latency_budget_us", request.latency_budget_us)
        deadlines.append(budget.Deadline(seconds, "latency_budget_us", request.hard_deadline))
    elif request.hard_deadline:
        raise BadInput("hard_deadline", "expected latency_budget_us to be set along with it")
    return budget.resolve(arrival, deadlines)


def _accept(
    request: pb.GenerateRequest, model: HostedGenerator, arrival: float, resolved: Budget
) -> GenerationRequest:
    """The request as the generator takes it; raises `BadInput` naming the field that is wrong."""
    if len(request.request_id) > budget.MAX_ID_CHARACTERS:
        raise BadInput("request_id", f"expected at most {budget.MAX_ID_CHARACTERS} characters")
    if len(request.stop) > MAX_STOPS:
        raise BadInput("stop", f"expected at most {MAX_STOPS} texts, got {len(request.stop)}")
    tokens = _prompt(request, model)
    if len(tokens) > model.max_prompt_tokens:
        raise BadInput(
            "prompt", f"expected at most {model.max_prompt_tokens} tokens, got {len(tokens)}"
        )
    left = model.generator.max_tokens - len(tokens)
    default = min(DEFAULT_MAX_TOKENS, left)
    return GenerationRequest(
        tokens=tokens,
        arrival=arrival,
        max_tokens=request.max_tokens if request.HasField("max_tokens") else default,
        sampling=Sampling(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p if request.HasField("top_p") else 1.0,
            seed=request.seed if request.HasField("seed") else None,
        ),
        stop=tuple(request.stop),
        limit=resolved.limit,
    )


def _prompt(request: pb.GenerateRequest, model: HostedGenerator) -> tuple[int, ...]:
    match request.WhichOneof("prompt"):
        case "text":
            most = MAX_CHARACTERS_A_TOKEN * model.max_prompt_tokens
            if len(request.text) > most:
                raise BadInput("text", f"expected at most {most} characters")
            return tuple(model.generator.tokenizer.encode(request.text))
        case "tokens":
            return tuple(request.tokens.ids)
    raise BadInput("prompt", "expected text or tokens to be set")


def describe_language_model(model: HostedGenerator, ready: bool) -> inference_pb2.GetModelResponse:
    """For `InferenceService.GetModel`, which describes models of every kind."""
    manifest = model.bundle.manifest
    return inference_pb2.GetModelResponse(
        name=model.name,
        version=model.version,
        ready=ready,
        origin=manifest.origin,
        licence=manifest.licence,
        language=inference_pb2.LanguageModel(
            context_tokens=model.generator.max_tokens,
            vocabulary_size=manifest.config.vocab_size,
            layers=manifest.config.layers,
            residual=manifest.residual.scheme,
            ranks=model.generator.group.job.ranks,
        ),
    )
