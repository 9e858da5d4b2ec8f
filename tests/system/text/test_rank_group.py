"""Tests of rank processes: the same logits as one rank, also after a rank was killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto

from ladderstitch.errors import EngineRestarting
from ladderstitch.runtime.graph_builder import GraphBuilder
from ladderstitch.runtime.low_bit import quantise
from ladderstitch.runtime.sessions import open_rank_session
from ladderstitch.scheduling.generation import GenerationRequest
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.engine.rank_config import GroupOptions, RankConfig
from ladderstitch.text.engine.rank_group import RankGroup
from ladderstitch.text.engine.rank_handle import RankLost
from ladderstitch.text.messages import (
    Kind,
    LogitsMode,
    Message,
    SequenceInput,
    Step,
    read_message,
    write_message,
)
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.scheduler.scheduler import TextScheduler
from tests.support.language_models import TINY, made_up_quality

LIMIT_S = 300.0
"""Guards against hanging only."""

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
    assert existing({Path(f"/proc/{pid}") for pid in (*pids, *group.pids)}) == set()
    await no_shared_memory_is_left()


def existing(paths: set[Path]) -> set[Path]:
    return {path for path in paths if path.exists()}


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("ladderstitch-*"))


async def no_shared_memory_is_left() -> None:
    """Wait until the files in shared memory that exist now are gone.

    Those of a group are gone at once. Other tests, which run meanwhile, remove theirs later.
    """
    left = shared_memory()
    deadline = time.monotonic() + LIMIT_S
    while left := existing(left):
        assert time.monotonic() < deadline, f"shared memory left behind: {left}"
        await asyncio.sleep(0.05)


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


async def test_bfloat16_sequences_share_the_cache_of_low_bit_paths(
    tiny_language_bundle: TextBundle, expected: np.ndarray
) -> None:
    """The cache is float32, and the blocks of the sequences are not adjacent."""
    tokens = PROMPT[0].tolist()
    fields = {"precisions": (None, "int8", "int8"), "dtype": "bfloat16", "sequences": 2}
    async with running(tiny_language_bundle, **fields) as group:
        inputs = tuple(
            SequenceInput(tokens, 0, blocks, LogitsMode.LAST) for blocks in ([5, 1], [3, 0])
        )
        output = await group.run(Step(inputs))
    for logits in output.logits:
        error = np.linalg.norm(logits - expected[0, 0][-1])
        assert 0 < error < 0.08 * np.linalg.norm(expected[0, 0][-1])


@pytest.mark.parametrize(
    ("link", "spares", "precision"),
    [
        ("shared_memory", 1, None),
        ("tcp", 0, None),
        ("shared_memory", 1, "int8"),
        ("shared_memory", 1, "int4"),
    ],
)
async def test_killed_rank_is_replaced(
    tiny_language_bundle: TextBundle,
    expected: np.ndarray,
    link: str,
    spares: int,
    precision: str | None,
) -> None:
    options, fields = GroupOptions(link=link, spares=spares), {"precisions": (precision,) * 3}
    async with running(tiny_language_bundle, options, ranks=2, **fields) as group:
        if precision is not None:
            expected = (await group.forward(PROMPT, 0, last_only=False))[None]
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


REALISTIC = DecoderConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=688,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=32,
    max_positions=128,
    tied_head=True,
)
NUM_TOKENS = 16
"""Tokens of each greedy answer."""
ROUNDING = {None: 1e-4, "int8": 0.3, "int4": 0.3}
"""Differences of logits where a row's last bits depend on the other rows.

Activations rounded to 8 bits amplify them.
"""


def rows_are_exact(precision: str | None) -> bool:
    """Return whether, on this processor, a row of a product has the same bits among other rows."""
    rows, matrix = torch.randn(1, 9, 256), torch.randn(96, 256)
    graph = GraphBuilder()
    if precision is None:
        (y,) = graph.operator("MatMul", ["x", graph.constant(matrix.T.contiguous().numpy())])
    else:
        y = graph.product("x", quantise(matrix, int(precision.removeprefix("int"))))
    model = graph.build({"x": (TensorProto.FLOAT, (1, None, 256))}, {"y": y})
    session = open_rank_session(model, 1)
    (together,) = session.run(("y",), {"x": rows.numpy()})
    alone = [session.run(("y",), {"x": rows[:, n : n + 1].numpy()})[0] for n in range(9)]
    return bool((together == np.concatenate(alone, axis=1)).all())


async def answer_greedily(
    group: RankGroup, seed: int, *, crowded: bool
) -> tuple[list[int], np.ndarray]:
    """Return a greedy answer and its logits [T, V].

    If `crowded`, up to three other sequences decode in the same steps, and others prefill.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, REALISTIC.vocab_size, 20).tolist()
    others = rng.integers(0, REALISTIC.vocab_size, (5, 64)).tolist()
    own, blocks = [3, 17, 8], [[20 + 4 * n + i for i in range(4)] for n in range(5)]
    if crowded:
        prefills = [SequenceInput(others[n][:20], 0, blocks[n], LogitsMode.NONE) for n in range(3)]
        await group.run(Step(tuple(prefills)))
    computed, found = 0, []
    for number in range(NUM_TOKENS):
        inputs = [SequenceInput(tokens[computed:], computed, own, LogitsMode.LAST)]
        if crowded:
            decoding = range(1 + number % 3)
            inputs = [
                *(SequenceInput([others[n][number]], 20 + number, blocks[n]) for n in decoding),
                *inputs,
            ]
        if crowded and number % 4 == 0:
            chunk = others[4][: 7 + number % 5]
            inputs.append(SequenceInput(chunk, 0, blocks[4], LogitsMode.NONE))
        found.append((await group.run(Step(tuple(inputs)))).logits[0])
        computed = len(tokens)
        tokens.append(int(found[-1].argmax()))
    return tokens[20:], np.array(found)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", [None, "int8", "int4"])
