"""Ops of a single rank, compared with their references at odd shapes in the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch_kernels import (
    add_rms_norm,
    paged_decode_attention,
    reference,
    rope_append,
    stitch_linear,
    stitch_pending,
    swiglu,
)
from ladderstitch_kernels.comm.all_reduce import AllReduce
from ladderstitch_kernels.comm.split_phase import Exchange, gemv_post, post, wait_sum
from ladderstitch_kernels.comm.symmetric import StreamRanks
from ladderstitch_kernels.decoder import run_parts
from ladderstitch_kernels.ops.decode_attention import split_sequence
from ladderstitch_kernels.stream import Stream
from tests.kernels.tolerances import DTYPES, assert_close

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])


@pytest.fixture
def random() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return make


@dtypes
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 37), (2, 576), (1, 4097)])
def test_add_rms_norm_matches_reference(
    m: int, n: int, dtype: torch.dtype, random: Callable[..., Tensor]
) -> None:
    x, residual, weight = random(m, n, dtype=dtype), random(m, n, dtype=dtype), random(n)
    expected = reference.add_rms_norm(x, residual, weight.to(dtype), 1e-5)
    got = add_rms_norm(x, residual, weight.to(dtype), 1e-5)
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])


@dtypes
@pytest.mark.parametrize(("m", "f"), [(1, 1), (3, 37), (2, 1536), (0, 8)])
def test_swiglu_matches_reference(
    m: int, f: int, dtype: torch.dtype, random: Callable[..., Tensor]
) -> None:
    gate_up = random(m, 2 * f, dtype=dtype) * 4
    assert_close(swiglu(gate_up), reference.swiglu(gate_up))


@dtypes
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width"), [(1, 1, 1, 2), (5, 3, 1, 10), (3, 9, 3, 64)]
)
def test_rope_append_matches_reference(
    tokens: int,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    random: Callable[..., Tensor],
) -> None:
    qkv = random(tokens, heads + 2 * kv_heads, width, dtype=dtype)
    angles = random(11, width // 2)
    positions = torch.arange(tokens) * 2
    slots = torch.randperm(12, generator=torch.Generator().manual_seed(1))[:tokens]
    slots[0] = -1 if tokens > 1 else 5
    caches = [torch.full((4, 3, kv_heads, width), 7.0, dtype=dtype) for _ in range(4)]
    tables = angles.cos(), angles.sin()
    expected = reference.rope_append(qkv, *tables, positions, slots, caches[0], caches[1])
    got = rope_append(qkv, *tables, positions, slots, caches[2], caches[3])
    assert_close(got, expected)
    assert_close(caches[2], caches[0])
    assert torch.equal(caches[3], caches[1])
    assert (caches[2] == 7).sum() == caches[2].numel() - (slots >= 0).sum() * kv_heads * width


@dtypes
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "page", "lengths"),
    [
        (1, 1, 8, 1, [1]),
        (3, 1, 10, 3, [7, 1, 0]),
        (9, 3, 64, 16, [130, 33]),
    ],
)
def test_paged_decode_attention_matches_reference(
    heads: int,
    kv_heads: int,
    width: int,
    page: int,
    lengths: list[int],
    dtype: torch.dtype,
    random: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ladderstitch_kernels.ops.decode_attention.sms", lambda device: 8)
    max_pages = -(-max(lengths) // page)
    q = random(len(lengths), heads, width, dtype=dtype)
    caches = random(2, max_pages * len(lengths) + 2, page, kv_heads, width, dtype=dtype)
    caches[:, -1] = float("nan")  # a page that no sequence owns
    order = torch.randperm(max_pages * len(lengths), generator=torch.Generator().manual_seed(2))
    pages = order.view(len(lengths), max_pages).int()
    used = torch.arange(max_pages) < -(-torch.tensor(lengths)[:, None] // page)
    expected = reference.paged_decode_attention(q, *caches, pages, torch.tensor(lengths))
    unowned = torch.where(used, pages, caches.shape[1] - 1)
    got = paged_decode_attention(
        q, *caches, unowned.int(), torch.tensor(lengths, dtype=torch.int32)
    )
    assert_close(got, expected)


@pytest.mark.parametrize("poison", [float("nan"), -float("inf")])
@pytest.mark.parametrize("lengths", [[1, 5, 0], [64, 66, 63]])
def test_paged_decode_attention_reads_own_tokens_only(
    lengths: list[int],
    poison: float,
    random: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slots after the last token, other pages and a sequence that is not finite change no bit."""
    monkeypatch.setattr("ladderstitch_kernels.ops.decode_attention.sms", lambda device: 8)
    page, most = 8, -(-max(lengths) // 8)
    q = random(len(lengths), 4, 16)
    clean = torch.zeros(2, (most + 1) * len(lengths), page, 2, 16, dtype=torch.float32)
    spoilt = torch.full_like(clean, poison)
    order = torch.randperm(most * len(lengths), generator=torch.Generator().manual_seed(3)).int()
    pages = order.view(len(lengths), most)
    for row, length in enumerate(lengths):
        slots = pages[row].repeat_interleave(page)[:length], torch.arange(length) % page
        values = random(2, length, 2, 16, dtype=torch.float32)
        clean[:, *slots], spoilt[:, *slots] = values, values
    used = torch.tensor(lengths, dtype=torch.int32)
    expected = paged_decode_attention(q, *clean, pages, used)
    assert torch.equal(paged_decode_attention(q, *spoilt, pages, used), expected)
    spoilt[:, pages[1, 0].item()] = poison
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy, which warns of NaN
        got = paged_decode_attention(q, *spoilt, pages, used)
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert not got[1].isfinite().all()


def test_split_sequence_fills_the_processors() -> None:
    assert split_sequence(128 * 1024, 256, 132) == (1, 128 * 1024)
    assert split_sequence(10, 1, 132) == (1, 64)
    for tokens, rows in [(1000, 3), (4160, 7), (100_000, 1), (131_072, 8)]:
        splits, each = split_sequence(tokens, rows, 132)
        assert (splits - 1) * each < tokens <= splits * each
        assert splits * rows <= 2 * 132


@dtypes
@pytest.mark.parametrize("rank", [0, 1, 5], ids=lambda rank: f"rank{rank}")
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 37, 19), (70, 64, 130)])
def test_stitch_linear_and_stitch_pending_match_reference(
    m: int, k: int, n: int, rank: int, dtype: torch.dtype, random: Callable[..., Tensor]
) -> None:
    x, pending, weight = (random(*shape, dtype=dtype) for shape in ((m, k), (m, k), (n, k)))
    bias = random(n, dtype=dtype)
    low = (random(rank, k, dtype=dtype), random(n, rank, dtype=dtype)) if rank else (None, None)
    assert_close(stitch_linear(x, weight), reference.stitch_linear(x, weight))
    expected = reference.stitch_pending(x, pending, weight, bias, *low)
    for got, part in zip(stitch_pending(x, pending, weight, bias, *low), expected, strict=True):
        assert_close(got, part)
    assert_close(stitch_linear(x, weight, bias, *low), expected[0])


