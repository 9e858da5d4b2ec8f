"""The option `--local` of `generate`: a model that is loaded in this process."""

from __future__ import annotations

import math
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

import typer

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import err
from ladderstitch.cli.generate import print_rate
from ladderstitch.errors import RequestError

if TYPE_CHECKING:
    from ladderstitch.client.generation import GenerateOptions
    from ladderstitch.scheduling.generation import GenerationRequest
    from ladderstitch.scheduling.sampling import Grammar
    from ladderstitch.text.scheduler.scheduler import TextScheduler


async def generate_locally(prompt: str, model: str, ranks: int, options: GenerateOptions) -> None:
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
        count = 0
        try:
            grammar = await _compile_grammar(scheduler, options)
            request = _local_request(tokens, options, grammar)
            async with aclosing(scheduler.generate(request)) as chunks:
                async for chunk in chunks:
                    typer.echo(chunk.text, nl=False)
                    count += 1
        finally:
            await scheduler.close()
        typer.echo()
        print_rate(count, time.monotonic() - request.arrival)
    except RequestError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from None
    finally:
        await group.close()


async def _compile_grammar(scheduler: TextScheduler, options: GenerateOptions) -> Grammar | None:
    """Return the grammar of the answer; None without one."""
    compiler = scheduler.grammars
    if (schema := options["json_schema"]) is not None:
        return await compiler.compile_in_thread("json_schema", "json_schema", str(schema))
    if (regex := options["regex"]) is not None:
        return await compiler.compile_in_thread("regex", "regex", regex)
    return None


def _local_request(
    tokens: tuple[int, ...], options: GenerateOptions, grammar: Grammar | None
) -> GenerationRequest:
    """Return the request for a scheduler in this process; its budget is a hard deadline."""
    from ladderstitch.scheduling.generation import GenerationRequest, TokenBudget
    from ladderstitch.scheduling.sampling import Sampling

    arrival, penalty = time.monotonic(), options["repetition_penalty"]
    return GenerationRequest(
        tokens=tokens,
        arrival=arrival,
        max_tokens=options["max_tokens"] or 0,
        sampling=Sampling(
            temperature=options["temperature"],
            top_k=options["top_k"],
            top_p=1.0 if options["top_p"] is None else options["top_p"],
            seed=options["seed"],
            min_p=options["min_p"],
            presence_penalty=options["presence_penalty"],
            frequency_penalty=options["frequency_penalty"],
            repetition_penalty=1.0 if penalty is None else penalty,
            logit_bias=tuple((options["logit_bias"] or {}).items()),
        ),
        stop=tuple(options["stop"]),
        stop_tokens=tuple(options["stop_token_ids"]),
        min_tokens=options["min_tokens"],
        ignore_end_tokens=options["ignore_end_tokens"],
        grammar=grammar,
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
