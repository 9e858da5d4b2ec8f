"""Ranks that are stopped, cannot start, cannot load or fail in a pass: they are replaced.

Limits are short in these tests, and fakes make the faults; nothing depends on how fast a rank is.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ladderstitch.errors import InternalError, NonFiniteOutput, RequestError
from ladderstitch.scheduling.generation import GenerationRequest, TokenChunk
from ladderstitch.scheduling.sampling import Sampling
from ladderstitch.telemetry.metrics import Metrics
from ladderstitch.telemetry.text_metrics import TextMetrics
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine import recovery
from ladderstitch.text.engine.liveness import Liveness
from ladderstitch.text.engine.rank import SECRET_VARIABLE
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.engine.rank_handle import (
    Launcher,
    RankLost,
    RankProcess,
    launch_process,
    start_rank_process,
)
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.scheduler.scheduler import TextScheduler
from tests.support.language_models import write_tiny
from tests.system.text.test_scheduler import make_request

LIMIT_S = 300.0
PROMPT = np.arange(1, 24, dtype=np.int64)[None]
STRICT = Liveness(floor_s=1.0, slow_s=0.5, idle_check_s=0.2, abort_s=1.0)
"""Short limits. A rank that is slow by accident is replaced, too, so tests count `>=`."""


@asynccontextmanager
async def running(
    bundle: TextBundle,
    options: GroupOptions | None = None,
    launcher: Launcher = launch_process,
    **fields: object,
) -> AsyncIterator[RankGroup]:
    rank_config = RankConfig.of(
        bundle, max_model_len=64, max_batched_tokens=32, block_tokens=4, sequences=4, **fields
    )
    group = RankGroup(rank_config, options, launcher)
    try:
        await group.start()
        yield group
    finally:
        await group.close()


@asynccontextmanager
async def scheduling(
    bundle: TextBundle, group: RankGroup, metrics: Metrics
) -> AsyncIterator[TextScheduler]:
    scheduler = TextScheduler(
        group, bundle.tokenizer(), observer=TextMetrics(metrics, "m", range(1))
    )
    yield scheduler
    await scheduler.close()


async def collect(scheduler: TextScheduler, request: GenerationRequest) -> list[TokenChunk]:
    async with asyncio.timeout(LIMIT_S), aclosing(scheduler.generate(request)) as chunks:
        return [chunk async for chunk in chunks]


async def wait_until(condition: Callable[[], object], *, is_true: bool = True) -> None:
    """Wait until a function returns true (or false)."""
    async with asyncio.timeout(LIMIT_S):
        while bool(condition()) != is_true:  # noqa: ASYNC110  # of a group, which has no events
            await asyncio.sleep(0.02)


def value(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value(f"ladderstitch_{name}", {"model": "m"})


@pytest.mark.parametrize(("ranks", "link"), [(1, "auto"), (2, "shared_memory")])
async def test_rank_stopped_in_an_answer_is_replaced(
    tiny_language_bundle: TextBundle, ranks: int, link: str
) -> None:
    """The answers are those of a run without a fault, and health is false meanwhile."""
    options, metrics = GroupOptions(link=link, liveness=STRICT), Metrics()
    async with (
        running(tiny_language_bundle, options, ranks=ranks) as group,
        scheduling(tiny_language_bundle, group, metrics) as scheduler,
    ):
        requests = [make_request([n, 2, 3], 12) for n in range(3)]
        quiet = await asyncio.gather(*(collect(scheduler, each) for each in requests))
        stopped = group.pids[-1]
        os.kill(stopped, signal.SIGSTOP)
        answers = asyncio.gather(*(collect(scheduler, each) for each in requests))
        await wait_until(lambda: group.responsive, is_true=False)
        for got, expected in zip(await answers, quiet, strict=True):
            assert [chunk.token for chunk in got] == [chunk.token for chunk in expected]
        await wait_until(lambda: group.responsive)
        assert stopped not in group.pids
        with pytest.raises(ProcessLookupError):
            os.kill(stopped, 0)
        assert group.restarts >= 1
        for gauge in ("running_requests", "queue_requests", "kv_cache_usage_ratio"):
            assert value(metrics, gauge) == 0


def shown_to_others(pid: int) -> bytes:
    """Return what other processes can read of a process: its command line and environment."""
    folder = Path("/proc") / str(pid)
    return (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()


@pytest.mark.parametrize("ranks", [1, 2])
async def test_secret_is_not_shown_by_any_rank(
    tiny_language_bundle: TextBundle, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a rank, nor a spare one, nor one that replaces another shows the secret."""
    monkeypatch.setenv(SECRET_VARIABLE, "a-secret-of-another-group")
    options = GroupOptions(spares=1, secret="a-secret-of-this-group")
    async with running(tiny_language_bundle, options, ranks=ranks) as group:
        pool = group._rank_pool
        expected = await group.forward(PROMPT, 0)
        await wait_until(lambda: pool._idle)
        shown = {pid: shown_to_others(pid) for pid in (*group.pids, pool._idle[0].pid)}
        os.kill(group.pids[0], signal.SIGKILL)
        await wait_until(lambda: group.restarts)
        await asyncio.wait_for(group.wait_ready(), LIMIT_S)
        assert np.array_equal(await group.forward(PROMPT, 0), expected)
        shown |= {pid: shown_to_others(pid) for pid in group.pids}
    assert len(shown) >= ranks + 1
    for text in shown.values():
        assert pool.secret.encode() not in text
        assert SECRET_VARIABLE.encode() not in text


