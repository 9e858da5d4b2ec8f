"""What each op means, in float32: same names, same arguments, no tricks.

Every function computes in float32 (float64 for float64 input) and returns the dtype of its first
argument. They serve CPU tensors and are what the kernels are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    wide = _wide(x)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * _wide(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(r, rms_norm(r)) with r = residual + x, rounded to its dtype before the norm."""
    total = (_wide(residual) + _wide(x)).to(x.dtype)
    return total, rms_norm(total, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """[M, 2F] -> [M, F]: silu(gate) * up."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def rope_append(
    qkv: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """Turn the queries and keys of [M, H + 2K, d], keep keys and values; see `ops.rope_append`."""
    pages, page, kv_heads, width = key_cache.shape
    heads = qkv.shape[1] - 2 * kv_heads
    cosine, sine = _wide(cosines)[positions, None], _wide(sines)[positions, None]  # [M, 1, d/2]
    low, high = _wide(qkv[:, : heads + kv_heads]).chunk(2, dim=-1)
    turned = torch.cat((low * cosine - high * sine, high * cosine + low * sine), -1).to(qkv.dtype)
    kept = slots >= 0
    flat = pages * page, kv_heads, width
    key_cache.view(flat)[slots[kept]] = turned[kept, heads:]
    value_cache.view(flat)[slots[kept]] = qkv[kept, heads + kv_heads :]
    return turned[:, :heads].contiguous()


def paged_decode_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v over each sequence's own pages; see `ops.paged_decode_attention`."""
    batch, heads, width = q.shape
    kv_heads = key_cache.shape[2]
    out = torch.zeros_like(q)
    for row in range(batch):
        length = int(lengths[row])
        if length == 0:
            continue
        own = pages[row].clamp(min=0)
        keys = _wide(key_cache[own].reshape(-1, kv_heads, width)[:length]).transpose(0, 1)
        values = _wide(value_cache[own].reshape(-1, kv_heads, width)[:length]).transpose(0, 1)
        grouped = _wide(q[row]).view(kv_heads, heads // kv_heads, width)
        scores = grouped @ keys.mT * (width**-0.5 if scale is None else scale)  # [K, H/K, S]
        out[row] = (scores.softmax(-1) @ values).reshape(heads, width).to(q.dtype)
    return out


def stitch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """x W^T + b + (x A^T) B^T: a stitching layer [N, K] with an update of low rank A, B."""
    y = _wide(x) @ _wide(weight).T
    if down is not None and up is not None:
        y = y + _wide(x) @ _wide(down).T @ _wide(up).T
    return (y if bias is None else y + _wide(bias)).to(x.dtype)


def stitch_pending(
    x: Tensor,
    pending: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(S x, S_w p): the stitched stream, and the map without bias of what is still to arrive."""
    return (
        stitch_linear(x, weight, bias, down, up),
        stitch_linear(pending, weight, None, down, up),
    )
