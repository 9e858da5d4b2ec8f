"""Latency of every path of a language model, measured as one stream is served on a CPU."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from statistics import median, quantiles

import torch
from rich.progress import Progress

from ladderstitch.runtime.device import versions
from ladderstitch.scheduling.profiles import Latency, LatencyProfile
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.messages import LogitsMode
from ladderstitch.training.text.calibrate import open_runner

CONTEXT_TOKENS = 128
"""Cached tokens before the tokens of a measured step."""
STEP_TOKENS = (1, 8, 64, 512)
"""Tokens of the measured steps; those that exceed the model's positions are left out."""


@torch.inference_mode()
def profile(bundle: TextBundle, rounds: int, threads: int, progress: Progress) -> LatencyProfile:
    """Return the latencies of steps of one sequence on every path.

    All paths take turns in every round, so that a change of the machine's speed affects all.
    """
    runner, names = open_runner(bundle, threads), bundle.manifest.variants
    context = min(CONTEXT_TOKENS, runner.config.max_model_len // 2)
    room = runner.config.max_model_len - context
    sizes = [size for size in STEP_TOKENS if size <= room]
    tokens = torch.arange(context + sizes[-1]) % bundle.manifest.config.vocab_size
    seconds: dict[tuple[int, int], list[float]] = {}
    task = progress.add_task("steps", total=rounds + 1)
    for number in range(rounds + 1):
        for path in range(len(names)):
            runner.run(path, tokens[:context], 0, LogitsMode.NONE)
            for size in sizes:
                started = time.perf_counter()
                runner.run(path, tokens[context : context + size], context, LogitsMode.BEST)
                if number:  # the first round is slower
                    took = time.perf_counter() - started
                    seconds.setdefault((path, size), []).append(took)
        progress.advance(task)
    return LatencyProfile(
        device="cpu",
        threads=threads,
        date=datetime.now(UTC).date().isoformat(),
        versions=versions(),
        batch_sizes=tuple(sizes),
        variants={
            path: Latency(
                median_s=tuple(median(seconds[path, size]) for size in sizes),
                p99_s=tuple(
                    max(quantiles(seconds[path, size], n=100)[-1], median(seconds[path, size]))
                    for size in sizes
                ),
            )
            for path in range(len(names))
        },
    )