def test_reference_norm_swiglu_and_stitch_match_torch(random: Callable[..., Tensor]) -> None:
    x, residual, weight = random(3, 37), random(3, 37), random(37)
    total, normed = reference.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, F.rms_norm(x + residual, (37,), weight, 1e-5))
    gate, up = random(3, 5), random(3, 5)
    torch.testing.assert_close(reference.swiglu(torch.cat((gate, up), 1)), F.silu(gate) * up)
    down, back, matrix = random(2, 37), random(5, 2), random(5, 37)
    torch.testing.assert_close(
        reference.stitch_linear(x, matrix, random(5) * 0 + 1, down, back),
        F.linear(x, matrix + back @ down, torch.ones(5)),
    )


def test_reference_attention_matches_torch(random: Callable[..., Tensor]) -> None:
    q, keys, values = random(1, 6, 8), random(1, 7, 2, 8), random(1, 7, 2, 8)
    got = reference.paged_decode_attention(
        q, keys.view(7, 1, 2, 8), values.view(7, 1, 2, 8), torch.arange(7)[None], torch.tensor([7])
    )
    expected = F.scaled_dot_product_attention(
        q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), enable_gqa=True
    )
    torch.testing.assert_close(got, expected[:, :, 0])


def test_reference_rotation_matches_complex_numbers(random: Callable[..., Tensor]) -> None:
    qkv, angles = random(4, 3, 6), random(9, 3)
    positions, slots = torch.tensor([8, 0, 3, 3]), torch.tensor([0, 1, 2, 3])
    keys, values = torch.zeros(4, 1, 1, 6), torch.zeros(4, 1, 1, 6)
    q = reference.rope_append(qkv, angles.cos(), angles.sin(), positions, slots, keys, values)
    pairs = torch.complex(qkv[..., :3].double(), qkv[..., 3:].double())
    turned = pairs * torch.exp(1j * angles[positions, None].double())
    whole = torch.cat((turned.real, turned.imag), -1).float()
    torch.testing.assert_close(q, whole[:, :1])
    torch.testing.assert_close(keys[:, 0], whole[:, 1:2])
    torch.testing.assert_close(values[:, 0], qkv[:, 2:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: add_rms_norm(x, x[:, :2], x[0], 1e-5),
            r"residual: expected shape \[2, 4\], got",
        ),
        (
            lambda x: add_rms_norm(x, x.half(), x[0], 1e-5),
            "residual: expected torch.float32 on cpu",
        ),
        (lambda x: swiglu(x[:, :3]), r"gate_up: expected shape .* got \[2, 3\]"),
        (lambda x: swiglu(x.T), "gate_up: expected a contiguous tensor, got strides"),
        (lambda x: stitch_linear(x, x[:, :3].contiguous()), r"weight: expected shape \[2, 4\]"),
        (lambda x: stitch_linear(x, x, down=x), "down and up: expected both or neither, got one"),
        (
            lambda x: paged_decode_attention(x[:, None], x[:, None, None], x, x, x),
            r"value_cache: expected shape \[2, 1, 1, 4\], got \[2, 4\]",
        ),
        (
            lambda x: rope_append(x[:, None], x, x, x, x, x[:, None, None], x),
            r"qkv: expected shape \[M, more than 2, 4\] of an even width, got \[2, 1, 4\]",
        ),
    ],
)
def test_ops_with_bad_argument_name_it(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, e: post(x, e), r"partial: expected shape \[1 to 2, 1 to 3\], got \[2, 4\]"),
        (lambda x, e: post(x[:0, :3], e), r"partial: expected shape \[1 to 2, 3\], got \[0, 3\]"),
        (lambda x, e: gemv_post(x, x.T @ x, e), "weight: expected at most 3 rows, got 4"),
        (lambda x, e: wait_sum(1, e, 4), r"sum: expected shape .*, got \[1, 4\]"),
        (lambda x, e: wait_sum(3, e, 2), r"sum: expected shape \[1 to 2, 2\], got \[3, 2\]"),
        (lambda x, e: run_parts([], [], Stream(x, e, 1)), "one fewer than 0 decoders, got 0"),
    ],
)
def test_reduction_of_bad_shape_names_it(
    call: Callable[[Tensor, Exchange], object], message: str
) -> None:
    exchange = Exchange(StreamRanks.group(1, "cpu")[0], 2, 3, torch.float32)
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 4), exchange)


