"""Linear maps for serving: on a CPU, the faster of two libraries for each size.

Large products run on oneDNN, which is faster than the MKL behind `F.linear`. On an AMD EPYC (Zen 5,
one thread) [136, 224] x [224, 896] in float32 takes 0.22 ms instead of 0.46 ms, and one row times
weights that exceed the caches runs at 29 GB/s instead of 18 GB/s. A call to oneDNN takes 10 us
longer, so small products of cached weights run on MKL. Results differ by rounding only (1e-6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch.runtime.graph_builder import LowBitProduct
from ladderstitch.runtime.low_bit import LowBitMatrix, quantise

Linear = Callable[..., Tensor]
"""Function with the signature of `F.linear`: (x, weight, bias=None) -> product."""
Matrix: TypeAlias = Tensor | LowBitMatrix
"""A matrix [N, K] in any precision; a tensor may come from `pack`."""
Product = Callable[[Tensor], Tensor]
"""Function that multiplies x [T, K] with one matrix [N, K]: [T, N]."""

ONEDNN_MIN_MACS = 3_000_000
"""Products of fewer multiply-accumulates run on MKL if their weights are likely to be cached."""


def serving_linear(weight: Tensor, *, cached: bool = True) -> Linear:
    """Return the replacement of `F.linear` for a weight [N, K], by its device, dtype and layout.

    `cached` says whether the model's weights fit into a cache; `weight` may come from `pack`.
    """
    if weight.is_mkldnn:
        return _onednn
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not on_cpu or not torch.backends.mkldnn.is_available():
        return F.linear
    return _by_size if cached else _onednn


def open_product(matrix: Matrix, threads: int) -> Product:
    """Return the product with a matrix that no cache holds, by the fastest library for it."""
    if isinstance(matrix, LowBitMatrix):
        return LowBitProduct(matrix, threads)
    linear = serving_linear(matrix, cached=False)
    return lambda x: linear(x, matrix)


def store(weight: Tensor, bits: int | None, *, is_fine: bool = False) -> Matrix:
    """Return a matrix [N, K] with `bits` bits per weight, or `pack` it in its dtype if unset.

    Products with a low-bit matrix round activations to 8 bits, or to 16 if it `is_fine`.
    """
    return pack(weight) if bits is None else quantise(weight, bits, is_fine=is_fine)


def pack(weight: Tensor) -> Tensor:
    """Return bfloat16 CPU weights [N, K] in oneDNN's own layout, for `serving_linear` only.

    One row times packed weights reads them at 28 GB/s instead of 16 GB/s. Weights of another device
    or dtype are returned unchanged. The packed weights replace the original ones: no second copy is
    kept.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return weight
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return packed


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [.., K] times weight [N, K], plus the bias, computed by oneDNN."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return product


def _by_size(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the product from MKL if it is small, else from oneDNN."""
    if x.numel() * len(weight) < ONEDNN_MIN_MACS:
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)
