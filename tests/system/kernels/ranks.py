"""Ranks as processes over one shared mapping, with delayed memory and planted bugs."""

from __future__ import annotations

import multiprocessing as mp
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from tests.system.kernels.mutants import Mutant, write_mutant

START_TIMEOUT_S = 600.0
"""Guards against hanging, also on the slowest machine."""
DELAY_FACTORS = (1, 4, 16)
"""Factors of delays: on a slow machine peers need longer to get ahead of a delayed rank."""


@dataclass(frozen=True)
class Delay:
    """A delay of memory accesses of one kind: the ranks, the probability and the seconds."""

    access: str
    """`load`, `store` or `atomic`."""
    ranks: tuple[int, ...]
    chance: float = 0.2
    seconds: float = 0.01
    kernel: str = ""
    """The prefix of the names of kernels that are delayed; empty: all kernels."""


def scale_delays(delays: tuple[Delay, ...], factor: float) -> tuple[Delay, ...]:
    """Return the same delays, `factor` times as long."""
    return tuple(replace(delay, seconds=factor * delay.seconds) for delay in delays)


@dataclass(frozen=True)
class RankContext:
    """The arguments that the work of a rank gets."""

    folder: Path
    rank: int
    ranks: int
    barrier: Barrier


def run_ranks(
    work: Callable[..., Any],
    ranks: int,
    *args: object,
    delays: tuple[Delay, ...] = (),
    mutant: Mutant | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> list[Any]:
    """Run `work(context, *args)` in a process per rank and return the results in order of rank.

    Raises the exception of a rank, and `TimeoutError` if a rank does not end within `timeout_s`. No
    process is left behind.
    """
    context = mp.get_context("spawn")
    task = pickle.dumps((work, args))  # unpickled after the mutant is on the search path
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        barrier = context.Barrier(ranks)
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            rank_context = RankContext(Path(folder), rank, ranks, barrier)
            processes.append(
                context.Process(
                    target=_run, args=(theirs, task, rank_context, delays, mutant), daemon=True
                )
            )
            pipes.append(ours)
        try:
            for process in processes:
                process.start()
            return _receive_results(pipes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def detect(
    work: Callable[..., float], *args: object, delays: tuple[Delay, ...], mutant: Mutant
) -> str:
    """Run a mutant and return how its bug is detected; empty if it is not."""
    limit_s = 10 * _measure_clean_s(work, args)
    for factor in DELAY_FACTORS:
        try:
            worst = max(
                run_ranks(
                    work,
                    2,
                    *args,
                    delays=scale_delays(delays, factor),
                    mutant=mutant,
                    timeout_s=factor * limit_s,
                )
            )
        except TimeoutError:
            return "a rank waits forever"
        if worst > 1e-3:
            return f"an error of {worst:.1e}"
    return ""


@cache
def _measure_clean_s(work: Callable[..., float], args: tuple[object, ...]) -> float:
    """Return the seconds of the same work without delays and bugs, including process starts."""
    started = time.monotonic()
    run_ranks(work, 2, *args)
    return time.monotonic() - started


def _receive_results(pipes: list[Any], timeout_s: float) -> list[Any]:
    for pipe in pipes:
        if not pipe.poll(START_TIMEOUT_S) or pipe.recv() != "ready":
            raise RuntimeError("a rank did not start")
    end = time.monotonic() + timeout_s
    results = []
    for pipe in pipes:
        if not pipe.poll(max(0.0, end - time.monotonic())):
            raise TimeoutError("a rank waits forever")
        error, result = pipe.recv()
        if error is not None:
            raise error
        results.append(result)
    return results


def _run(
    pipe: Any,
    task: bytes,
    context: RankContext,
    delays: tuple[Delay, ...],
    mutant: Mutant | None,
) -> None:
    torch.set_num_threads(1)
    if mutant is not None:
        assert "ladderstitch_kernels" not in sys.modules, "imported before the mutant was written"
        folder = context.folder / f"mutant-{context.rank}"
        write_mutant(mutant, folder)
        sys.path.insert(0, str(folder))
    _install_delays(delays, context.rank)
    context.barrier.wait(START_TIMEOUT_S)
    pipe.send("ready")
    work, args = pickle.loads(task)
    try:
        pipe.send((None, work(context, *args)))
    except Exception as error:
        pipe.send((error, None))


def _install_delays(delays: tuple[Delay, ...], rank: int) -> None:
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    generator = random.Random(rank)
    methods = {
        "load": "create_masked_load",
        "store": "create_masked_store",
        "atomic": "create_atomic_rmw",
    }
    for delay in delays:
        if rank in delay.ranks:
            name = methods[delay.access]
            setattr(builder, name, _delayed(getattr(builder, name), delay, generator))


def _delayed(
    access: Callable[..., Any], delay: Delay, generator: random.Random
) -> Callable[..., Any]:
    def delayed_access(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe()
        inside = not delay.kernel
        while caller is not None and not inside:
            inside = caller.f_code.co_name.startswith(delay.kernel)
            caller = caller.f_back  # type: ignore[assignment]  # the outermost has none
        if inside and generator.random() < delay.chance:
            time.sleep(delay.seconds)
        return access(*args, **kwargs)

    return delayed_access
