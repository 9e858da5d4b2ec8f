"""Attention of one new token per sequence over its cache pages, split along the sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladderstitch_kernels import reference
from ladderstitch_kernels.launch import (
    expect_contiguous,
    expect_like,
    expect_shape,
    interpreted,
    runs_triton,
    sms,
)

_BLOCK = 64
_MAX_SPLITS = 64


@triton.jit
def decode_attention_kernel(
    q,
    key_cache,
    value_cache,
    pages,
    lengths,
    partial,
    weights,
    scale,
    max_pages,
    split_tokens,
    heads,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute one split of one sequence and KV head per program.

    Stores for each head of the group the values weighted by exp(score - best), the best score, and
    the sum of the weights.
    """
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = heads // KV_HEADS
    member = tl.arange(0, GROUP_PAD)
    lane = tl.arange(0, WIDTH_PAD)
    head = row * heads + kv_head * group + member
    inside = lane < WIDTH
    queries = (member[:, None] < group) & inside[None, :]
    own = tl.load(q + head[:, None] * WIDTH + lane[None, :], mask=queries, other=0.0)
    if UPCAST:
        own = own.to(tl.float32)
    best = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_PAD], tl.float32)
    total = tl.zeros([GROUP_PAD, WIDTH_PAD], tl.float32)
    length = tl.load(lengths + row)
    end = tl.minimum(length, (split + 1) * split_tokens)
    for start in range(split * split_tokens, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        valid = token < end
        page = tl.load(pages + row * max_pages + token // PAGE, mask=valid, other=0)
        slot = page.to(tl.int64) * PAGE + token % PAGE
        at = (slot[:, None] * KV_HEADS + kv_head) * WIDTH + lane[None, :]
        kept = valid[:, None] & inside[None, :]
        key = tl.load(key_cache + at, mask=kept, other=0.0)
        value = tl.load(value_cache + at, mask=kept, other=0.0)
        if UPCAST:
            key, value = key.to(tl.float32), value.to(tl.float32)
        score = tl.dot(own, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(valid[None, :], score, float("-inf"))
        better = tl.maximum(best, tl.max(score, axis=1))
        chance = tl.exp(score - better[:, None])
        shrink = tl.exp(best - better)
        weight = weight * shrink + tl.sum(chance, axis=1)
        total = total * shrink[:, None]
        total = tl.dot(chance.to(value.dtype), value, total, input_precision="ieee")
        best = better
    at = head * SPLITS + split
    tl.store(partial + at[:, None] * WIDTH + lane[None, :], total, mask=queries)
    tl.store(weights + 2 * at, best, mask=member < group)
    tl.store(weights + 2 * at + 1, weight, mask=member < group)


@triton.jit
def merge_splits_kernel(
    partial,
    weights,
    out,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
):
    """Combine the splits of one head of one sequence per program."""
    head = tl.program_id(0)
    split = tl.arange(0, SPLITS_PAD)
    lane = tl.arange(0, WIDTH_PAD)
    exists = split < SPLITS
    at = head * SPLITS + split
    best = tl.load(weights + 2 * at, mask=exists, other=float("-inf"))
    weight = tl.load(weights + 2 * at + 1, mask=exists, other=0.0)
    top = tl.maximum(tl.max(best, axis=0), -1e30)  # finite also for a sequence without tokens
    shrink = tl.where(weight > 0, tl.exp(best - top), 0.0)
    valid = exists[:, None] & (lane[None, :] < WIDTH)
    total = tl.load(partial + at[:, None] * WIDTH + lane[None, :], mask=valid, other=0.0)
    whole = tl.sum(shrink * weight, axis=0)
    mixed = tl.sum(total * shrink[:, None], axis=0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out + head * WIDTH + lane, mixed.to(out.dtype.element_ty), mask=lane < WIDTH)


def paged_decode_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(q k^T * scale) v, [B, H, d], for queries over caches.

    `q` is [B, H, d], and the caches are [pages, page_tokens, K, d] with H a multiple of K. Token t
    of sequence b is in page pages[b, t // page_tokens], where `pages` is [B, P] int32. Sequence b
    has lengths[b] tokens, including the new one; the output is zero if it has none. `scale` is
    d^-0.5 if unset. The torch equivalent is `F.scaled_dot_product_attention` over gathered pages;
    this op does not gather them. A sequence is split so that a small batch fills the GPU
    (flash-decoding). Raises `ValueError` if the shapes do not fit together.
    """
    _check_arguments(q, key_cache, value_cache, pages, lengths)
    if not runs_triton(q):
        return reference.paged_decode_attention(q, key_cache, value_cache, pages, lengths, scale)
    out = torch.empty_like(q)
    if not out.numel():
        return out
    batch, heads, width = q.shape
    _, page_tokens, kv_heads, _ = key_cache.shape
    splits, split_tokens = split_sequence(
        pages.shape[1] * page_tokens, batch * kv_heads, sms(q.device)
    )
    partial = torch.empty(batch, heads, splits, width, device=q.device)
    weights = torch.empty(batch, heads, splits, 2, device=q.device)
    width_pad = max(16, triton.next_power_of_2(width))
    decode_attention_kernel[(batch, kv_heads, splits)](
        q,
        key_cache,
        value_cache,
        pages,
        lengths,
        partial,
        weights,
        width**-0.5 if scale is None else scale,
        pages.shape[1],
        split_tokens,
        heads,
        PAGE=page_tokens,
        WIDTH=width,
        KV_HEADS=kv_heads,
        SPLITS=splits,
        GROUP_PAD=max(16, triton.next_power_of_2(heads // kv_heads)),
        WIDTH_PAD=width_pad,
        BLOCK=_BLOCK,
        UPCAST=interpreted() or q.dtype == torch.float32,
        num_warps=4,
        num_stages=3,
    )
    merge_splits_kernel[(batch * heads,)](
        partial,
        weights,
        out,
        WIDTH=width,
        SPLITS=splits,
        SPLITS_PAD=triton.next_power_of_2(splits),
        WIDTH_PAD=width_pad,
        num_warps=4,
    )
    return out


def _check_arguments(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, pages: Tensor, lengths: Tensor
) -> None:
    if q.dim() != 3 or key_cache.dim() != 4 or q.shape[1] % key_cache.shape[2]:
        raise ValueError(
            f"q: expected [B, H, d] with H a multiple of the cache's heads "
            f"({key_cache.shape[2] if key_cache.dim() == 4 else key_cache.shape}), "
            f"got {list(q.shape)}"
        )
    batch, _, width = q.shape
    expect_shape("key_cache", key_cache, (*key_cache.shape[:3], width))
    expect_shape("value_cache", value_cache, tuple(key_cache.shape))
    expect_shape("lengths", lengths, (batch,))
    expect_shape("pages", pages, (batch, pages.shape[-1]))
    expect_contiguous("pages", pages)
    for name, x in (("q", q), ("key_cache", key_cache), ("value_cache", value_cache)):
        expect_like(name, x, q)


def split_sequence(max_tokens: int, rows: int, processors: int) -> tuple[int, int]:
    """Return the number of splits of a sequence, and the tokens of one split.

    A split is a whole number of blocks of 64 tokens. There are at most 64 splits, and at most two
    programs per processor if valid is more than one. `rows` counts pairs of sequence and KV head.
    The result depends on the capacity of the page table, `max_tokens`, and not on the lengths,
    which only the GPU knows.
    """
    blocks = max(1, triton.cdiv(max_tokens, _BLOCK))
    wanted = max(1, min(blocks, _MAX_SPLITS, 2 * processors // rows))
    tokens = triton.cdiv(blocks, wanted) * _BLOCK
    return triton.cdiv(blocks * _BLOCK, tokens), tokens
