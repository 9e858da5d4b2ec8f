"""The command `generate`: text from a running server, or from a model loaded in this process."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ladderstitch.addresses import DEFAULT_ADDRESS
from ladderstitch.cli import sampling
from ladderstitch.cli.console import (
    MISSED,
    Address,
    Json,
    MinQuality,
    RequireMet,
    Variant,
    connect,
    err,
    exit_on_failure,
    parse_duration,
    user_errors,
)
from ladderstitch.cli.output import format_budget, format_count, format_total, print_json
from ladderstitch.errors import ConfigError

if TYPE_CHECKING:
    from ladderstitch.client import TextChunk
    from ladderstitch.client.generation import GenerateOptions

CALL_TIMEOUT_S = 600.0
LOCAL_MODEL = "smollm2"
"""The model of `--local` unless another one is named."""


Budget = Annotated[str | None, typer.Option(help="Latency budget of the whole answer, e.g. 2s.")]
FirstToken = Annotated[
    str | None, typer.Option(help="Latency budget of the first token, e.g. 300ms.")
]
PerToken = Annotated[
    str | None, typer.Option(help="Budget of the mean time between tokens, e.g. 40ms.")
]
TextModelName = Annotated[
    str,
    typer.Option(help="Name of the model (default: the server's only one; with --local: smollm2)."),
]
Local = Annotated[
    bool, typer.Option("--local", help="Load the model in this process; use no server.")
]
Ranks = Annotated[
    int, typer.Option(min=1, help="With --local: number of processes to split the model over.")
]


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.")] = 128,
    temperature: sampling.Temperature = 0.0,
    top_k: sampling.TopK = 0,
    top_p: sampling.TopP = 1.0,
    min_p: sampling.MinP = 0.0,
    seed: sampling.Seed = None,
    presence_penalty: sampling.PresencePenalty = 0.0,
    frequency_penalty: sampling.FrequencyPenalty = 0.0,
    repetition_penalty: sampling.RepetitionPenalty = None,
    logit_bias: sampling.LogitBias = None,
    stop: sampling.Stop = None,
    stop_token: sampling.StopTokens = None,
    min_tokens: sampling.MinTokens = 0,
    ignore_end: sampling.IgnoreEnd = False,
    json_schema: sampling.JsonSchema = None,
    regex: sampling.Regex = None,
    budget: Budget = None,
    first_token: FirstToken = None,
    per_token: PerToken = None,
    min_quality: MinQuality = None,
    variant: Variant = None,
    model: TextModelName = "",
    local: Local = False,
    ranks: Ranks = 1,
    require_met: RequireMet = False,
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Continue a prompt with a language model.

    The answer is printed token by token. The server answers with the best variant that the budgets
    allow. Start one first: `ladderstitch serve --model elastic-text` (a small model that needs no
    download), or `ladderstitch fetch smollm2` and `ladderstitch serve --model smollm2`. Or use
    `--local`.
    """
    with user_errors():
        options: GenerateOptions = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "repetition_penalty": repetition_penalty,
            "logit_bias": sampling.parse_logit_bias(logit_bias or ()),
            "stop": tuple(stop or ()),
            "stop_token_ids": tuple(stop_token or ()),
            "min_tokens": min_tokens,
            "ignore_end_tokens": ignore_end,
            "budget_s": _parse_budget(budget, "budget"),
            "first_token_budget_s": _parse_budget(first_token, "first-token"),
            "token_budget_s": _parse_budget(per_token, "per-token"),
            "min_quality": min_quality,
            "variant": variant,
            "json_schema": sampling.read_schema(json_schema, regex),
            "regex": regex,
        }
        if local:
            if as_json or require_met:
                raise ConfigError("local: expected neither --json nor --require-met along with it")
            _generate_in_this_process(prompt, model or LOCAL_MODEL, ranks, options)
            return
    options["model"] = model
    seconds, chunks = _generate_remotely(context, address, prompt, options, show=not as_json)
    budgets = _budgets(chunks[-1], options) if chunks else []
    if as_json:
        print_json(_answer_record(chunks, seconds, budgets))
    elif chunks:
        print_rate(len(chunks), seconds)
        _print_accounting(chunks[-1], budgets)
    if require_met and any(budget["met"] is False for budget in budgets):
        raise typer.Exit(MISSED)