async def launch_by_hand(address: str, secret: str) -> RankProcess:
    """Start a rank as an operator may, with the secret in its environment."""
    command = (sys.executable, "-m", "ladderstitch.text.engine.rank", address)
    return await start_rank_process(command, "", os.environ | {SECRET_VARIABLE: secret})


async def test_rank_started_by_hand_takes_the_secret_of_its_environment(
    tiny_language_bundle: TextBundle,
) -> None:
    async with running(tiny_language_bundle, None, launch_by_hand) as group:
        assert (await group.forward(PROMPT, 0)).shape == (1, 257)


async def test_idle_rank_and_spare_that_are_stopped_are_replaced(
    tiny_language_bundle: TextBundle, caplog: pytest.LogCaptureFixture
) -> None:
    options = GroupOptions(spares=1, liveness=STRICT)
    async with running(tiny_language_bundle, options) as group:
        expected = await group.forward(PROMPT, 0)
        await wait_until(lambda: group._rank_pool._idle)
        stopped = [group.pids[0], group._rank_pool._idle[0].pid]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        await wait_until(lambda: group.restarts)
        await asyncio.wait_for(group.wait_ready(), LIMIT_S)
        assert set(group.pids).isdisjoint(stopped)
        assert np.array_equal(await group.forward(PROMPT, 0), expected)
        assert "does not react" in caplog.text


class FaultyLauncher:
    """A launcher of ranks that fails or starts a program with faults, a number of times."""

    def __init__(self, faults: Sequence[Exception | str | None]) -> None:
        """An error is raised; a program runs before the rank; after the faults, all is well."""
        self._faults = list(faults)
        self.launches = 0

    async def __call__(self, address: str, secret: str) -> RankProcess:
        """Start a rank."""
        self.launches += 1
        fault = self._faults.pop(0) if self._faults else None
        if isinstance(fault, Exception):
            raise fault
        if fault is None:
            return await launch_process(address, secret)
        program = f"from ladderstitch.text.engine import rank\n{fault}\nrank.main()"
        command = (sys.executable, "-c", program, address)
        return await start_rank_process(command, secret, dict(os.environ))


CANNOT_LOAD = """
class Broken:
    def __init__(self, assignment):
        raise MemoryError("no memory")
rank.RankEngine = Broken
"""
EXITS = "raise SystemExit(3)"