def test_sums_of_changing_width_keep_their_slots() -> None:
    memories = StreamRanks.group(2, "cpu")
    exchanges = [Exchange(memory, 2, 40, torch.float32, columns=16) for memory in memories]
    shapes = [(2, 40), (1, 8), (2, 8), (1, 40), (2, 17), (2, 40), (1, 3)]
    parts = [torch.randn(2, *shape) for shape in shapes]
    for number in range(len(parts) + 1):  # two in flight
        if number < len(parts):
            for exchange, part in zip(exchanges, parts[number], strict=True):
                post(part, exchange)
        if number:
            rows, width = shapes[number - 1]
            for exchange in exchanges:
                assert torch.equal(wait_sum(rows, exchange, width), parts[number - 1].sum(0))


def test_ranks_with_released_waits_run_alone_and_count_on_together() -> None:
    memories = StreamRanks.group(2, "cpu")
    exchanges = [Exchange(memory, 1, 48, torch.float32, "cpu", columns=16) for memory in memories]
    reduces = [AllReduce(memory, 40, torch.float32, "cpu", programs=1) for memory in memories]
    parts = torch.randn(2, 1, 48)
    for exchange, reduce, part in zip(exchanges, reduces, parts, strict=True):
        for waiting in (exchange, reduce):
            waiting.stop()
        post(part, exchange)
        wait_sum(1, exchange)  # the other rank has not posted
        reduce(part[:, :40].contiguous())
        for waiting in (exchange, reduce):
            waiting.resume()
    assert [exchange.arrivals.local.tolist() for exchange in exchanges] == [[3, 3], [3, 3]]
    assert {int(n) for reduce in reduces for n in reduce.arrivals.local.flatten()} == {0, 1}
    for exchange, part in zip(exchanges, parts, strict=True):
        post(2 * part, exchange)
    for exchange in exchanges:
        assert torch.equal(wait_sum(1, exchange), 2 * parts[0] + 2 * parts[1])
