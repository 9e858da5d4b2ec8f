"""The command `generate`: text from a running server, or from a model loaded in this process."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import (
    Address,
    MinQuality,
    Variant,
    connect,
    err,
    exit_on_failure,
    format_ms,
    parse_duration,
    user_errors,
)
from ladderstitch.client import TextChunk
from ladderstitch.client.calls import DEFAULT_ADDRESS
from ladderstitch.errors import RequestError
from ladderstitch.scheduling.requests import GenerationRequest, Sampling, TokenBudget

if TYPE_CHECKING:
    from ladderstitch.client.messages import GenerateOptions

CALL_TIMEOUT_S = 600.0
LOCAL_MODEL = "smollm2"
"""The model of `--local` unless another one is named."""


Temperature = Annotated[
    float, typer.Option(help="Sampling temperature (0: always the most likely token).")
]
TopK = Annotated[int, typer.Option(help="Sample from the k most likely tokens (0: off).")]
TopP = Annotated[
    float, typer.Option(help="Sample from the most likely tokens of this total probability.")
]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the sampling; equal seeds give equal tokens.")
]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text before which the answer ends; repeatable.")
]
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
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    budget: Budget = None,
    first_token: FirstToken = None,
    per_token: PerToken = None,
    min_quality: MinQuality = None,
    variant: Variant = None,
    model: TextModelName = "",
    local: Local = False,
    ranks: Ranks = 1,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Continue a prompt with a language model, printed token by token.

    Start a server first: `ladderstitch fetch smollm2`, then `ladderstitch serve --model smollm2`.
    Or use `--local`. The server answers with the best variant that the budgets allow.
    """
    with user_errors():
        options: GenerateOptions = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "stop": tuple(stop or ()),
            "budget_s": _parse_budget(budget, "budget"),
            "first_token_budget_s": _parse_budget(first_token, "first-token"),
            "token_budget_s": _parse_budget(per_token, "per-token"),
            "min_quality": min_quality,
            "variant": variant,
        }
        if local:
            asyncio.run(_generate_locally(prompt, model or LOCAL_MODEL, ranks, options))
        else:
            _generate_remotely(context, address, prompt, model, options)


def _parse_budget(text: str | None, option: str) -> float | None:
    return parse_duration(text, option) if text else None


def _generate_remotely(
    context: typer.Context, address: str, prompt: str, model: str, options: GenerateOptions
) -> None:
    last: TextChunk | None = None
    options["model"] = model
    with exit_on_failure(address), connect(context, address, CALL_TIMEOUT_S) as client:
        started = time.monotonic()
        for last in client.generate(prompt, **options):
            typer.echo(last.text, nl=False)
    typer.echo()
    if last is not None:
        _print_rate(last.index + 1, time.monotonic() - started)
        _print_accounting(last, options)


async def _generate_locally(prompt: str, model: str, ranks: int, options: GenerateOptions) -> None:
    """Load a model in this process and print its answer."""
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.text.engine.rank_config import RankConfig
    from ladderstitch.text.engine.rank_group import RankGroup
    from ladderstitch.text.scheduler.scheduler import TextScheduler

    bundle = TextBundle.load(find_bundle(model))
    tokenizer, manifest = bundle.tokenizer(), bundle.manifest
    tokens = tuple(tokenizer.encode(prompt))
    max_model_len = len(tokens) + (options["max_tokens"] or 0)
    group = RankGroup(RankConfig.of(bundle, ranks=ranks, max_model_len=max_model_len))
    try:
        await group.start()
        names = [variant.name for variant in manifest.variants]
        scheduler = TextScheduler(
            group,
            tokenizer,
            manifest.end_tokens,
            bundle.quality,
            names,
            by_name=manifest.adapters,
            switches=bundle.switches,
        )
        request = _local_request(tokens, options)
        count = 0
        try:
            async with aclosing(scheduler.generate(request)) as chunks:
                async for chunk in chunks:
                    typer.echo(chunk.text, nl=False)
                    count += 1
        finally:
            await scheduler.close()
        typer.echo()
        _print_rate(count, time.monotonic() - request.arrival)
    except RequestError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    finally:
        await group.close()


def _local_request(tokens: tuple[int, ...], options: GenerateOptions) -> GenerationRequest:
    """Return the request for a scheduler in this process; its budget is a hard deadline."""
    arrival = time.monotonic()
    return GenerationRequest(
        tokens=tokens,
        arrival=arrival,
        max_tokens=options["max_tokens"] or 0,
        sampling=Sampling(
            temperature=options["temperature"],
            top_k=options["top_k"],
            top_p=1.0 if options["top_p"] is None else options["top_p"],
            seed=options["seed"],
        ),
        stop=tuple(options["stop"]),
        hard_deadline=arrival + _or_infinity(options["budget_s"]),
        budget=TokenBudget(
            first_token_s=_or_infinity(options["first_token_budget_s"]),
            per_token_s=_or_infinity(options["token_budget_s"]),
        ),
        min_quality=options["min_quality"] or 0.0,
        variant=options["variant"],
    )


def _or_infinity(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


def _print_accounting(last: TextChunk, options: GenerateOptions) -> None:
    cost = last.accounting
    if cost is None:
        return
    quality = f", {cost.quality_metric} {cost.quality:.3f}" if cost.HasField("quality") else ""
    names = [
        f"{span.variant_name} ({span.tokens} tokens{f', cache {span.cache}' if span.cache else ''})"
        for span in cost.spans
    ]
    variants = ", then ".join(names) if len(names) > 1 else cost.variant_name
    err.print(f"variant {variants}{quality}")
    for name, budget_s, met, took_us in (
        ("whole answer", options["budget_s"], cost.budget_met, cost.total_us),
        (
            "first token",
            options["first_token_budget_s"],
            cost.first_token_budget_met,
            cost.first_token_us,
        ),
        ("mean per token", options["token_budget_s"], cost.token_budget_met, cost.mean_token_us),
    ):
        if budget_s is not None:
            result = "met" if met else "missed"
            took, budget = format_ms(took_us / 1e6, budget_s)
            if took == budget and not met:  # the accounting has whole microseconds
                took = f"just over {took}"
            err.print(f"{name}: {took}, budget of {budget} {result}", highlight=False)


def _print_rate(tokens: int, seconds: float) -> None:
    err.print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(rich_help_panel="Call a server")(generate)
