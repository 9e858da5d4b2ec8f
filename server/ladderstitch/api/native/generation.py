"""`ladderstitch.v1.GenerationService`: text generation, streamed token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import aclosing

from ladderstitch.api.deadlines import (
    Metadata,
    arrival_and_deadline,
    call_deadlines,
    message_budgets,
    resolve_deadlines,
    seconds_from_us,
    token_budgets,
)
from ladderstitch.api.status import Context, translate_errors
from ladderstitch.errors import InvalidArgument, RequestError
from ladderstitch.hosting.registry import ModelRegistry, TextModel
from ladderstitch.scheduling.generation import (
    GenerationRequest,
    GenerationUsage,
    TokenBudget,
    TokenChunk,
)
from ladderstitch.scheduling.profiles import QualityTable
from ladderstitch.scheduling.requests import check_id
from ladderstitch.scheduling.sampling import Grammar, Sampling
from ladderstitch.security.tokens import digest_of
from ladderstitch.v1 import generation_pb2 as pb
from ladderstitch.v1 import generation_pb2_grpc, inference_pb2

DEFAULT_MAX_TOKENS = 128
"""Tokens to generate unless the request sets a number."""
MAX_STOPS = 16
"""Maximum number of stop texts in a request."""
MAX_STOP_TOKENS = 128
FINISH_REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """The servicer."""

    def __init__(self, registry: ModelRegistry) -> None:
        self.registry = registry

    @translate_errors
    async def Generate(  # type: ignore[override] # grpc.aio takes coroutines that write, too
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Stream the tokens of an answer; the last response holds its accounting."""
        arrival, remaining_s = arrival_and_deadline(context)
        model = self.registry.text_model(request.model_name, request.model_version)
        metadata = context.invocation_metadata()
        try:
            grammar = await _compile_grammar(request, model)
            accepted = build_generation_request(
                request, model, arrival, remaining_s, metadata, grammar
            )
        except RequestError as error:
            model.metrics.observe_rejection(error.code, had_budget=False)
            raise
        async with aclosing(model.scheduler.generate(accepted)) as chunks:
            async for chunk in chunks:
                response = _build_response(request.request_id, chunk)
                if chunk.usage is not None:
                    response.finish_reason = FINISH_REASONS[chunk.finish or "stop"]
                    accounting = _build_accounting(
                        model, accepted, chunk, chunk.usage, self.registry.replica
                    )
                    response.accounting.CopyFrom(accounting)
                await context.write(response)


def build_generation_request(
    request: pb.GenerateRequest,
    model: TextModel,
    arrival: float,
    remaining_s: float | None,
    metadata: Metadata,
    grammar: Grammar | None = None,
) -> GenerationRequest:
    """Return the request for the scheduler.

    `remaining_s` is the time from the arrival to the gRPC deadline, None without one. Raises
    `InvalidArgument` that names the wrong field.
    """
    check_id("request_id", request.request_id)
    if len(request.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidArgument(
            "stop_token_ids",
            f"expected at most {MAX_STOP_TOKENS}, got {len(request.stop_token_ids)}",
        )
    if len(request.stop) > MAX_STOPS:
        raise InvalidArgument(
            "stop", f"expected at most {MAX_STOPS} texts, got {len(request.stop)}"
        )
    budget, hard_deadline = _read_budgets(request, arrival, remaining_s, metadata)
    tokens = _read_prompt(request, model)
    default_max_tokens = min(DEFAULT_MAX_TOKENS, model.scheduler.max_tokens - len(tokens))
    return GenerationRequest(
        tokens=tokens,
        arrival=arrival,
        max_tokens=request.max_tokens if request.HasField("max_tokens") else default_max_tokens,
        sampling=_read_sampling(request),
        stop=tuple(request.stop),
        hard_deadline=hard_deadline,
        budget=budget,
        min_quality=request.min_quality,
        variant=request.variant_id if request.HasField("variant_id") else None,
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        tenant=tenant_of(metadata),
        prompt_logprobs=request.prompt_logprobs if request.HasField("prompt_logprobs") else None,
        min_tokens=request.min_tokens,
        stop_tokens=tuple(request.stop_token_ids),
        ignore_end_tokens=request.ignore_end_tokens,
        grammar=grammar,
        answered=tuple(request.answer_so_far.token_ids),
        first_token_s=_first_token_s(request.answer_so_far),
    )


def _read_sampling(request: pb.GenerateRequest) -> Sampling:
    is_penalised = request.HasField("repetition_penalty")
    return Sampling(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p if request.HasField("top_p") else 1.0,
        seed=request.seed if request.HasField("seed") else None,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty if is_penalised else 1.0,
        logit_bias=tuple((entry.token_id, entry.bias) for entry in request.logit_bias),
    )


async def _compile_grammar(request: pb.GenerateRequest, model: TextModel) -> Grammar | None:
    """Return the grammar of the answer; None without one."""
    kind = request.WhichOneof("grammar")
    if kind is None:
        return None
    source, compiler = getattr(request, kind), model.scheduler.grammars
    return await compiler.compile_in_thread(kind, kind, source)


def _first_token_s(answer: pb.AnswerSoFar) -> float | None:
    if not answer.token_ids or not answer.HasField("first_token_us"):
        return None
    return seconds_from_us("answer_so_far.first_token_us", answer.first_token_us)


def tenant_of(metadata: Metadata) -> str:
    """Return the tenant of a call: a digest of its authorization, empty without one.

    Only requests of one tenant share cached prefixes.
    """
    for key, value in metadata:
        if key == "authorization":
            return digest_of(value if isinstance(value, str) else value.decode(errors="replace"))
    return ""


def _read_budgets(
    request: pb.GenerateRequest,
    arrival: float,
    remaining_s: float | None,
    metadata: Metadata,
) -> tuple[TokenBudget, float]:
    """Return the soft budgets in seconds, and the hard deadline on the clock of `arrival`."""
    budget_us = request.latency_budget_us if request.HasField("latency_budget_us") else None
    budgets = call_deadlines(remaining_s, metadata, None)
    budgets += message_budgets(budget_us, request.hard_deadline)
    deadlines = resolve_deadlines(arrival, budgets)
    first_s, token_s = token_budgets(metadata)
    if request.HasField("first_token_budget_us"):
        field = "first_token_budget_us"
        first_s = min(first_s, seconds_from_us(field, request.first_token_budget_us))
    if request.HasField("token_budget_us"):
        token_s = min(token_s, seconds_from_us("token_budget_us", request.token_budget_us))
    return TokenBudget(first_s, token_s, deadlines.soft - arrival), deadlines.hard


def _read_prompt(request: pb.GenerateRequest, model: TextModel) -> tuple[int, ...]:
    match request.WhichOneof("prompt"):
        case "text":
            return model.tokenise("text", request.text)
        case "tokens":
            model.check_prompt_length(request.tokens.ids)
            return tuple(request.tokens.ids)
    raise InvalidArgument("prompt", "expected text or tokens to be set, got neither")


def _build_response(request_id: str, chunk: TokenChunk) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        index=chunk.index,
        token_id=chunk.token,
        text=chunk.text,
        request_id=request_id,
        logprob=chunk.logprob,
        top_logprobs=_top_logprobs(chunk.alternatives),
        prompt_tokens=[
            pb.PromptToken(
                token_id=scored.token,
                logprob=scored.logprob,
                top_logprobs=_top_logprobs(scored.alternatives),
            )
            for scored in chunk.prompt
        ],
    )