async def test_answer_does_not_depend_on_its_batch(ranks: int, precision: str | None) -> None:
    """All bits of the logits are equal if those of products are, which the processor decides."""
    rounding = (
        0.0
        if rows_are_exact(precision) and (ranks, precision) != (2, None)
        else ROUNDING[precision]
    )
    rank_config = RankConfig(
        model=REALISTIC,
        precisions=(precision,),
        ranks=ranks,
        max_model_len=64,
        sequences=12,
        max_batched_tokens=128,
    )
    group = RankGroup(rank_config)
    try:
        await group.start()
        for seed in range(6):
            alone, logits = await answer_greedily(group, seed, crowded=False)
            crowded, crowded_logits = await answer_greedily(group, seed, crowded=True)
            pairs = zip(alone, crowded, strict=True)
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), NUM_TOKENS)
            steps = slice(0, same + 1)  # the logits of the step in which answers part, too
            np.testing.assert_allclose(crowded_logits[steps], logits[steps], rtol=0, atol=rounding)
            assert rounding > 0 or same == NUM_TOKENS
    finally:
        await group.close()


@pytest.mark.parametrize("precision", [None, "int8", "int4"])
async def test_rank_killed_in_mid_answer_loses_no_token(
    tiny_language_bundle: TextBundle, precision: str | None
) -> None:
    """The answer goes on after the tokens that it has, and all tokens arrive once."""
    prompt, fields = tuple(PROMPT[0].tolist()), {"precisions": (precision,) * 3}
    options = GroupOptions(spares=1)
    async with running(tiny_language_bundle, options, ranks=2, **fields) as group:
        names = ["standard", "ladder", "ladder-1"]
        scheduler = TextScheduler(
            group, tiny_language_bundle.tokenizer(), quality=made_up_quality(3), variant_names=names
        )
        answers = []
        for is_killed in (False, True):
            request = GenerationRequest(prompt, time.monotonic(), 24, variant=0)
            chunks = []
            async with aclosing(scheduler.generate(request)) as stream:
                async for chunk in stream:
                    chunks.append(chunk)
                    if is_killed and chunk.index == 5:
                        os.kill(group.pids[1], signal.SIGKILL)
            assert [chunk.index for chunk in chunks] == list(range(24))
            assert chunks[-1].finish == "length"
            answers.append([chunk.token for chunk in chunks])
        await scheduler.close()
        assert group.restarts == 1
    kept = 24 if precision is None or rows_are_exact(precision) else 6
    assert answers[0][:kept] == answers[1][:kept]


class MuteRank:
    """A rank of this process that registers, reads its first request, and never replies."""

    def __init__(self) -> None:
        self.asked, self.disconnected, self.killed = (asyncio.Event() for _ in range(3))

    async def launch(self, address: str, secret: str) -> MuteRank:
        """Connect to a group, as the launcher of a `RankGroup`."""
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
        header = {"secret": secret, "pid": 0, "comm_address": ["127.0.0.1", 0]}
        write_message(writer, Message(Kind.REGISTER, header))
        self._reading = asyncio.create_task(self._read(reader, writer))
        return self

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_message(reader)
        self.asked.set()
        await reader.read()
        writer.close()
        self.disconnected.set()

    async def wait(self) -> object:
        """Wait until the rank is killed."""
        return await self.killed.wait()

    def kill(self) -> None:
        """Note that the rank is killed."""
        self.killed.set()


async def test_start_given_up_ends_a_rank_that_was_asked(tiny_language_bundle: TextBundle) -> None:
    rank = MuteRank()
    config = RankConfig.of(tiny_language_bundle, max_model_len=64, max_batched_tokens=32)
    group = RankGroup(config, launcher=rank.launch)
    start = asyncio.create_task(group.start())
    await rank.asked.wait()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await group.close()
    await asyncio.wait_for(rank.disconnected.wait(), 300)
    assert rank.killed.is_set()
