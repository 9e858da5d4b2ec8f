"""`ladderstitch generate`: text from a running server, or from a model loaded here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated

import typer

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import connect, err, user_errors
from ladderstitch.cli.predict import DEFAULT_ADDRESS, parse_duration, reported
from ladderstitch.client import TextChunk
from ladderstitch.errors import RequestError
from ladderstitch.scheduling.requests import GenerationRequest, Sampling
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.scheduler.scheduler import TextScheduler


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among this share of probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.")] = None,
    budget: Annotated[str | None, typer.Option(help="For the whole answer, e.g. 2s.")] = None,
    first_token: Annotated[
        str | None, typer.Option(help="Budget of the first token, e.g. 300ms.")
    ] = None,
    per_token: Annotated[
        str | None, typer.Option(help="Budget of the mean time between tokens, e.g. 40ms.")
    ] = None,
    min_quality: Annotated[
        float | None, typer.Option(help="Refuse rather than answer below this quality, 0 to 1.")
    ] = None,
    variant: Annotated[int | None, typer.Option(help="Take this path whatever the budget.")] = None,
    model: Annotated[
        str, typer.Option(help="Model's name; default: the server's only one, or smollm2.")
    ] = "",
    local: Annotated[bool, typer.Option("--local", help="Load the model here, no server.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="With --local: ranks to split over.")] = 1,
    address: Annotated[str, typer.Option(help="host:port of the server.")] = DEFAULT_ADDRESS,
) -> None:
    """Go on from a prompt with a language model, token by token.

    `ladderstitch fetch smollm2` and `ladderstitch serve --model smollm2` first; or `--local`. A
    model with several paths answers by the best one that the budgets allow.
    """
    with user_errors():
        budget_s, first_s, token_s = (
            parse_duration(text) if text else None for text in (budget, first_token, per_token)
        )
        sampling = Sampling(temperature, top_k, top_p, seed)
        stops = tuple(stop or ())
        if local:
            bundle = TextBundle.load(find_bundle(model or "smollm2"))
            tokens = tuple(bundle.tokenizer().encode(prompt))
            arrival = time.monotonic()
            limit = arrival + budget_s if budget_s is not None else float("inf")
            request = GenerationRequest(tokens, arrival, max_tokens, sampling, stops, limit)
            asyncio.run(_generate_here(bundle, request, ranks))
            return
        with reported(address), connect(context, address, timeout_s=600) as client:
            started, last = time.monotonic(), None
            for last in client.generate(
                prompt,
                model=model,
                max_tokens=max_tokens,
                budget_s=budget_s,
                first_token_budget_s=first_s,
                token_budget_s=token_s,
                min_quality=min_quality,
                variant=variant,
                stop=stops,
                **asdict(sampling),
            ):
                typer.echo(last.text, nl=False)
        typer.echo()
        if last is not None:
            asked = {"budget": budget_s, "first_token": first_s, "token": token_s}
            _summarise(last, time.monotonic() - started, asked)


async def _generate_here(bundle: TextBundle, request: GenerationRequest, ranks: int) -> None:
    job = RankConfig.of(bundle, ranks=ranks, max_model_len=len(request.tokens) + request.max_tokens)
    group = RankGroup(job)
    try:
        await group.start()
        generator = TextScheduler(group, bundle.tokenizer(), bundle.manifest.end_tokens)
        started, count = time.monotonic(), 0
        async with aclosing(generator.generate(request)) as pieces:
            async for piece in pieces:
                typer.echo(piece.text, nl=False)
                count += 1
        typer.echo()
        _say(count, time.monotonic() - started)
    except RequestError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    finally:
        await group.close()


def _summarise(last: TextChunk, seconds: float, asked: Mapping[str, float | None]) -> None:
    _say(last.index + 1, seconds)
    cost = last.accounting
    if cost is None:
        return
    quality = f", {cost.quality_metric} {cost.quality:.3f}" if cost.HasField("quality") else ""
    err.print(f"path {cost.path}{quality}")
    for name, what, met, took_us in (
        ("budget", "whole answer", cost.budget_met, cost.total_us),
        ("first_token", "first token", cost.first_token_budget_met, cost.first_token_us),
        ("token", "mean per token", cost.token_budget_met, cost.mean_token_us),
    ):
        wanted_s = asked[name]
        if wanted_s is not None:
            told = "met" if met else "missed"
            err.print(f"{what}: {took_us / 1e3:.0f} ms, budget of {1e3 * wanted_s:.0f} ms {told}")


def _say(tokens: int, seconds: float) -> None:
    err.print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s")


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Call a server")(generate)
