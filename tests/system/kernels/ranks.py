"""Ranks as processes over one shared mapping; memory may be slow, and the kernels changed."""

from __future__ import annotations

import multiprocessing as mp
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch

from tests.system.kernels.mutants import Mutant, change

START_LIMIT_S = 600.0
"""Guards against hanging, on the slowest machine, too."""
SLOWER = (1, 4, 16)
"""Factors of naps: on a slow machine peers need longer to get ahead of a napping rank."""


@dataclass(frozen=True)
class Nap:
    """Memory accesses of one kind that take longer: on which ranks, how often, how long."""

    access: str
    """`load`, `store` or `atomic`."""
    ranks: tuple[int, ...]
    chance: float = 0.2
    seconds: float = 0.01
    kernel: str = ""
    """Only in kernels whose name starts so."""


def slower(naps: tuple[Nap, ...], factor: float) -> tuple[Nap, ...]:
    """The same naps, `factor` times as long."""
    return tuple(replace(nap, seconds=factor * nap.seconds) for nap in naps)


@dataclass(frozen=True)
class Meeting:
    """What a rank's work gets."""

    folder: Path
    rank: int
    ranks: int
    barrier: Barrier


def run_ranks(
    work: Callable[..., Any],
    ranks: int,
    *args: object,
    naps: tuple[Nap, ...] = (),
    mutant: Mutant | None = None,
    timeout_s: float = START_LIMIT_S,
) -> list[Any]:
    """The results of `work(meeting, *args)` of every rank, in order.

    Raises what a rank raised, and `TimeoutError` if one does not end; no process is left behind.
    """
    context = mp.get_context("spawn")
    task = pickle.dumps((work, args))  # opened after the package has been changed
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        barrier = context.Barrier(ranks)
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            meeting = Meeting(Path(folder), rank, ranks, barrier)
            processes.append(
                context.Process(
                    target=_run, args=(theirs, task, meeting, naps, mutant), daemon=True
                )
            )
            pipes.append(ours)
        try:
            for process in processes:
                process.start()
            return _results(pipes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(pipes: list[Any], timeout_s: float) -> list[Any]:
    for pipe in pipes:
        if not pipe.poll(START_LIMIT_S) or pipe.recv() != "ready":
            raise RuntimeError("a rank did not start")
    end = time.monotonic() + timeout_s
    results = []
    for pipe in pipes:
        if not pipe.poll(max(0.0, end - time.monotonic())):
            raise TimeoutError("a rank waits for ever")
        error, result = pipe.recv()
        if error is not None:
            raise error
        results.append(result)
    return results


def _run(
    pipe: Any,
    task: bytes,
    meeting: Meeting,
    naps: tuple[Nap, ...],
    mutant: Mutant | None,
) -> None:
    torch.set_num_threads(1)
    if mutant is not None:
        assert "ladderstitch_kernels" not in sys.modules, "imported before it could be changed"
        folder = meeting.folder / f"changed-{meeting.rank}"
        change(mutant, folder)
        sys.path.insert(0, str(folder))
    _slow_down(naps, meeting.rank)
    meeting.barrier.wait(START_LIMIT_S)
    pipe.send("ready")
    work, args = pickle.loads(task)
    try:
        pipe.send((None, work(meeting, *args)))
    except Exception as error:
        pipe.send((error, None))


def _slow_down(naps: tuple[Nap, ...], rank: int) -> None:
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    generator = random.Random(rank)
    methods = {
        "load": "create_masked_load",
        "store": "create_masked_store",
        "atomic": "create_atomic_rmw",
    }
    for nap in naps:
        if rank in nap.ranks:
            name = methods[nap.access]
            setattr(builder, name, _slow(getattr(builder, name), nap, generator))


def _slow(access: Callable[..., Any], nap: Nap, generator: random.Random) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe()
        inside = not nap.kernel
        while caller is not None and not inside:
            inside = caller.f_code.co_name.startswith(nap.kernel)
            caller = caller.f_back  # type: ignore[assignment]  # the outermost has none
        if inside and generator.random() < nap.chance:
            time.sleep(nap.seconds)
        return access(*args, **kwargs)

    return slow