def _top_logprobs(alternatives: Sequence[tuple[int, float]]) -> list[pb.TokenLogprob]:
    return [pb.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in alternatives]


def _build_accounting(
    model: TextModel,
    request: GenerationRequest,
    last: TokenChunk,
    usage: GenerationUsage,
    replica: str,
) -> pb.GenerationAccounting:
    budget, info, quality = request.budget, last.answer, last.answer.quality
    return pb.GenerationAccounting(
        prompt_tokens=usage.prompt_tokens,
        generated_tokens=usage.generated_tokens,
        queue_us=round(1e6 * usage.queue_s),
        first_token_us=round(1e6 * usage.first_token_s),
        total_us=round(1e6 * usage.total_s),
        mean_token_us=round(1e6 * usage.mean_token_s),
        budget_us=_budget_microseconds(budget.answer_s),
        budget_met=usage.answer_met,
        first_token_budget_us=_budget_microseconds(budget.first_token_s),
        first_token_budget_met=usage.first_token_met,
        token_budget_us=_budget_microseconds(budget.per_token_s),
        token_budget_met=usage.token_met,
        variant_name=info.name,
        variant_id=info.variant,
        quality=quality.value if quality else None,
        perplexity=quality.perplexity if quality else None,
        quality_metric=quality_metric(model.bundle.quality),
        reused_tokens=info.reused_tokens,
        replica=replica,
        spans=[
            pb.TokenSpan(
                variant_id=span.variant,
                variant_name=span.name,
                tokens=span.num_tokens,
                cache=span.cache,
                penalty_nats=span.penalty_nats,
            )
            for span in info.spans
        ],
    )


def _budget_microseconds(seconds: float) -> int | None:
    return None if math.isinf(seconds) else round(1e6 * seconds)


def describe_text_model(model: TextModel, ready: bool) -> inference_pb2.GetModelResponse:
    """Return the description of a language model for `InferenceService.GetModel`."""
    manifest, scheduler = model.bundle.manifest, model.scheduler
    blocks = scheduler.block_manager
    return inference_pb2.GetModelResponse(
        name=model.name,
        version=model.version,
        ready=ready,
        origin=manifest.origin,
        licence=manifest.licence,
        language=inference_pb2.TextModel(
            max_model_len=scheduler.max_tokens,
            vocabulary_size=manifest.config.vocab_size,
            layers=manifest.config.layers,
            residual=manifest.variants[0].residual.scheme,
            tensor_parallel_size=scheduler.group.rank_config.ranks,
            variants=[_describe_variant(model, number) for number in range(len(manifest.variants))],
            quality_metric=quality_metric(model.bundle.quality),
            kv_cache_tokens=blocks.num_blocks * blocks.block_tokens,
        ),
    )


def _describe_variant(model: TextModel, number: int) -> inference_pb2.TextVariant:
    variant, table = model.bundle.manifest.variants[number], model.bundle.quality
    return inference_pb2.TextVariant(
        variant_id=number,
        name=variant.name,
        residual=variant.residual.scheme,
        quality=table.variants[number].value if table else None,
        perplexity=table.variants[number].perplexity if table else None,
        planned_token_us=round(1e6 * model.scheduler.times.expected(number, 1)),
    )


def quality_metric(table: QualityTable | None) -> str:
    """Return the metric and the data of a quality table for display; empty without a table."""
    return f"{table.metric} on {table.data}" if table else ""
