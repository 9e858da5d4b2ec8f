"""Places in the server that call kernels: in the interpreter, compared with the CPU's code."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from ladderstitch.runtime.cuda_graphs import CapturedPass
from ladderstitch.text.comm.base import SingleRankCommunicator, SingleSpec
from ladderstitch.text.engine import rank_engine
from ladderstitch.text.engine.rank_config import RankConfig
from ladderstitch.text.messages import Kind, LogitsMode, Message, SequenceInput, Step
from ladderstitch.text.model import transformer
from ladderstitch.text.model.attention import PagedCache
from ladderstitch.text.model.batch import Batch
from ladderstitch.text.model.graphed_decoder import GraphedDecoder, StepOutput
from ladderstitch.text.model.mlp import Mlp
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.residual_stream import ResidualStream
from ladderstitch.text.model.shard import Shard
from ladderstitch.text.model.transformer import Transformer
from ladderstitch.text.model.weight_reader import MemoryWeights
from ladderstitch.text.model.weights import load_rank
from ladderstitch.vision.models import executor as executors
from ladderstitch.vision.models.executor import StitchExecutor, bind_stitching_layer
from tests.conftest import tiny_config
from tests.kernels.tolerances import DTYPES, assert_close
from tests.support.language_models import TINY, random_tensors

SHARD = Shard.of(TINY, 0, 1)
BLOCK_TOKENS, BLOCKS = 4, 12
T = TypeVar("T")


class KernelStream(ResidualStream):
    """A residual stream as on a GPU."""

    def __init__(self, x: Tensor, comm: SingleRankCommunicator) -> None:
        super().__init__(x, comm)
        self.uses_kernels = True


OPS = ("add_rms_norm", "paged_decode_attention", "rope_append", "swiglu")


def make_model() -> Transformer:
    """Return a tiny model with random weights."""
    return Transformer(TINY, load_rank(MemoryWeights(random_tensors(TINY)), TINY, SHARD), SHARD)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the names of the language model's ops that have been called, as a set that grows."""
    names: set[str] = set()
    for name in OPS:
        file = "decode_attention" if name == "paged_decode_attention" else name
        module = importlib.import_module(f"ladderstitch_kernels.ops.{file}")

        def record(*args: object, op: Callable[..., object], name: str) -> object:
            names.add(name)
            return op(*args)

        monkeypatch.setattr(module, name, partial(record, op=getattr(module, name), name=name))
    return names


def steps() -> list[Step]:
    """Return a prefill of two sequences in scattered blocks, a mixed step and a decoding step."""
    first, second = list(range(3, 10)), [200, 7, 7]
    return [
        Step(
            (
                SequenceInput(first, 0, [9, 2], LogitsMode.ALL),
                SequenceInput(second, 0, [5], LogitsMode.LAST),
            )
        ),
        Step(
            (
                SequenceInput([11, 12, 13], 7, [9, 2, 0], LogitsMode.ALL),
                SequenceInput([8], 3, [5], LogitsMode.LAST),
            )
        ),
        Step(
            (
                SequenceInput([14], 10, [9, 2, 0], LogitsMode.LAST),
                SequenceInput([9], 4, [5, 6], LogitsMode.LAST),
            )
        ),
        Step((SequenceInput([21], 5, [5, 6], LogitsMode.LAST),)),
    ]


def run_steps(
    model: Transformer, residual: ResidualScheme, *, uses_kernels: bool, poison: float = 0.0
) -> tuple[list[Tensor], PagedCache]:
    """Return the logits of all steps, and the cache after them, which is filled with `poison`."""
    cache = PagedCache(TINY, SHARD, BLOCKS, BLOCK_TOKENS)
    cache._memory.fill_(poison)
    cache.uses_kernels = uses_kernels
    for mlp in (layer.mlp for layer in model.layers):
        mlp.uses_kernels = uses_kernels
    plans, comm = plan_layers(residual, TINY.layers, 1), SingleRankCommunicator()
    logits = [model.forward(Batch(step, BLOCK_TOKENS), cache, plans, comm) for step in steps()]
    return logits, cache


