"""Routes through several anchors with kernels, in the interpreter, against the definition."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ladderstitch.text.comm.base import SingleRankCommunicator
from ladderstitch.text.model import stitched
from ladderstitch.text.model.residual import ResidualScheme, Scheme
from ladderstitch.text.model.residual_stream import AffineMap, ResidualStream
from tests.support.elastic_models import Definition, random_family
from tests.support.stitched_kernels import ROUTES, KernelRank, KernelStream, random_tokens


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the shapes of the maps that `stitch_pending` was called with, a list that grows."""
    module = importlib.import_module("ladderstitch_kernels.ops.stitch_linear")
    op: Callable[..., tuple[Tensor, Tensor]] = module.stitch_pending
    shapes: list[tuple[int, int]] = []

    def record(x: Tensor, pending: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append((weight.shape[1], weight.shape[0]))
        return op(x, pending, weight, bias)

    monkeypatch.setattr(module, "stitch_pending", record)
    return shapes


@pytest.mark.parametrize("scheme", ["standard", "ladder", "parallel"])
@pytest.mark.parametrize("name", ["small-2+large", "large-1+small", "large-3+small"])
def test_route_with_kernels_equals_definition(
    name: str, scheme: Scheme, mapped: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stitched, "ResidualStream", KernelStream)
    tokens, route = random_tokens(8), ROUTES[name]
    lag, parallel = int(scheme == "ladder"), scheme == "parallel"
    expected = Definition(random_family(), lag=lag, parallel=parallel).logits(tokens, [route] * 8)
    held = KernelRank(SingleRankCommunicator(), ResidualScheme(scheme=scheme))
    found = held.decode(tokens, 5, route)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    steps = 4  # the prompt, and one for each other token
    assert mapped == ([(40, 24)] * steps if name.startswith("large") else [])


def test_cache_that_kernels_translate_equals_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stitched, "ResidualStream", KernelStream)
    tokens, before, after = random_tokens(8), ROUTES["large-2+small"], ROUTES["small-1+large"]
    definition = Definition(random_family(), lag=1)
    expected = definition.logits(tokens, [before] * 5 + [after] * 3)
    held = KernelRank(SingleRankCommunicator(), ResidualScheme(scheme="ladder"))
    parts = [held.run(tokens[:5], 0, before)]
    held.model.translate(held.batch(tokens[:5], 0), held.cache, before, after, held.comm)
    parts += [held.run(tokens[n : n + 1], n, after) for n in range(5, 8)]
    assert (torch.cat(parts) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_stream_with_kernels_crosses_like_torch(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    front, end = shape
    map_, comm = AffineMap(random(end, front), random(end)), SingleRankCommunicator()
    start, first, last, after, gain = (random(2, d) for d in (front, front, front, end, end))
    streams = KernelStream(start, comm), ResidualStream(start, comm)
    for stream in streams:
        stream.add(first)
        stream.read(lag=1)
        stream.add_and_cross(last, map_)
    total = (start + first + last).double() @ map_.matrix.double().T + map_.bias
    lagged = (start + first).double() @ map_.matrix.double().T + map_.bias
    for stream in streams:
        torch.testing.assert_close(stream.read(lag=1), lagged.float())
        stream.add(after)
        normed = torch.nn.functional.rms_norm(total, (end,), gain[0].double(), 1e-5)
        torch.testing.assert_close(stream.read_normed(1, gain[0], 1e-5), normed.float())
        torch.testing.assert_close(stream.read(), (total + after).float())
