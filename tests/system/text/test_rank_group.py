"""Tests of rank processes: the same logits as one rank, also after a rank was killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from ladderstitch.errors import EngineRestarting
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.engine.rank_handle import RankLost
from ladderstitch.text.messages import LogitsMode, SequenceInput, Step
from ladderstitch.text.model.attention import Batch, PagedCache
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.weights import Shard
from tests.support.language_models import TINY

PROMPT = np.arange(1, 24, dtype=np.int64)[None]
PATHS = (
    ResidualScheme(),
    ResidualScheme(scheme="ladder"),
    ResidualScheme(scheme="ladder", ladder_layers=1),
)


@asynccontextmanager
async def running(
    bundle: TextBundle, options: GroupOptions | None = None, **fields: object
) -> AsyncIterator[RankGroup]:
    """Yield a group and check afterwards that no process and no shared memory is left."""
    rank_config = RankConfig.of(
        bundle, paths=PATHS, max_model_len=64, max_batched_tokens=32, **fields
    )
    group = RankGroup(rank_config, options)
    try:
        await group.start()
        pids = group.pids
        yield group
    finally:
        await group.close()
    assert leftovers([*pids, *group.pids]) == []


def leftovers(pids: list[int]) -> list[Path]:
    """Return the paths of processes and shared memory that still exist."""
    shared = [p for p in Path("/dev/shm").glob("ladderstitch-*") if p.stat().st_uid == os.getuid()]
    return shared + [path for pid in pids if (path := Path(f"/proc/{pid}")).exists()]


async def forward_until_lost(group: RankGroup) -> None:
    """Run passes until one raises; a death is noticed at the latest in the pass that needs it."""
    while True:
        await group.forward(PROMPT, 0)


async def all_logits(group: RankGroup) -> np.ndarray:
    """Return [paths, 2, T, V]: in one pass, and as a prefill followed by two single tokens."""
    results = []
    for path in range(len(PATHS)):
        whole = await group.forward(PROMPT, 0, path, last_only=False)
        parts = [await group.forward(PROMPT[:, :-2], 0, path, last_only=False)]
        for at in (-2, -1):
            token = PROMPT[:, at : at + 1 or None]
            logits = await group.forward(token, PROMPT.shape[1] + at, path)
            parts.append(logits[:, None])
        results.append((whole[0], np.concatenate(parts, axis=1)[0]))
    return np.array(results)


@pytest.fixture(scope="session")
def expected(tiny_language_bundle: TextBundle) -> np.ndarray:
    """Return the logits of one rank, which the golden cases verify."""

    async def run() -> np.ndarray:
        async with running(tiny_language_bundle) as group:
            return await all_logits(group)

    return asyncio.run(run())


@pytest.mark.parametrize(("ranks", "link"), [(2, "shared_memory"), (3, "tcp")])
async def test_several_ranks_give_the_logits_of_one(
    tiny_language_bundle: TextBundle, expected: np.ndarray, ranks: int, link: str
) -> None:
    async with running(tiny_language_bundle, GroupOptions(link=link), ranks=ranks) as group:
        got = await all_logits(group)
        shares = [group.loaded[rank]["weight_bytes"] for rank in range(ranks)]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    whole = (tiny_language_bundle.path / "model.safetensors").stat().st_size
    assert sum(shares) < 1.02 * whole  # norms are on every rank, everything else is split
    assert max(shares) < 0.7 * whole


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_paths_of_two_precisions(
    tiny_language_bundle: TextBundle, expected: np.ndarray, ranks: int, dtype: str
) -> None:
    options = GroupOptions(link="shared_memory")
    fields = {"ranks": ranks, "precisions": (None, "int8", "int8"), "dtype": dtype}
    async with running(tiny_language_bundle, options, **fields) as group:
        got = await all_logits(group)
    if dtype == "float32":
        assert np.abs(got[0] - expected[0]).max() <= 1e-5 * np.abs(expected).max()
    for path in (0, 1, 2) if dtype == "bfloat16" else (1, 2):
        error = np.linalg.norm(got[path] - expected[path])
        assert 0 < error < 0.08 * np.linalg.norm(expected[path])


@pytest.mark.parametrize(("link", "spares"), [("shared_memory", 1), ("tcp", 0)])
async def test_killed_rank_is_replaced(
    tiny_language_bundle: TextBundle, expected: np.ndarray, link: str, spares: int
) -> None:
    options = GroupOptions(link=link, spares=spares)
    async with running(tiny_language_bundle, options, ranks=2) as group:
        for rank in (1, 0):
            os.kill(group.pids[rank], signal.SIGKILL)
            with pytest.raises(RankLost):
                await forward_until_lost(group)
            await group.wait_ready()
            got = await group.forward(PROMPT, 0, last_only=False)
            assert np.abs(got[0] - expected[0, 0]).max() <= 1e-5 * np.abs(expected).max()
        assert group.restarts == 2


async def test_symmetric_link_agrees_and_survives_a_killed_rank(
    tiny_language_bundle: TextBundle, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels run in Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    async with running(tiny_language_bundle, GroupOptions(link="symmetric"), ranks=2) as group:
        got = await all_logits(group)
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
        step = asyncio.create_task(forward_until_lost(group))
        await asyncio.sleep(0.1)  # until the kernels run
        os.kill(group.pids[1], signal.SIGKILL)
        with pytest.raises(RankLost):
            await step
        survivor = group.pids[0]
        await group.wait_ready()
        again = await group.forward(PROMPT, 0, last_only=False)
        assert np.abs(again[0] - expected[0, 0]).max() <= 1e-5 * np.abs(expected).max()
        assert survivor in group.pids


async def test_symmetric_link_without_a_gpu_raises(tiny_language_bundle: TextBundle) -> None:
    rank_config = RankConfig.of(tiny_language_bundle, ranks=2, max_model_len=8)
    group = RankGroup(rank_config, GroupOptions(link="symmetric"))
    try:
        with pytest.raises(EngineRestarting, match="link: symmetric needs GPUs"):
            await group.start()
    finally:
        await group.close()


async def test_rank_killed_during_a_pass_releases_its_peer(
    tiny_language_bundle: TextBundle,
) -> None:
    slow = GroupOptions(link="shared_memory", latency_s=0.2)
    async with running(tiny_language_bundle, slow, ranks=2) as group:
        step = asyncio.create_task(group.forward(PROMPT, 0))
        await asyncio.sleep(0)  # until it is sent; the pass takes more than a second
        os.kill(group.pids[0], signal.SIGKILL)
        with pytest.raises(RankLost):
            await step
        survivor = group.pids[-1]
        await group.wait_ready()
        assert survivor in group.pids


async def test_cancelled_caller_does_not_affect_the_next(
    tiny_language_bundle: TextBundle, expected: np.ndarray
) -> None:
    async with running(tiny_language_bundle, ranks=2) as group:
        for _ in range(5):
            step = asyncio.create_task(group.forward(PROMPT[:, :3], 0))
            await asyncio.sleep(0)
            step.cancel()
        got = await group.forward(PROMPT, 0, last_only=False)
    assert np.abs(got[0] - expected[0, 0]).max() <= 1e-5 * np.abs(expected).max()


async def test_ranks_that_cannot_load_raise_with_the_reason(
    tiny_language_bundle: TextBundle,
) -> None:
    rank_config = RankConfig.of(tiny_language_bundle, max_model_len=8).model_copy(
        update={"bundle": Path("/nowhere")}
    )
    group = RankGroup(rank_config)
    try:
        with pytest.raises(EngineRestarting, match=r"BundleError: /nowhere/model.yaml"):
            await group.start()
    finally:
        await group.close()


async def test_sequences_of_one_step_do_not_affect_each_other(
    tiny_language_bundle: TextBundle, expected: np.ndarray
) -> None:
    """A prefill, a chunk and a decoding sequence share a pass and lie in scattered blocks."""
    tokens = PROMPT[0].tolist()
    scattered, neighbours, own = [13, 2, 7], [4, 5, 6], [9, 8, 0]
    for ranks in (1, 2):
        async with running(tiny_language_bundle, ranks=ranks, sequences=4) as group:
            await group.run(
                Step(
                    (
                        SequenceInput(tokens[:20], 0, scattered[:2], LogitsMode.NONE),
                        SequenceInput(tokens[:3], 0, neighbours[:1], LogitsMode.NONE),
                    )
                )
            )
            output = await group.run(
                Step(
                    (
                        SequenceInput(tokens[20:21], 20, scattered[:2], LogitsMode.LAST),
                        SequenceInput(tokens[3:19], 3, neighbours[:2], LogitsMode.ALL),
                        SequenceInput(tokens[:12], 0, own[:1], LogitsMode.BEST),
                    )
                )
            )
        wanted = np.concatenate((expected[0, 0][20:21], expected[0, 0][3:19]))
        assert np.abs(output.logits - wanted).max() <= 1e-5 * np.abs(expected).max()
        assert output.best.tolist() == [expected[0, 0][11].argmax()]


def test_block_table_kernel_attends_like_torch() -> None:
    shard = Shard.of(TINY, 0, 1)
    rng = np.random.default_rng(0)
    caches = [PagedCache(TINY, shard, 12, 4) for _ in range(2)]
    caches[1].uses_kernels = True
    inputs = (
        SequenceInput([1], 9, [3, 11, 0]),
        SequenceInput([1], 0, [5]),
        SequenceInput([1], 7, [8, 9]),
    )
    q = torch.tensor(rng.normal(size=(3, TINY.heads, TINY.head_dim)), dtype=torch.float32)
    got = []
    for cache in caches:
        for sequence in inputs:  # the earlier tokens of each
            earlier = Batch(
                Step((SequenceInput([1] * (sequence.start + 1), 0, sequence.blocks),)), 4
            )
            seen = np.random.default_rng(sequence.start).normal(
                size=(2, sequence.start + 1, TINY.kv_heads, TINY.head_dim)
            )
            cache.append(1, earlier, *torch.tensor(seen, dtype=torch.float32))
        got.append(cache.attend(1, Batch(Step(inputs), 4), q))
    torch.testing.assert_close(got[1], got[0])
