"""`ladderstitch.v1.GenerationService`: text, token by token."""

from __future__ import annotations

import math
from contextlib import aclosing

from ladderstitch.api.deadlines import (
    LatencyBudget,
    Metadata,
    arrival_and_deadline,
    call_deadlines,
    resolve_deadlines,
    seconds_from_us,
    token_budgets,
)
from ladderstitch.api.status import Context, statuses
from ladderstitch.api.validation import (
    DEFAULT_MAX_TOKENS,
    MAX_STOPS,
    checked_id,
    checked_quality,
    fitting,
    tokenise,
)
from ladderstitch.errors import InvalidArgument, RequestError
from ladderstitch.hosting.registry import ModelRegistry, TextModel
from ladderstitch.hosting.streaming import GenerationUsage, answer
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.scheduling.requests import (
    GenerationRequest,
    Sampling,
    TokenBudget,
    TokenChunk,
)
from ladderstitch.security.tokens import tenant_of
from ladderstitch.v1 import generation_pb2 as pb
from ladderstitch.v1 import generation_pb2_grpc, inference_pb2

FINISH = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry

    @statuses
    async def Generate(  # type: ignore[override] # grpc.aio takes coroutines that write, too
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        arrival, remaining_s = arrival_and_deadline(context)
        model = self.registry.text_model(request.model_name, request.model_version)
        try:
            accepted = accept(request, model, arrival, remaining_s, context.invocation_metadata())
        except RequestError as error:
            model.metrics.refused(error.code, had_budget=False)
            raise
        async with aclosing(answer(model, accepted)) as pieces:
            async for piece, account in pieces:
                response = _response(request.request_id, piece)
                if account is not None:
                    response.finish_reason = FINISH[piece.finish or "stop"]
                    response.accounting.CopyFrom(
                        _accounting(model, accepted, piece, account, self.registry.replica)
                    )
                await context.write(response)


def accept(
    request: pb.GenerateRequest,
    model: TextModel,
    arrival: float,
    remaining_s: float | None,
    metadata: Metadata,
) -> GenerationRequest:
    """The request as the generator takes it; raises `InvalidArgument` naming the field that is wrong."""
    checked_id("request_id", request.request_id)
    if len(request.stop) > MAX_STOPS:
        raise InvalidArgument(
            "stop", f"expected at most {MAX_STOPS} texts, got {len(request.stop)}"
        )
    wanted, limit = _budgets(request, arrival, remaining_s, metadata)
    tokens = _prompt(request, model)
    left = model.scheduler.max_tokens - len(tokens)
    return GenerationRequest(
        tokens=tokens,
        arrival=arrival,
        max_tokens=request.max_tokens
        if request.HasField("max_tokens")
        else min(DEFAULT_MAX_TOKENS, left),
        sampling=Sampling(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p if request.HasField("top_p") else 1.0,
            seed=request.seed if request.HasField("seed") else None,
        ),
        stop=tuple(request.stop),
        hard_deadline=limit,
        budget=wanted,
        min_quality=checked_quality(request.min_quality),
        variant=request.variant_id if request.HasField("variant_id") else None,
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        tenant=tenant_of(metadata),
    )


def _budgets(
    request: pb.GenerateRequest,
    arrival: float,
    remaining_s: float | None,
    metadata: Metadata,
) -> tuple[TokenBudget, float]:
    """What is wanted, and the limit on the clock of `arrival`."""
    deadlines = call_deadlines(remaining_s, metadata, None)
    if request.HasField("latency_budget_us"):
        seconds = seconds_from_us("latency_budget_us", request.latency_budget_us)
        deadlines.append(LatencyBudget(seconds, "latency_budget_us", request.hard_deadline))
    elif request.hard_deadline:
        raise InvalidArgument("hard_deadline", "expected latency_budget_us to be set along with it")
    resolved = resolve_deadlines(arrival, deadlines)
    first_s, token_s = token_budgets(metadata)
    if request.HasField("first_token_budget_us"):
        field = "first_token_budget_us"
        first_s = min(first_s, seconds_from_us(field, request.first_token_budget_us))
    if request.HasField("token_budget_us"):
        token_s = min(token_s, seconds_from_us("token_budget_us", request.token_budget_us))
    return TokenBudget(first_s, token_s, resolved.soft - arrival), resolved.hard


def _prompt(request: pb.GenerateRequest, model: TextModel) -> tuple[int, ...]:
    match request.WhichOneof("prompt"):
        case "text":
            return tokenise(request.text, model, "text")
        case "tokens":
            return fitting(tuple(request.tokens.ids), model)
    raise InvalidArgument("prompt", "expected text or tokens to be set")


def _response(request_id: str, piece: TokenChunk) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        index=piece.index,
        token_id=piece.token,
        text=piece.text,
        request_id=request_id,
        logprob=piece.logprob,
        top_logprobs=[
            pb.TokenLogprob(token_id=token, logprob=logprob)
            for token, logprob in piece.alternatives
        ],
    )


def _accounting(
    model: TextModel,
    request: GenerationRequest,
    last: TokenChunk,
    account: GenerationUsage,
    replica: str,
) -> pb.GenerationAccounting:
    wanted, quality = request.budget, last.answer.quality
    return pb.GenerationAccounting(
        prompt_tokens=account.prompt_tokens,
        generated_tokens=account.generated_tokens,
        queue_us=round(1e6 * account.queue_s),
        first_token_us=round(1e6 * account.first_token_s),
        total_us=round(1e6 * account.total_s),
        mean_token_us=round(1e6 * account.mean_token_s),
        budget_us=_microseconds(wanted.answer_s),
        budget_met=account.answer_met,
        first_token_budget_us=_microseconds(wanted.first_token_s),
        first_token_budget_met=account.first_token_met,
        token_budget_us=_microseconds(wanted.per_token_s),
        token_budget_met=account.token_met,
        path=last.answer.name,
        variant_id=last.answer.path,
        quality=quality.value if quality else None,
        perplexity=quality.perplexity if quality else None,
        quality_metric=quality_metric(model.bundle.quality),
        reused_tokens=last.answer.reused_tokens,
        replica=replica,
    )


def _microseconds(seconds: float) -> int | None:
    return None if math.isinf(seconds) else round(1e6 * seconds)


def quality_metric(table: QualityTable | None) -> str:
    """What a path's quality is and where it was measured, for people."""
    return f"{table.metric} on {table.data}" if table else ""


def describe_language_model(model: TextModel, ready: bool) -> inference_pb2.GetModelResponse:
    """For `InferenceService.GetModel`, which describes models of every kind."""
    manifest, generator = model.bundle.manifest, model.scheduler
    table = model.bundle.quality
    paths = [
        inference_pb2.TextVariant(
            variant_id=number,
            name=path.name,
            residual=path.residual.scheme,
            quality=table.variants[number].value if table else None,
            perplexity=table.variants[number].perplexity if table else None,
            planned_token_us=round(1e6 * generator.times.expected(number, 1)),
        )
        for number, path in enumerate(manifest.ways)
    ]
    return inference_pb2.GetModelResponse(
        name=model.name,
        version=model.version,
        ready=ready,
        origin=manifest.origin,
        licence=manifest.licence,
        language=inference_pb2.TextModel(
            max_model_len=generator.max_tokens,
            vocabulary_size=manifest.config.vocab_size,
            layers=manifest.config.layers,
            residual=manifest.ways[0].residual.scheme,
            tensor_parallel_size=generator.group.job.ranks,
            paths=paths,
            quality_metric=quality_metric(table),
            kv_cache_tokens=generator.pool.blocks * generator.pool.block_tokens,
        ),
    )
