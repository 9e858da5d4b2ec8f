"""Tests of captured passes, with a fake of CUDA's graphs that computes on the CPU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ladderstitch.importers.stitched_families import read_config
from ladderstitch.runtime.cuda_graphs import CapturedPass, CudaGraphs
from ladderstitch.vision.bundle import VisionBundle
from ladderstitch.vision.engine import worker
from ladderstitch.vision.engine.base import EngineConfig
from ladderstitch.vision.engine.cuda_graphs import GraphedExecutor
from ladderstitch.vision.models.executor import StitchExecutor
from tests.conftest import tiny_config
from tests.vision.models.test_efficientnet import family
from tests.vision.models.test_families import SHEETS

MAX_BATCH_SIZE = 6
CPU = torch.device("cpu")


class FakeBackend:
    """Graphs that replay by calling the captured function again, into the same output.

    A capture computes nothing on a GPU, so the output is NaN until the first replay.
    """

    def __init__(self) -> None:
        self.pools, self.used_pools = 0, list[int]()
        self.warm_ups = 0
        self.outputs: list[Tensor] = []
        self.replays = 0
        self.failures_left = 0

    def make_pool(self) -> int:
        self.pools += 1
        return self.pools

    def warm_up(self, run: Callable[[], Tensor]) -> None:
        self.warm_ups += 1
        run()

    def capture(self, run: Callable[[], Tensor], pool: int) -> CapturedPass[Tensor]:
        assert self.warm_ups > len(self.outputs)
        if self.failures_left:
            self.failures_left -= 1
            raise RuntimeError("operation not permitted when stream is capturing")
        self.used_pools.append(pool)
        output = run().fill_(float("nan"))
        self.outputs.append(output)

        def replay() -> None:
            self.replays += 1
            output.copy_(run())

        return CapturedPass(replay, output)


@pytest.fixture
def eager() -> StitchExecutor:
    """Return the executor of a family of small networks."""
    torch.manual_seed(0)
    return StitchExecutor(tiny_config().build().eval().requires_grad_(False))


@pytest.fixture
def backend() -> FakeBackend:
    """Return a fake that has captured nothing."""
    return FakeBackend()


def graphed(
    eager: StitchExecutor,
    backend: FakeBackend,
    max_batch_size: int = MAX_BATCH_SIZE,
    **options: int,
) -> GraphedExecutor:
    """Return the executor under test."""
    return GraphedExecutor(eager, backend, (max_batch_size, 1, 8, 8), CPU, **options)


def images(count: int, seed: int = 0) -> Tensor:
    """Return random model inputs [count, 1, 8, 8]."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def run_eagerly(eager: StitchExecutor, batch: Tensor, stitch: int) -> Tensor:
    """Return the expected logits."""
    return eager(batch, stitch)


@pytest.mark.parametrize("max_batch_size", [1, 6, 8])
def test_every_batch_size_equals_eager(
    eager: StitchExecutor, backend: FakeBackend, max_batch_size: int
) -> None:
    execute = graphed(eager, backend, max_batch_size)
    for round_ in range(2):
        for count in (*range(max_batch_size, 0, -1), *range(1, max_batch_size + 1)):
            batch = images(count, seed=count + 100 * round_)
            for stitch in (0, 5, 16):
                got = execute(batch, stitch)
                assert got.shape == (count, 4)
                torch.testing.assert_close(got, run_eagerly(eager, batch, stitch))
    buckets = {1: {1}, 6: {1, 2, 4, 6}, 8: {1, 2, 4, 8}}[max_batch_size]
    assert {len(output) for output in backend.outputs} == buckets
    assert execute.captures == len(backend.outputs) == 3 * len(buckets)


def test_pass_is_captured_at_its_first_use(eager: StitchExecutor, backend: FakeBackend) -> None:
    execute = graphed(eager, backend)
    assert (backend.warm_ups, backend.outputs) == (0, [])
    execute(images(3), 1)
    execute(images(4), 1)
    assert (backend.warm_ups, len(backend.outputs), backend.replays) == (1, 1, 2)
    execute(images(2), 1)
    execute(images(4), 2)
    assert (backend.warm_ups, len(backend.outputs), backend.replays) == (3, 3, 4)


