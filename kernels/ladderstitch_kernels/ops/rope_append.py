"""Rotary embedding of new queries and keys, and storing keys and values in the paged cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ladderstitch_kernels import reference
from ladderstitch_kernels.launch import expect_contiguous, expect_like, expect_shape, runs_triton


@triton.jit
def rope_append_kernel(
    qkv,
    cosines,
    sines,
    positions,
    slots,
    q_out,
    key_cache,
    value_cache,
    heads,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Rotate and store all heads of one token per program."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    lane = tl.arange(0, HALF_PAD)
    cosine = tl.load(cosines + position * HALF + lane, mask=lane < HALF, other=0.0).to(tl.float32)
    sine = tl.load(sines + position * HALF + lane, mask=lane < HALF, other=0.0).to(tl.float32)
    head = tl.arange(0, HEADS_PAD)[:, None]
    inside = lane[None, :] < HALF
    own = qkv + row * (heads + 2 * KV_HEADS) * 2 * HALF
    at = head * 2 * HALF + lane[None, :]
    turns = (head < heads + KV_HEADS) & inside
    low = tl.load(own + at, mask=turns, other=0.0).to(tl.float32)
    high = tl.load(own + at + HALF, mask=turns, other=0.0).to(tl.float32)
    turned_low = (low * cosine[None, :] - high * sine[None, :]).to(qkv.dtype.element_ty)
    turned_high = (high * cosine[None, :] + low * sine[None, :]).to(qkv.dtype.element_ty)
    queries = (head < heads) & inside
    tl.store(q_out + row * heads * 2 * HALF + at, turned_low, mask=queries)
    tl.store(q_out + row * heads * 2 * HALF + at + HALF, turned_high, mask=queries)
    keys = turns & (head >= heads) & (slot >= 0)
    kept = slot * KV_HEADS * 2 * HALF + at - heads * 2 * HALF
    tl.store(key_cache + kept, turned_low, mask=keys)
    tl.store(key_cache + kept + HALF, turned_high, mask=keys)
    value_from = own + KV_HEADS * 2 * HALF
    low = tl.load(value_from + at, mask=keys, other=0.0)
    high = tl.load(value_from + at + HALF, mask=keys, other=0.0)
    tl.store(value_cache + kept, low, mask=keys)
    tl.store(value_cache + kept + HALF, high, mask=keys)


def rope_append(
    qkv: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """Rotate the queries and keys of M tokens by their positions, and store keys and values.

    `qkv` [M, H + 2K, d] holds queries, keys and values by head. Pairs (i, i + d/2) are rotated (the
    half-split layout of rotary embedding, arXiv 2104.09864). `cosines` and `sines` are [P, d/2],
    and `positions` [M] index them. The key and value of token m go to slot
    slots[m] = page * page_tokens + offset of the caches [pages, page_tokens, K, d]; nothing is
    stored for a slot below zero. Returns the rotated queries [M, H, d]. Raises `ValueError` if the
    shapes do not fit together.
    """
    _, _, kv_heads, width = key_cache.shape
    if qkv.dim() != 3 or qkv.shape[2] != width or qkv.shape[1] <= 2 * kv_heads or width % 2:
        raise ValueError(
            f"qkv: expected shape [M, more than {2 * kv_heads}, {width}] of an even width, "
            f"got {list(qkv.shape)}"
        )
    expect_shape("cosines", cosines, (sines.shape[0], width // 2))
    expect_shape("sines", sines, (sines.shape[0], width // 2))
    expect_shape("positions", positions, (qkv.shape[0],))
    expect_shape("slots", slots, (qkv.shape[0],))
    expect_shape("value_cache", value_cache, tuple(key_cache.shape))
    for name, x in (("qkv", qkv), ("key_cache", key_cache), ("value_cache", value_cache)):
        expect_like(name, x, qkv)
    for name, x in (("cosines", cosines), ("sines", sines)):
        expect_contiguous(name, x)
    if not runs_triton(qkv):
        return reference.rope_append(qkv, cosines, sines, positions, slots, key_cache, value_cache)
    tokens, all_heads, _ = qkv.shape
    heads = all_heads - 2 * kv_heads
    q = torch.empty(tokens, heads, width, dtype=qkv.dtype, device=qkv.device)
    if tokens:
        rope_append_kernel[(tokens,)](
            qkv,
            cosines,
            sines,
            positions,
            slots,
            q,
            key_cache,
            value_cache,
            heads,
            KV_HEADS=kv_heads,
            HALF=width // 2,
            HEADS_PAD=triton.next_power_of_2(heads + kv_heads),
            HALF_PAD=triton.next_power_of_2(width // 2),
            num_warps=4,
        )
    return q
