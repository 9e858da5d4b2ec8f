"""Tests of the compiled engine: every network of every family equals eager torch."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from ladderstitch.errors import InternalError
from ladderstitch.importers.stitched_families import read_config
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine import compiled_executor
from ladderstitch.vision.engine.base import EngineResult, run_cascade
from ladderstitch.vision.engine.compiled import IDLE_BEFORE_INLINE_S, CompiledEngine
from ladderstitch.vision.engine.compiled_executor import CompiledExecutor
from ladderstitch.vision.engine.startup import make_config, open_engine
from ladderstitch.vision.models.executor import StitchExecutor
from ladderstitch.vision.models.graphs import export_units, route_units, unit_paths
from ladderstitch.vision.models.stitched import StitchedModel
from ladderstitch.vision.models.vit import InputShape
from tests.conftest import tiny_config
from tests.vision.models.test_efficientnet import family
from tests.vision.models.test_families import SHEETS, build_with_random_norms

LONG_S = 60.0
TOLERANCE = 1e-4
"""Largest difference from eager float32, relative to the largest logit."""


def ignore_progress(done: int, total: int) -> None:
    """Report nothing."""


@pytest.mark.parametrize("sheet", SHEETS.values(), ids=SHEETS.keys())
def test_every_stitch_equals_eager(sheet: dict, tmp_path: Path) -> None:
    model = build_with_random_norms(read_config(sheet["family"], sheet["config"]))
    check_every_stitch(model, sheet["input_shape"][1:], tmp_path)


@pytest.mark.parametrize("size", [56, 61])
def test_efficientnet_equals_eager_on_every_stitch(size: int, tmp_path: Path) -> None:
    inputs = InputShape(image_size=size, num_classes=5)
    config = family().model_copy(update={"inputs": inputs})
    check_every_stitch(build_with_random_norms(config), [3, size, size], tmp_path)


def check_every_stitch(model: StitchedModel, shape: Sequence[int], tmp_path: Path) -> None:
    """Compare every network with eager torch, as a sequence of units and joined."""
    model.fold_batch_norm()
    export_units(model, tmp_path, shape, ignore_progress)
    executor, eager = open_units(model, tmp_path), StitchExecutor(model)
    images = torch.randn(3, *shape)
    with torch.inference_mode():
        expected = {s.id: eager(images, s.id).numpy() for s in model.stitches}
    for stitch in model.stitches:
        check_equal(executor(images.numpy(), stitch.id), expected[stitch.id])
    joined = executor.join([stitch.id for stitch in model.stitches])
    assert joined
    for stitch in joined:
        check_equal(executor(images.numpy(), stitch), expected[stitch])


def open_units(model: StitchedModel, folder: Path) -> CompiledExecutor:
    """Return the executor of a model whose units are in `folder`."""
    return CompiledExecutor({s.id: unit_paths(s, folder, folder) for s in model.stitches}, 1)


def check_equal(got: np.ndarray, expected: np.ndarray) -> None:
    """Compare logits with the tolerance."""
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


@pytest.fixture
def executor(tmp_path: Path) -> CompiledExecutor:
    """Return the executor of a family of small vision transformers."""
    torch.manual_seed(0)
    model = tiny_config().build().eval().requires_grad_(False)
    export_units(model, tmp_path, (1, 8, 8), ignore_progress)
    return open_units(model, tmp_path)


def images(count: int, seed: int = 0) -> np.ndarray:
    """Return random images of the tiny family."""
    return np.random.default_rng(seed).standard_normal((count, 1, 8, 8), np.float32)


@pytest.mark.parametrize("joined", [False, True])
def test_batch_equals_single_images(executor: CompiledExecutor, joined: bool) -> None:
    executor.join([4] if joined else [])
    batch = images(5)
    alone = np.concatenate([executor(batch[i : i + 1], 4) for i in range(5)])
    np.testing.assert_allclose(executor(batch, 4), alone, atol=1e-6)


def test_concurrent_calls_equal_sequential_ones(executor: CompiledExecutor) -> None:
    executor.join([0, 1])
    calls = [(stitch, images(2, seed)) for seed in range(20) for stitch in range(5)]
    expected = [executor(batch, stitch) for stitch, batch in calls]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda call: executor(call[1], call[0]), calls))
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_later_call_keeps_earlier_logits(executor: CompiledExecutor) -> None:
    first = executor(images(2), 3)
    kept = first.copy()
    executor(images(2, seed=1), 3)
    np.testing.assert_array_equal(first, kept)


def test_join_stops_at_its_memory(
    executor: CompiledExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.onnx")}
    routes = {s.id: route_units(s) for s in tiny_config().stitches()}
    needs = [sum(sizes[name] for name in routes[stitch]) for stitch in (0, 3, 5)]
    monkeypatch.setattr(compiled_executor, "MIN_JOINED_BYTES", sum(needs[:2]))
    monkeypatch.setattr(compiled_executor, "MAX_JOINED_SHARE", 0.0)
    assert executor.join([0, 3, 5]) == [0, 3]


@pytest.mark.parametrize("joined", [False, True])
def test_going_on_from_the_stitch_equals_the_whole_route(
    executor: CompiledExecutor, joined: bool
) -> None:
    routes = {stitch.id: route_units(stitch) for stitch in tiny_config().stitches()}
    pairs = [
        (a, b)
        for a, b in itertools.permutations(routes, 2)
        if executor.num_shared(a, b) and len(routes[a]) > executor.num_shared(a, b)
    ]
    assert pairs
    if joined:
        executor.join(routes)
        assert executor.join_cascades(pairs) == pairs
    batch, rows = images(5), [0, 3]
    for first, last in pairs:
        shared = executor.num_shared(first, last)
        assert routes[first][:shared] == routes[last][:shared]
        assert routes[first][: shared + 1] != routes[last][: shared + 1]
        logits, kept = executor.run_first(batch, first, last)
        np.testing.assert_allclose(logits, executor(batch, first), atol=1e-6)
        going_on = executor.run_last(np.ascontiguousarray(kept[rows]), first, last)
        np.testing.assert_allclose(going_on, executor(batch[rows], last), atol=1e-6)


def test_cascade_without_shared_units_starts_again(executor: CompiledExecutor) -> None:
    routes = {stitch.id: route_units(stitch) for stitch in tiny_config().stitches()}
    first, last = next(
        pair for pair in itertools.combinations(routes, 2) if not executor.num_shared(*pair)
    )
    logits, kept = executor.run_first(images(3), first, last)
    np.testing.assert_array_equal(kept, images(3))
    np.testing.assert_array_equal(logits, executor(images(3), first))
    np.testing.assert_array_equal(
        executor.run_last(kept[1:], first, last), executor(images(3)[1:], last)
    )
    assert executor.join_cascades([(first, last)]) == []


async def test_engine_runs_the_last_variant_on_selected_rows(engine: CompiledEngine) -> None:
    executor, batch = engine.executor, [images(2), images(1, seed=1)]
    pixels = np.concatenate(batch)
    seen: list[np.ndarray] = []

    def select(result: EngineResult) -> np.ndarray:
        seen.append(result.logits)
        return np.array([0, 2])

    routes = tiny_config().stitches()
    first, last = next(
        (a.id, b.id)
        for a, b in itertools.combinations(routes, 2)
        if executor.num_shared(a.id, b.id)
    )
    result = await run_cascade(engine, batch, first, last, select)
    assert result.last is not None
    np.testing.assert_allclose(seen[0], executor(pixels, first), atol=1e-6)
    np.testing.assert_allclose(result.last.logits, executor(pixels[[0, 2]], last), atol=1e-6)
    nothing = await run_cascade(engine, batch, first, last, lambda _: np.array([], np.intp))
    assert nothing.last is None


def test_unknown_stitch_raises_key_error(executor: CompiledExecutor) -> None:
    with pytest.raises(KeyError):
        executor(images(1), 99)


@pytest.fixture
async def engine(executor: CompiledExecutor) -> AsyncIterator[CompiledEngine]:
    """Yield an engine with a limit that every batch meets."""
    engine = CompiledEngine(executor, LONG_S)
    yield engine
    engine.close()


async def wait_until_idle() -> None:
    """Wait until the engine counts as idle."""
    await asyncio.sleep(2 * IDLE_BEFORE_INLINE_S)


async def test_forward_joins_the_images_of_requests(
    engine: CompiledEngine, executor: CompiledExecutor
) -> None:
    requests = [images(2), images(1, seed=1), images(3, seed=2)]
    result = await engine.forward(requests, 5)
    expected = np.concatenate([executor(request, 5) for request in requests])
    np.testing.assert_allclose(result.logits, expected, atol=1e-6)
    assert result.compute_s > 0


async def test_inline_logits_equal_those_of_the_thread(engine: CompiledEngine) -> None:
    in_thread = await engine.forward([images(2)], 5)  # the first run is never inline
    assert engine.inline_batches == 0
    await wait_until_idle()
    inline = await engine.forward([images(2)], 5)
    assert engine.inline_batches == 1
    np.testing.assert_array_equal(inline.logits, in_thread.logits)


async def test_two_requests_in_a_batch_run_in_the_thread(engine: CompiledEngine) -> None:
    for _ in range(2):
        await wait_until_idle()
        await engine.forward([images(1)], 0)
    assert engine.inline_batches == 1
    await engine.forward([images(1), images(1)], 0)  # two requests
    await wait_until_idle()
    await engine.forward([images(1)], 0)  # the previous batch had two requests
    assert engine.inline_batches == 1
    await wait_until_idle()
    await engine.forward([images(1)], 0)
    assert engine.inline_batches == 2


async def test_batch_over_the_limit_runs_in_the_thread(executor: CompiledExecutor) -> None:
    engine = CompiledEngine(executor, inline_limit_s=1e-9)
    for _ in range(3):
        await wait_until_idle()
        await engine.forward([images(1)], 0)
    engine.close()
    assert engine.inline_batches == 0


async def test_failed_batch_leaves_the_engine_working(engine: CompiledEngine) -> None:
    with pytest.raises(InternalError, match="the batch failed"):
        await engine.forward([images(1)[:, :, :4]], 0)
    assert (await engine.forward([images(1)], 0)).logits.shape == (1, 4)


async def test_open_engine_exports_once(tiny_bundle: VisionBundle) -> None:
    config = make_config(
        tiny_bundle, runtime="auto", device="cpu", dtype="auto", threads=1, max_batch_size=8
    )
    exported: list[tuple[int, int]] = []
    for _ in range(2):
        engine = await open_engine(tiny_bundle, config, 0.0, lambda *done: exported.append(done))
        assert isinstance(engine, CompiledEngine)
        engine.close()
    assert exported == [(i + 1, len(exported)) for i in range(len(exported))]


@pytest.mark.parametrize("damage", ["truncate", "remove"])
async def test_open_engine_makes_damaged_graphs_again(
    tiny_bundle: VisionBundle,
    damage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("LADDERSTITCH_CACHE", str(tmp_path / "cache"))
    config = make_config(
        tiny_bundle, runtime="onnx", device="cpu", dtype="auto", threads=1, max_batch_size=8
    )
    (await open_engine(tiny_bundle, config, 0.0, ignore_progress)).close()
    graph = next((tmp_path / "cache" / "graphs").glob("*/block-0-1.onnx"))
    if damage == "remove":
        graph.unlink()
    else:
        graph.write_bytes(graph.read_bytes()[:100])
    engine = await open_engine(tiny_bundle, config, 0.0, ignore_progress)
    assert (await engine.forward([images(1)], 0)).logits.shape == (1, 4)
    engine.close()
    assert "making them again" in caplog.text


def test_import_keeps_onnxruntime_from_reporting_its_use(tmp_path: Path) -> None:
    code = "import os, ladderstitch.vision.engine.compiled; print(os.listdir(os.environ['TMPDIR']))"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[]\n", done.stderr