def test_graphs_share_one_pool(eager: StitchExecutor, backend: FakeBackend) -> None:
    execute = graphed(eager, backend)
    for stitch in range(5):
        execute(images(2), stitch)
    assert backend.pools == 1
    assert backend.used_pools == [1] * 5


def test_least_recently_used_graph_is_dropped(eager: StitchExecutor, backend: FakeBackend) -> None:
    execute = graphed(eager, backend, max_graphs=2)
    for stitch in (0, 1, 0, 2):  # 2 drops 1
        execute(images(1), stitch)
    assert execute.captures == 3
    execute(images(1), 0)
    execute(images(1), 2)
    assert execute.captures == 3
    batch = images(1, seed=9)
    torch.testing.assert_close(execute(batch, 1), run_eagerly(eager, batch, 1))  # drops 0
    assert execute.captures == 4
    execute(images(1), 2)
    assert execute.captures == 4
    execute(images(1), 0)
    assert execute.captures == 5


def test_failed_capture_falls_back_to_eager_once(
    eager: StitchExecutor, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    execute = graphed(eager, backend)
    backend.failures_left = 1
    with caplog.at_level(logging.WARNING):
        for count in (3, 4, 3):
            batch = images(count, seed=count)
            torch.testing.assert_close(execute(batch, 7), run_eagerly(eager, batch, 7))
    assert (execute.capture_failures, execute.captures, backend.replays) == (1, 0, 0)
    [record] = caplog.records
    assert record.getMessage().startswith("capture failed stitch=7 bucket=4 failures=1; ")
    assert "RuntimeError: operation not permitted" in record.getMessage()
    execute(images(2), 7)  # another bucket is captured, in a pool without failed captures
    assert (execute.captures, backend.used_pools) == (1, [2])


def test_stitches_keep_their_own_outputs(eager: StitchExecutor, backend: FakeBackend) -> None:
    execute = graphed(eager, backend)
    batches = {stitch: images(4, seed=stitch) for stitch in (0, 8, 16)}
    logits = {stitch: execute(batch, stitch) for stitch, batch in batches.items()}
    for stitch, batch in batches.items():
        torch.testing.assert_close(logits[stitch], run_eagerly(eager, batch, stitch))
    assert len({output.data_ptr() for output in backend.outputs}) == 3


def test_rows_of_earlier_batches_are_zeroed(eager: StitchExecutor, backend: FakeBackend) -> None:
    execute = graphed(eager, backend, 8)
    execute(torch.full((8, 1, 8, 8), float("nan")), 3)
    batch = images(5)
    got = execute(batch, 3)
    torch.testing.assert_close(got, run_eagerly(eager, batch, 3))
    [output] = backend.outputs
    expected = run_eagerly(eager, torch.zeros(3, 1, 8, 8), 3)
    torch.testing.assert_close(output[5:], expected)


@pytest.mark.parametrize("count", [0, MAX_BATCH_SIZE + 1])
def test_batch_out_of_range_raises(eager: StitchExecutor, backend: FakeBackend, count: int) -> None:
    with pytest.raises(ValueError, match=f"images: expected 1 to 6, got {count}"):
        graphed(eager, backend)(images(count), 0)


def test_unknown_stitch_raises_without_a_capture(
    eager: StitchExecutor, backend: FakeBackend
) -> None:
    execute = graphed(eager, backend)
    with pytest.raises(KeyError, match="99"):
        execute(images(1), 99)
    assert (execute.capture_failures, backend.warm_ups) == (0, 0)


class ForbidHostAccess(TorchDispatchMode):
    """Raises for operations that read a result on the host or move data between devices."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "lift_fresh", "nonzero", "item"}, name
        leaves = tree_leaves((args, kwargs))
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
        devices |= {leaf for leaf in leaves if isinstance(leaf, torch.device)}
        assert {device.type for device in devices} <= {"meta"}, (name, devices)
        return func(*args, **(kwargs or {}))


FAMILIES = [
    *(
        pytest.param(
            read_config(sheet["family"], sheet["config"]), sheet["input_shape"][1:], id=name
        )
        for name, sheet in SHEETS.items()
    ),
    pytest.param(family(), [3, family().inputs.image_size, family().inputs.image_size], id="lite"),
]


@pytest.mark.parametrize(("config", "shape"), FAMILIES)
def test_forward_pass_never_waits_for_the_host(config: Any, shape: list[int]) -> None:
    """The anchors contain every block, some stitches every kind of stitching layer."""
    model = config.build().eval().requires_grad_(False)
    model.fold_batch_norm()
    executor = StitchExecutor(model.to("meta"))
    batch = torch.empty(2, *shape, device="meta")
    with torch.inference_mode(), ForbidHostAccess():
        for stitch in model.stitches:
            if stitch.is_anchor or stitch.id % 16 == 0:
                assert executor(batch, stitch.id).shape == (2, config.inputs.num_classes)


class FakeCuda:
    """The parts of `torch.cuda` that captures use; `events` lists what happened on which stream."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.current = "caller"
        self.end_fails = False

    def Stream(self) -> SimpleNamespace:
        return SimpleNamespace(
            name="side",
            wait_stream=lambda other: self.events.append(f"side waits for {other}"),
            synchronize=lambda: self.events.append("side done"),
        )

    def current_stream(self) -> str:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.events.append(f"replay on {self.current}"))

    @contextlib.contextmanager
    def graph(self, graph: object, pool: object, stream: SimpleNamespace) -> Iterator[None]:
        self.current = stream.name  # torch leaves it so if the capture cannot end
        self.events.append(f"begin on {self.current}, pool {pool}")
        yield
        if self.end_fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.events.append("end")

    def graph_pool_handle(self) -> int:
        return 5


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Replace `torch.cuda` for captures; torch's own settings are restored."""
    fake = FakeCuda()
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    return fake


