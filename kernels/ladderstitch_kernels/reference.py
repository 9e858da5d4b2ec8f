"""Reference implementations in float32: the same names and arguments as the ops.

Every function computes in float32 (float64 for float64 input) and returns the dtype of its first
argument. The ops use them for CPU tensors, and tests compare the kernels with them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
"""Of the norms of decoders."""


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    wide = _upcast(x)
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * _upcast(weight)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (r, rms_norm(r)) with r = residual + x, rounded to its dtype before the norm."""
    total = (_upcast(residual) + _upcast(x)).to(x.dtype)
    return total, rms_norm(total, weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [M, F], for `gate_up` [M, 2F] with gate first."""
    gate, up = _upcast(gate_up).chunk(2, dim=-1)
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
    """Rotate the queries and keys of `qkv` [M, H + 2K, d] and store keys and values in the caches.

    Return the rotated queries [M, H, d]. See `ops.rope_append`.
    """
    pages, page, kv_heads, width = key_cache.shape
    heads = qkv.shape[1] - 2 * kv_heads
    cosine, sine = _upcast(cosines)[positions, None], _upcast(sines)[positions, None]  # [M, 1, d/2]
    low, high = _upcast(qkv[:, : heads + kv_heads]).chunk(2, dim=-1)
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
    """Return softmax(q k^T * scale) v over each sequence's own pages, [B, H, d].

    See `ops.paged_decode_attention`.
    """
    batch, heads, width = q.shape
    kv_heads = key_cache.shape[2]
    out = torch.zeros_like(q)
    for row in range(batch):
        length = int(lengths[row])
        if length == 0:
            continue
        own = pages[row].clamp(min=0)
        keys = _upcast(key_cache[own].reshape(-1, kv_heads, width)[:length]).transpose(0, 1)
        values = _upcast(value_cache[own].reshape(-1, kv_heads, width)[:length]).transpose(0, 1)
        grouped = _upcast(q[row]).view(kv_heads, heads // kv_heads, width)
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
    """Return x W^T + b + (x A^T) B^T: a stitching layer [N, K] with a low-rank update A, B."""
    y = _upcast(x) @ _upcast(weight).T
    if down is not None and up is not None:
        y = y + _upcast(x) @ _upcast(down).T @ _upcast(up).T
    return (y if bias is None else y + _upcast(bias)).to(x.dtype)


def stitch_pending(
    x: Tensor,
    pending: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (S x, S_w p): the stitched stream, and the pending sum mapped without the bias."""
    return (
        stitch_linear(x, weight, bias, down, up),
        stitch_linear(pending, weight, None, down, up),
    )


class CompleteStream:
    """The stream of a decoder on one rank, always complete: what `stream.Stream` computes.

    A lag of 1 reads the stream of before the last sub-block. A stitch maps both.
    """

    def __init__(self, x: Tensor, lag: int) -> None:
        self._before, self._last, self._lag = x, x, lag

    def read_normed(self, gain: Tensor) -> Tensor:
        """Return the RMS norm [M, D] of the stream."""
        return rms_norm(self._before if self._lag else self._last, gain, EPS)

    def add_product(self, x: Tensor, weight: Tensor) -> None:
        """Add x @ weight.T."""
        added = _upcast(self._last) + _upcast(x) @ _upcast(weight).T
        self._before, self._last = self._last, added.to(x.dtype)

    def add_and_cross(self, x: Tensor, weight: Tensor, stitch: tuple[Tensor, Tensor]) -> None:
        """Add x @ weight.T, then map the stream by a stitching layer, weight and bias."""
        self.add_product(x, weight)
        self._before = stitch_linear(self._before, *stitch)
        self._last = stitch_linear(self._last, *stitch)

    def drain(self) -> Tensor:
        """Return the stream [M, D]."""
        return self._last
