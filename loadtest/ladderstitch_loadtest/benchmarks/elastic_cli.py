"""Benchmark `elastic` of language models whose answers change their stitch."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ladderstitch.bundles import find_bundle
from ladderstitch.cli.console import err, out
from ladderstitch_loadtest.servers.results_io import write

SWITCH_TOKENS = 512
"""Cached tokens of an answer whose change is timed."""


def elastic(
    model: Annotated[Path, typer.Option(help="Bundle of a family of decoders.")],
    text: Annotated[Path, typer.Option(help="Held-out text file.")],
    rounds: Annotated[int, typer.Option(min=2, help="Paired runs on real ranks.")] = 5,
    simulated: Annotated[int, typer.Option(min=2, help="Paired simulated runs.")] = 20,
    seconds: Annotated[float, typer.Option(help="Length of a run in seconds.")] = 20.0,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for NAME.json.")] = None,
) -> None:
    """Measure changes of the stitch within answers: their cost, their error, and their value.

    The value is the difference between answers that may change their stitch and answers that keep
    the one they start with, for equal arrivals, in the simulator and on real ranks.
    """
    results = asyncio.run(_measure(find_bundle(str(model)), text, rounds, seconds))
    workload = results.pop("workload")
    results["simulator"] = _simulate(workload, simulated, seconds)
    out.print_json(json.dumps(results))
    write(folder, "elastic", results)


async def _measure(path: Path, text: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Return the costs, and the value on real ranks; `workload` is for the simulator."""
    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.text.engine.rank_config import RankConfig
    from ladderstitch.text.engine.rank_group import RankGroup
    from ladderstitch.text.scheduler.scheduler import TextScheduler
    from ladderstitch.training.text.evaluate import read_tokens
    from ladderstitch_loadtest.benchmarks import elastic_answers as answers
    from ladderstitch_loadtest.benchmarks.elastic_plans import PLANS

    bundle = TextBundle.load(path)
    tokenizer, quality = bundle.tokenizer(), bundle.quality
    assert quality is not None, "a bundle with several paths is calibrated"
    tokens = read_tokens(text, tokenizer)
    results = _costs(path, tokens.tolist())
    limit = min(512, bundle.manifest.config.max_positions)
    config = RankConfig.of(bundle, max_model_len=limit, kv_cache_tokens=16_384)
    group = RankGroup(config)
    names = [variant.name for variant in bundle.manifest.variants]

    def real_scheduler() -> TextScheduler:
        scheduler = TextScheduler(group, tokenizer, (), quality, names, switches=bundle.switches)
        scheduler.times = times.copy()
        scheduler.apply_settings(scheduler.settings)
        return scheduler

    try:
        await group.start()
        first = TextScheduler(group, tokenizer, (), quality, names)
        await first.measure()
        times = first.times
        await first.close()
        workload = answers.Workload(tokens.tolist(), real_scheduler)
        results["server"] = {}
        for scenario, make_plan in PLANS.items():
            found = []
            for number in range(rounds):
                stitches = await workload.stitches()
                plan = make_plan(workload.prompts, stitches, seconds, number)
                order = list(answers.SETTINGS.items())
                pair = {
                    name: await workload.run(plan, settings)
                    for name, settings in (order if number % 2 else order[::-1])
                }
                found.append(pair)
                err.print(f"{scenario} {number + 1}/{rounds}: {answers.summarise([pair])}")
            results["server"][scenario] = answers.summarise(found)
    finally:
        await group.close()
    results["decision"] = _decisions(real_scheduler())

    def simulated_scheduler(seed: int = 0) -> TextScheduler:
        return answers.simulated_scheduler(config, times, tokenizer, quality, bundle.switches, seed)

    results["workload"] = answers.Workload(tokens.tolist(), simulated_scheduler)
    return results


def _costs(path: Path, tokens: list[int]) -> dict[str, Any]:
    """Return the times and the divergences of changes between the two ends of the frontier."""
    import torch

    from ladderstitch.text.bundle import TextBundle
    from ladderstitch.text.frontier import path_rows, read_latency
    from ladderstitch.training.text.calibrate import open_runner
    from ladderstitch.training.text.evaluate import split_windows
    from ladderstitch_loadtest.benchmarks.elastic_costs import divergence_by_mode, time_switches

    bundle = TextBundle.load(path)
    latency = read_latency(bundle)
    rows = [] if latency is None else path_rows(bundle, latency)
    best = [row for row in rows if row.on_frontier]
    runner = open_runner(bundle, 1)
    small, large = (best[0].path, best[-1].path) if best else (0, len(rows) - 1)
    text = torch.tensor(tokens)
    pairs = [(small, large), (large, small)]
    windows = split_windows(text, 320, 16)[:, :320]
    return {
        "frontier": [
            {"path": r.name, "ms_per_token": round(1e3 * r.token_s, 3), "nats": round(r.nats, 4)}
            for r in best
        ],
        "switches": time_switches(runner, text[:SWITCH_TOKENS], pairs, 15),
        "divergence": divergence_by_mode(runner, small, large, windows, 256),
    }


def _decisions(scheduler: Any) -> dict[str, float]:
    from ladderstitch_loadtest.benchmarks.elastic_costs import time_decisions

    return time_decisions(scheduler, SWITCH_TOKENS, 2000)


def _simulate(workload: Any, rounds: int, seconds: float) -> dict[str, object]:
    """Return the value in the simulator."""
    from ladderstitch_loadtest.benchmarks import elastic_answers as answers
    from ladderstitch_loadtest.benchmarks.elastic_plans import PLANS
    from ladderstitch_loadtest.simulation.virtual_time import run_simulated

    results: dict[str, object] = {}
    stitches = run_simulated(workload.stitches())
    for scenario, make_plan in PLANS.items():
        found = []
        for number in range(rounds):
            plan = make_plan(workload.prompts, stitches, seconds, 1000 + number)
            found.append(
                {
                    name: run_simulated(workload.run(plan, settings))
                    for name, settings in answers.SETTINGS.items()
                }
            )
        results[scenario] = answers.summarise(found)
    return results