def test_cuda_captures_on_the_stream_of_the_warm_up(cuda: FakeCuda) -> None:
    graphs = CudaGraphs()

    def run() -> Tensor:
        cuda.events.append(f"run on {cuda.current}")
        return torch.zeros(1)

    assert not torch.backends.cudnn.benchmark
    graphs.warm_up(run)
    assert cuda.events == ["side waits for caller", *["run on side"] * 3, "side done"]
    cuda.events.clear()
    captured = graphs.capture(run, graphs.make_pool())
    captured.replay()
    assert cuda.events == ["begin on side, pool 5", "run on side", "end", "replay on caller"]


def test_cuda_failed_capture_restores_the_stream(cuda: FakeCuda) -> None:
    graphs = CudaGraphs()
    cuda.end_fails = True
    with pytest.raises(RuntimeError, match="operation failed"):
        graphs.capture(lambda: torch.zeros(1), 5)
    assert cuda.current == "caller"


@pytest.mark.parametrize(("device", "index"), [("cpu", None), ("cuda", 0), ("cuda:2", 2)])
def test_worker_replays_graphs_on_cuda_only(
    device: str, index: int | None, tiny_bundle: VisionBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(worker, "CudaGraphs", FakeBackend)
    monkeypatch.setattr(worker, "GraphedExecutor", lambda *args: args)
    model = tiny_bundle.load_model()
    monkeypatch.setattr(model, "to", lambda device: model)
    config = EngineConfig(
        bundle=str(tiny_bundle.path),
        runtime="torch",
        device=device,
        dtype="float32",
        threads=1,
        max_batch_size=8,
        image_shape=(1, 8, 8),
        row_size=4,
    )
    execute = worker.make_executor(model, config)
    if index is None:
        assert used == []
        assert execute(images(2), 0).shape == (2, 4)
        return
    expected = torch.device("cuda", index)
    assert used == [expected]
    _, backend, *rest = execute
    assert isinstance(backend, FakeBackend)
    assert rest == [(8, 1, 8, 8), expected]