def _generate_in_this_process(
    prompt: str, model: str, ranks: int, options: GenerateOptions
) -> None:
    """Run `--local`, for which the client's package lacks the module."""
    if find_spec(".generate_local", __package__) is None:
        raise ConfigError("local: expected the server's package ladderstitch, got none")
    from ladderstitch.cli.generate_local import generate_locally

    asyncio.run(generate_locally(prompt, model, ranks, options))


def _parse_budget(text: str | None, option: str) -> float | None:
    return parse_duration(text, option) if text is not None else None


def _generate_remotely(
    context: typer.Context, address: str, prompt: str, options: GenerateOptions, *, show: bool
) -> tuple[float, list[TextChunk]]:
    """Return seconds and chunks of an answer, which is printed as it arrives if `show` is set."""
    chunks: list[TextChunk] = []
    with exit_on_failure(address), connect(context, address, CALL_TIMEOUT_S) as client:
        started = time.monotonic()
        for chunk in client.generate(prompt, **options):
            chunks.append(chunk)
            if show:
                typer.echo(chunk.text, nl=False)
    if show:
        typer.echo()
    return time.monotonic() - started, chunks


def _budgets(last: TextChunk, options: GenerateOptions) -> list[dict[str, Any]]:
    """Return the budgets of a request, the times that count, and whether they were met."""
    cost = last.accounting
    if cost is None:
        return []
    whole = cost.budget_met if cost.HasField("budget_met") else None
    first = cost.first_token_budget_met if cost.HasField("first_token_budget_met") else None
    token = cost.token_budget_met if cost.HasField("token_budget_met") else None
    rows = (
        ("whole answer", "budget_s", whole, cost.total_us),
        ("first token", "first_token_budget_s", first, cost.first_token_us),
        ("mean per token", "token_budget_s", token, cost.mean_token_us),
    )
    return [
        {
            "of": of,
            "budget_s": options.get(option),
            "took_s": took_us / 1e6,
            "met": met,
        }
        for of, option, met, took_us in rows
        if options.get(option) is not None
    ]


def _answer_record(
    chunks: list[TextChunk], seconds: float, budgets: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return an answer as a document."""
    cost = chunks[-1].accounting if chunks else None
    record: dict[str, Any] = {
        "text": "".join(chunk.text for chunk in chunks),
        "tokens": [chunk.token for chunk in chunks],
        "finish": chunks[-1].finish if chunks else None,
        "seconds": seconds,
        "budgets": budgets,
    }
    if cost is not None:
        record |= {
            "variant": cost.variant_id,
            "variant_name": cost.variant_name,
            "quality": cost.quality if cost.HasField("quality") else None,
            "quality_metric": cost.quality_metric or None,
            "queue_s": cost.queue_us / 1e6,
            "first_token_s": cost.first_token_us / 1e6,
            "mean_token_s": cost.mean_token_us / 1e6,
            "total_s": cost.total_us / 1e6,
            "spans": [
                {
                    "variant_name": span.variant_name,
                    "tokens": span.tokens,
                    "cache": span.cache or None,
                }
                for span in cost.spans
            ],
        }
    return record


def _print_accounting(last: TextChunk, budgets: list[dict[str, Any]]) -> None:
    cost = last.accounting
    if cost is None:
        return
    quality = f", {cost.quality_metric} {cost.quality:.3f}" if cost.HasField("quality") else ""
    if len(cost.spans) > 1:
        tokens: Counter[str] = Counter()
        for span in cost.spans:
            tokens[span.variant_name] += span.tokens
        changes = format_count(len(cost.spans) - 1, "change")
        parts = ", ".join(f"{name} {number}" for name, number in tokens.items())
        err.print(f"{changes} of variant; tokens by variant: {parts}", highlight=False)
        quality = quality.removeprefix(", ")
        if quality:
            err.print(f"mean of all tokens: {quality}", highlight=False)
    else:
        err.print(f"variant {cost.variant_name}{quality}", highlight=False)
    for budget in budgets:
        result = {True: "met", False: "missed", None: "not measured"}[budget["met"]]
        took = format_total(budget["took_s"], budget["budget_s"])
        limit = format_budget(budget["budget_s"])
        if budget["met"] is False and budget["took_s"] <= budget["budget_s"]:
            took = f"just over {took}"  # the accounting has whole microseconds
        err.print(f"{budget['of']}: {took}, budget of {limit} {result}", highlight=False)


def print_rate(tokens: int, seconds: float) -> None:
    """Print the number of tokens and their rate on standard error."""
    number = format_count(tokens, "token")
    err.print(f"{number} in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", highlight=False)
