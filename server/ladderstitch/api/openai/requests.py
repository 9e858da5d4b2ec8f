"""The translation of requests of OpenAI's API to generation requests.

An option that is not supported is rejected if it would change the answer. Fields that do not change
the answer (`user`, `metadata`) and unknown ones are ignored, as other servers of this API do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ladderstitch.api.deadlines import (
    LATENCY_BUDGET_KEY,
    TPOT_BUDGET_KEY,
    TTFT_BUDGET_KEY,
    seconds_from_ms,
    seconds_from_us,
)
from ladderstitch.api.openai.bodies import ChatRequest, CompletionRequest, Prompt
from ladderstitch.api.openai.event_marks import ANSWER_FIELD
from ladderstitch.api.openai.fields import (
    MAX_CHOICES,
    SamplingFields,
)
from ladderstitch.api.openai.models import NamedModel
from ladderstitch.api.openai.tools import ToolUse
from ladderstitch.errors import InvalidArgument
from ladderstitch.hosting.registry import TextModel
from ladderstitch.scheduling.generation import GenerationRequest, TokenBudget
from ladderstitch.scheduling.sampling import Grammar

MAX_LOGPROB_VALUES = 1 << 20
"""Largest number of log probabilities of several answers together, with their alternatives."""
HARD_DEADLINE_KEY = "x-deadline-ms"
"""Header of a hard deadline, after which the answer ends with an error."""


@dataclass(frozen=True, slots=True)
class AcceptedRequest:
    """The generations that answer a request, and how its choices are made of them."""

    generations: tuple[GenerationRequest, ...]
    """`best_of` generations of each prompt, in order."""
    prompts: tuple[Prompt, ...]
    n: int = 1
    """Choices of each prompt."""
    echo: bool = False
    """Whether a choice begins with its prompt."""
    only_echo: bool = False
    """Whether a choice is the prompt alone; its generations have a token that is dropped."""
    tools: ToolUse | None = None
    reports_logprobs: bool = False

    @property
    def best_of(self) -> int:
        """Generations of each prompt, the best `n` of which are choices."""
        return len(self.generations) // len(self.prompts)

    def prompt_of(self, generation: int) -> Prompt:
        """Return the prompt of a generation."""
        return self.prompts[generation // self.best_of]


async def accept_request(
    body: CompletionRequest | ChatRequest,
    named: NamedModel,
    headers: Mapping[str, str],
    arrival: float,
    tenant: str,
) -> AcceptedRequest:
    """Return the generations that answer a request.

    Raises `InvalidArgument` that names the wrong field or header.
    """
    body.check_unsupported()
    candidates, used = body.num_candidates, body.tool_use(named.model)
    prompts = await body.read_prompts(named.model)
    if candidates * len(prompts) > MAX_CHOICES:
        raise InvalidArgument(
            "n", f"expected at most {MAX_CHOICES} answers, got {candidates * len(prompts)}"
        )
    grammar = await _compile_grammar(body, named.model, used)
    echo, only_echo = False, False
    if isinstance(body, CompletionRequest):
        echo, only_echo = bool(body.echo), body.only_echo
    first = _first_generation(body, named, headers, arrival, tenant)
    if first.answered and not (body.stream and candidates * len(prompts) == 1):
        raise InvalidArgument(ANSWER_FIELD, "expected the stream of one answer, got another one")
    defaults, available = named.model.bundle.manifest.sampling, named.model.scheduler.max_tokens
    ranked = candidates > (body.n or 1)
    generations = [
        replace(
            first,
            tokens=prompt.tokens,
            max_tokens=body.max_new_tokens(available - len(prompt.tokens)),
            sampling=body.sampling(defaults, number),
            logprobs=0 if ranked and first.logprobs is None else first.logprobs,
            prompt_logprobs=first.logprobs if echo else None,
            grammar=grammar,
        )
        for prompt in prompts
        for number in range(candidates)
    ]
    _check_number_of_logprobs(generations)
    return AcceptedRequest(
        tuple(generations),
        tuple(prompts),
        body.n or 1,
        echo,
        only_echo,
        used,
        body.num_logprobs is not None,
    )


def _check_number_of_logprobs(generations: Sequence[GenerationRequest]) -> None:
    """Raise `InvalidArgument` if several answers may have too many log probabilities together."""
    most = sum(
        (1 + count) * num_tokens
        for request in generations
        for count, num_tokens in (
            (request.logprobs, request.max_tokens),
            (request.prompt_logprobs, len(request.tokens)),
        )
        if count
    )
    if len(generations) > 1 and most > MAX_LOGPROB_VALUES:
        raise InvalidArgument(
            "logprobs",
            f"expected at most {MAX_LOGPROB_VALUES} log probabilities of all answers together, "
            f"got up to {most}; lower n, max_tokens or logprobs, or send fewer prompts",
        )


async def _compile_grammar(
    body: SamplingFields, model: TextModel, used: ToolUse | None
) -> Grammar | None:
    compiler = model.scheduler.grammars
    if used is not None and used.schema is not None:
        return await compiler.compile_in_thread("tools", "json_schema", used.schema)
    source = None if body.response_format is None else body.response_format.schema_text()
    if source is None:
        return None
    return await compiler.compile_in_thread("response_format", "json_schema", source)


def _first_generation(
    body: CompletionRequest | ChatRequest,
    named: NamedModel,
    headers: Mapping[str, str],
    arrival: float,
    tenant: str,
) -> GenerationRequest:
    """Return what all generations of a request have in common."""
    variant = named.variant
    if variant is not None and body.variant_id not in (None, variant):
        raise InvalidArgument(
            "variant_id", f"expected {variant}, that of {named.id}, got {body.variant_id}"
        )
    limit_s = _read_budget(headers, HARD_DEADLINE_KEY)
    answer_s = min(_read_budget(headers, LATENCY_BUDGET_KEY), limit_s)
    return GenerationRequest(
        tokens=(),
        arrival=arrival,
        stop=body.stop_texts(),
        hard_deadline=arrival + limit_s,
        budget=TokenBudget(
            _read_budget(headers, TTFT_BUDGET_KEY),
            _read_budget(headers, TPOT_BUDGET_KEY),
            answer_s,
        ),
        min_quality=body.min_quality or 0.0,
        variant=body.variant_id if variant is None else variant,
        logprobs=body.num_logprobs,
        min_tokens=body.min_tokens or 0,
        stop_tokens=tuple(body.stop_token_ids or ()),
        ignore_end_tokens=bool(body.ignore_eos),
        tenant=tenant,
        answered=() if body.answer_so_far is None else tuple(body.answer_so_far.token_ids),
        first_token_s=_read_first_token(body),
    )


def _read_first_token(body: SamplingFields) -> float | None:
    """Return the seconds from the arrival to the first token of another replica's answer."""
    if body.answer_so_far is None or body.answer_so_far.first_token_us is None:
        return None
    field = f"{ANSWER_FIELD}.first_token_us"
    return seconds_from_us(field, body.answer_so_far.first_token_us)


def _read_budget(headers: Mapping[str, str], key: str) -> float:
    """Return the seconds of a budget in the headers, or infinity without one."""
    return seconds_from_ms(key, headers[key]) if key in headers else math.inf
