"""Benchmark of compiled execution: the served networks, whole-graph sessions and eager torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from ladderstitch.scheduling.requests import Logits, Pixels
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine.compiled import CompiledEngine
from ladderstitch.vision.engine.compiled_executor import CompiledExecutor
from ladderstitch.vision.engine.join_candidates import find_frontier
from ladderstitch.vision.engine.startup import make_config, open_engine, prepare
from ladderstitch.vision.models.executor import StitchExecutor

BATCH_SIZES = (1, 8)


@dataclass(frozen=True, slots=True)
class Compute:
    """Median milliseconds of one network and batch size; `whole` is a session of its own.

    `ratio` is `served` over `whole`, `speedup` is `eager` over `served`, and `difference` is the
    largest one of a logit: from eager float32, or for int8 from the whole graph.
    """

    variant: int
    batch_size: int
    served_ms: float
    whole_ms: float
    eager_ms: float
    ratio: float
    speedup: float
    difference: float


def open_served(bundle: VisionBundle) -> tuple[CompiledEngine, list[int]]:
    """Return the engine of a server on this machine's CPU, and the frontier that it measured."""
    config = make_config(
        bundle, runtime="onnx", device="cpu", dtype="float32", threads=1, max_batch_size=8
    )
    quality = bundle.quality
    assert quality is not None, "a bundle that can be served has one"

    async def start() -> tuple[CompiledEngine, list[int]]:
        engine = await open_engine(bundle, config, 0.0, lambda done, total: None)
        assert isinstance(engine, CompiledEngine)
        profile = await prepare(engine, bundle, quality, config, lambda done, total: None)
        return engine, find_frontier(quality, profile)

    return asyncio.run(start())


def measure(path: Path, rounds: int) -> list[Compute]:
    """Return the compute of every network on the frontier of a bundle, on one thread each."""
    torch.set_num_threads(1)
    bundle = VisionBundle.load(path)
    count = len(bundle.manifest.config.stitches())
    engine, best = open_served(bundle)
    eager = StitchExecutor(bundle.load_model())
    preprocessing = bundle.manifest.preprocessing
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    rng = np.random.default_rng(0)
    images = {size: rng.standard_normal((size, *shape), np.float32) for size in BATCH_SIZES}
    return [
        compare(
            engine.executor,
            partial(eager, stitch=variant % count),
            variant,
            images[size],
            rounds,
            is_int8=variant >= count,
        )
        for variant in best
        for size in BATCH_SIZES
    ]


def compare(
    served: CompiledExecutor,
    eager: Callable[[Tensor], Tensor],
    variant: int,
    images: Pixels,
    rounds: int,
    *,
    is_int8: bool = False,
) -> Compute:
    """Return the compute of one network, measured in turns."""
    whole = served.open_whole(variant)

    def run_eager() -> Logits:
        with torch.inference_mode():
            return eager(torch.from_numpy(images)).numpy()

    calls: dict[str, Callable[[], Logits]] = {
        "served": lambda: served(images, variant),
        "whole": lambda: whole(images),
        "eager": run_eager,
    }
    ms = time_in_turns(calls, rounds)
    # An int8 network is not meant to equal eager float32; its graph as a whole is the reference.
    reference = calls["whole"] if is_int8 else calls["eager"]
    return Compute(
        variant,
        len(images),
        round(ms["served"], 4),
        round(ms["whole"], 4),
        round(ms["eager"], 4),
        round(ms["served"] / ms["whole"], 3),
        round(ms["eager"] / ms["served"], 2),
        float(np.abs(served(images, variant) - reference()).max()),
    )


def time_in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each call; every second one of a turn is timed."""
    ms: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            call()
            started = time.perf_counter()
            call()
            if turn:  # the first turn is warm-up
                ms[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(values) for name, values in ms.items()}