@pytest.mark.parametrize(
    "faults",
    [
        [OSError(errno.EMFILE, "Too many open files"), MemoryError(), ValueError("whatever")] * 3,
        [CANNOT_LOAD, EXITS],
    ],
    ids=["no process", "no model"],
)
async def test_rank_is_replaced_however_often_that_fails(
    tiny_language_bundle: TextBundle,
    faults: list[Exception | str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "LAST_RETRY_S", 0.05)
    launcher = FaultyLauncher([None, *faults])
    async with running(tiny_language_bundle, None, launcher) as group:
        expected = await group.forward(PROMPT, 0)
        os.kill(group.pids[0], signal.SIGKILL)
        await wait_until(lambda: group.ready, is_true=False)
        with pytest.raises(RankLost):
            await group.forward(PROMPT, 0)
        assert not group.ready
        await asyncio.wait_for(group.wait_ready(), LIMIT_S)
        assert launcher.launches == len(faults) + 2
        assert np.array_equal(await group.forward(PROMPT, 0), expected)
        assert group.restarts == 1


async def test_ranks_acquired_in_a_failed_attempt_get_their_model(
    tiny_language_bundle: TextBundle,
) -> None:
    """Both ranks die; one of them has registered when the launch of the other one fails."""
    launcher = FaultyLauncher([None, None, None, OSError(errno.EMFILE, "Too many open files")])
    async with running(tiny_language_bundle, None, launcher, ranks=2) as group:
        expected = await group.forward(PROMPT, 0)
        for pid in group.pids:
            os.kill(pid, signal.SIGKILL)
        await wait_until(lambda: group.ready, is_true=False)
        await asyncio.wait_for(group.wait_ready(), LIMIT_S)
        assert launcher.launches > 4
        assert np.array_equal(await group.forward(PROMPT, 0), expected)


async def test_recovery_that_is_cancelled_starts_again(tiny_language_bundle: TextBundle) -> None:
    async with running(tiny_language_bundle) as group:
        os.kill(group.pids[0], signal.SIGKILL)
        await wait_until(lambda: group._recovery.task)
        assert group._recovery.task is not None
        group._recovery.task.cancel()
        await asyncio.wait_for(group.wait_ready(), LIMIT_S)
        assert (await group.forward(PROMPT, 0)).shape == (1, 257)


FAILS_IN_PASS = """
from ladderstitch.text.model.mlp import Mlp
call = Mlp.__call__
def fail(mlp, x):
    if len(x) == 13:
        raise MemoryError("no memory for 13 rows")
    return call(mlp, x)
Mlp.__call__ = fail
"""


@pytest.mark.parametrize("link", ["shared_memory", "tcp"])
async def test_pass_that_fails_on_one_rank_leaves_no_partial(
    tiny_language_bundle: TextBundle, link: str
) -> None:
    """The ranks are at different reductions afterwards; the next pass must not add old partials."""
    launcher = FaultyLauncher([FAILS_IN_PASS])
    async with running(tiny_language_bundle, GroupOptions(link=link), launcher, ranks=2) as group:
        expected = await group.forward(PROMPT, 0, last_only=False)
        pids = group.pids
        for _ in range(2):
            with pytest.raises(InternalError, match="no memory for 13 rows"):
                await group.forward(PROMPT[:, :13], 0)
            got = await group.forward(PROMPT, 0, last_only=False)
            assert np.array_equal(got, expected)
        assert group.pids == pids
        assert group.restarts == 0


async def test_pass_that_one_sequence_fails_ends_that_one_only(
    tiny_language_bundle: TextBundle,
) -> None:
    fault = FAILS_IN_PASS.replace("== 13", ">= 13")
    launcher, metrics = FaultyLauncher([fault]), Metrics()
    async with (
        running(tiny_language_bundle, GroupOptions(), launcher, ranks=2) as group,
        scheduling(tiny_language_bundle, group, metrics) as scheduler,
    ):
        good = [make_request([n, 2, 3], 12) for n in range(2)]
        quiet = [await collect(scheduler, each) for each in good]
        bad = make_request(list(range(100, 113)), 4)
        *got, failed = await asyncio.gather(
            *(collect(scheduler, each) for each in (*good, bad)), return_exceptions=True
        )
        assert isinstance(failed, InternalError)
        for chunks, expected in zip(got, quiet, strict=True):
            assert not isinstance(chunks, BaseException)
            assert [chunk.token for chunk in chunks] == [chunk.token for chunk in expected]


BAD = 77
"""A token whose embedding overflows or is not finite."""


@pytest.fixture(params=[3e38, float("nan")], ids=["huge", "nan"])
def overflowing(request: pytest.FixtureRequest, tmp_path: Path) -> TextBundle:
    path = write_tiny(tmp_path / "tiny")
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    embedding[BAD] = torch.where(torch.arange(embedding.shape[1]) % 2 == 0, 1.0, -1.0)
    embedding[BAD] *= request.param
    manifest = path / "model.yaml"
    manifest.write_text(manifest.read_text().replace("tied_head: true", "tied_head: false"))
    save_file(tensors, path / "model.safetensors")
    return TextBundle.load(path)


@pytest.mark.parametrize("ranks", [1, 2])
async def test_sequence_whose_logits_overflow_ends_alone(
    overflowing: TextBundle, ranks: int, request: pytest.FixtureRequest
) -> None:
    """Weights that no prompt uses have no effect; a prompt that uses them ends with a status."""
    metrics = Metrics()
    is_finite = "huge" in request.node.callspec.id  # RMSNorm hides the overflow of its square
    async with (
        running(overflowing, ranks=ranks) as group,
        scheduling(overflowing, group, metrics) as scheduler,
    ):
        good = [
            make_request([n, 2, 3, 4, 5], 12, sampling=sampling)
            for n, sampling in enumerate((Sampling(), Sampling(temperature=1.0, seed=3)))
        ]
        quiet = [await collect(scheduler, each) for each in good]
        bad = [
            make_request([0, 2, 3, 4, BAD, 6], 12),
            make_request([BAD], 12, sampling=Sampling(temperature=0.7, seed=1), logprobs=2),
            make_request([9] * 40 + [BAD], 12),
        ]
        ends = await asyncio.gather(
            *(collect(scheduler, each) for each in (*good, *bad)), return_exceptions=True
        )
        for got, expected in zip(ends[:2], quiet, strict=True):
            assert not isinstance(got, BaseException), got
            assert [chunk.token for chunk in got] == [chunk.token for chunk in expected]
        if not is_finite:
            assert all(isinstance(end, NonFiniteOutput) for end in ends[2:]), ends[2:]
            assert value(metrics, "non_finite_outputs_total") == len(bad)
        else:
            assert all(isinstance(end, list | RequestError) for end in ends[2:])
        assert scheduler.block_manager.num_used == 0
        again = [await collect(scheduler, each) for each in good]  # nothing spoilt is cached
        for got, expected in zip(again, quiet, strict=True):
            assert [chunk.token for chunk in got] == [chunk.token for chunk in expected]


async def test_step_reports_the_sequences_that_are_not_finite(overflowing: TextBundle) -> None:
    async with running(overflowing) as group:
        modes = (LogitsMode.NONE, LogitsMode.BEST, LogitsMode.LAST, LogitsMode.ALL)
        inputs = [
            SequenceInput([n, BAD if spoilt else 8, 4], 0, [2 * n + spoilt], mode)
            for n, mode in enumerate(modes)
            for spoilt in (False, True)
        ]
        output = await group.run(Step(tuple(inputs)))
        assert output.non_finite in ({1, 3, 5, 7}, set())
        assert np.isfinite(output.logits[0]).all()