@pytest.mark.parametrize("scheme", ["standard", "ladder", "parallel"])
def test_language_model_with_kernels_equals_torch(
    scheme: str, called: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    residual = ResidualScheme.model_validate({"scheme": scheme})
    expected, seen = run_steps(model, residual, uses_kernels=False)
    assert called == set()
    monkeypatch.setattr(transformer, "ResidualStream", KernelStream)
    got, cache = run_steps(model, residual, uses_kernels=True)
    assert called == set(OPS)
    for part, whole in zip(got, expected, strict=True):
        assert_close(part, whole)
    assert_close(cache._memory, seen._memory)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_language_model_with_kernels_reads_no_recycled_slot(
    poison: float, called: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, residual = make_model(), ResidualScheme()
    monkeypatch.setattr(transformer, "ResidualStream", KernelStream)
    expected, _ = run_steps(model, residual, uses_kernels=True)
    got, _ = run_steps(model, residual, uses_kernels=True, poison=poison)
    assert called == set(OPS)
    for part, whole in zip(got, expected, strict=True):
        assert torch.equal(part, whole)


class FakeGraphs:
    """Graphs that replay by computing again, into the tensors of the capture."""

    def make_pool(self) -> int:
        return 0

    def warm_up(self, run: Callable[[], object]) -> None:
        run()

    @torch.inference_mode()
    def capture(self, run: Callable[[], T], pool: int) -> CapturedPass[T]:
        output = run()
        assert isinstance(output, StepOutput)
        tensors = [getattr(output, field.name) for field in fields(output)]
        for tensor in tensors:
            tensor.fill_(1)

        @torch.inference_mode()
        def replay() -> None:
            again = run()
            for tensor, field in zip(tensors, fields(again), strict=True):  # type: ignore[arg-type]
                tensor.copy_(getattr(again, field.name))

        return CapturedPass(replay, output)


@pytest.mark.parametrize("sequences", [3, 4])
@pytest.mark.parametrize("scheme", ["standard", "ladder", "parallel"])
def test_captured_decoding_equals_eager_decoding(
    scheme: str, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "ResidualStream", KernelStream)
    model, residual = make_model(), ResidualScheme.model_validate({"scheme": scheme})
    expected, seen = run_steps(model, residual, uses_kernels=True)
    plans, comm = plan_layers(residual, TINY.layers, 1), SingleRankCommunicator()
    cache = PagedCache(TINY, SHARD, BLOCKS + 1, BLOCK_TOKENS)
    cache._memory.fill_(float("nan"))
    cache.uses_kernels = True
    graphs = GraphedDecoder(
        model,
        cache,
        plans,
        comm,
        sequences=sequences,
        sequence_blocks=5,
        spare_block=BLOCKS,
        backend=FakeGraphs(),
    )
    for number, step in enumerate(steps()):
        assert graphs.can_run(step) == (number >= 2)
        if number < 2:
            model.forward(Batch(step, BLOCK_TOKENS), cache, plans, comm)
            continue
        output = graphs(step)
        assert_close(output.logits, expected[number])
        assert torch.equal(output.best_tokens, expected[number].argmax(dim=-1))
        assert output.finite.tolist() == [True] * len(step.inputs)
    filled = ~cache._memory[:, :, : BLOCKS * BLOCK_TOKENS].isnan()
    assert_close(cache._memory[:, :, : BLOCKS * BLOCK_TOKENS][filled], seen._memory[filled])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_captured_decoding_reports_the_sequence_that_is_not_finite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformer, "ResidualStream", KernelStream)
    model, cache = make_model(), PagedCache(TINY, SHARD, BLOCKS + 1, BLOCK_TOKENS)
    cache._memory[1, 0, 9 * BLOCK_TOKENS] = float("nan")  # a key of the second sequence
    cache.uses_kernels = True
    for mlp in (layer.mlp for layer in model.layers):
        mlp.uses_kernels = True
    graphs = GraphedDecoder(
        model,
        cache,
        plan_layers(ResidualScheme(), TINY.layers, 1),
        SingleRankCommunicator(),
        sequences=4,
        sequence_blocks=5,
        spare_block=BLOCKS,
        backend=FakeGraphs(),
    )
    output = graphs(Step(tuple(SequenceInput([t], 1, [t]) for t in (7, 9, 8))))
    assert output.finite.tolist() == [True, False, True]
    too_many = Step(tuple(SequenceInput([t], 0, [t]) for t in range(5)))
    assert not graphs.can_run(too_many)
    assert not graphs.can_run(Step((SequenceInput([1], 0, [0], LogitsMode.NONE),)))
    assert not graphs.can_run(Step((SequenceInput([1], 21, list(range(6))),)))


@pytest.mark.parametrize("lags", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0)])
def test_stream_with_kernels_reads_and_norms_like_torch(lags: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    start, gain, *parts = (torch.randn(3, 37, generator=generator) for _ in range(6))
    comm = SingleRankCommunicator()
    streams = [KernelStream(start, comm), ResidualStream(start, comm)]
    for lag, part in zip(lags, parts, strict=True):
        normed = [stream.read_normed(lag, gain[0], 1e-5) for stream in streams]
        assert_close(*normed)
        assert_close(*(stream.read_normed(lag, gain[0], 1e-5) for stream in streams))
        for stream in streams:
            stream.add(part)
    assert_close(*(stream.read() for stream in streams))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
def test_mlp_with_kernel_equals_torch(dtype: torch.dtype) -> None:
    (weights, *_) = load_rank(MemoryWeights(random_tensors(TINY)), TINY, SHARD).layers
    mlp = Mlp(weights, threads=1)
    x = torch.randn(5, TINY.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = mlp(x)
    assert isinstance(weights.gate_up, torch.Tensor)
    mlp.gate_up = partial(torch.nn.functional.linear, weight=weights.gate_up.to(dtype))
    mlp.uses_kernels = True
    got = mlp(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05 * float(expected.max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("layout", ["rows", "transposed", "one token"])
def test_stitching_layer_with_kernel_equals_torch(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(37, 19).to(dtype).requires_grad_(False)
    x = torch.randn(2, 37, 5).transpose(1, 2) if layout == "transposed" else torch.randn(2, 5, 37)
    x = (x[:, :1] if layout == "one token" else x).to(dtype)
    got = bind_stitching_layer(linear, uses_kernel=True)(x)
    assert got.shape == (2, x.shape[1], 19)
    assert_close(got, linear.float()(x.float()).to(dtype))


def test_every_stitch_with_kernels_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tiny_config(depth=2).build().eval().requires_grad_(False)
    plain, bound = StitchExecutor(model), 0

    def bind(linear: nn.Linear, *, uses_kernel: bool) -> executors.Step:
        nonlocal bound
        bound += 1
        assert not uses_kernel
        return bind_stitching_layer(linear, uses_kernel=True)

    monkeypatch.setattr(executors, "bind_stitching_layer", bind)
    with_kernels = StitchExecutor(model)
    images = torch.randn(3, 1, 8, 8)
    assert bound
    with torch.inference_mode():
        for stitch in model.stitches:
            assert_close(with_kernels(images, stitch.id), plain(images, stitch.id))


def test_path_whose_capture_fails_runs_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemory(FakeGraphs):
        def capture(self, run: Callable[[], T], pool: int) -> CapturedPass[T]:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(transformer, "ResidualStream", KernelStream)
    monkeypatch.setattr(rank_engine, "CudaGraphs", OutOfMemory)
    config = RankConfig(model=TINY, paths=(ResidualScheme(),), max_model_len=16, block_tokens=4)
    held = rank_engine.RankEngine(rank_engine.Assignment(rank_config=config, rank=0))
    held.models, held.cache = [make_model()], PagedCache(TINY, SHARD, config.blocks + 1, 4)
    held.cache.uses_kernels = True
    with socket.socket() as listener:
        held.init_comm(SingleSpec(), listener)
    assert held.graphs == {}
    header, body = Step((SequenceInput([3], 0, [0]),)).pack()
    assert held.forward(Message(Kind.FORWARD, header, body)).header["non_finite"] == []
