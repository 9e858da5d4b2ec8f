"""Linear maps for serving: on a CPU the faster of two libraries for each size.

Large products run on oneDNN, which beats the MKL behind `F.linear` on an AMD EPYC (Zen 5, one
thread): [136, 224] x [224, 896] in float32 0.22 ms against 0.46 ms; one row times weights that no
cache holds 29 GB/s against 18 GB/s. A call costs it 10 us more, so small products from the cache
stay with MKL. Results differ by rounding only (1e-6).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[..., Tensor]
"""(x, weight, bias=None) -> product, as `F.linear`."""

ONEDNN_MIN_MACS = 3_000_000
"""Products of fewer multiplications run on MKL if their weights are likely to be in a cache."""


def serving_linear(weight: Tensor, *, cached: bool = True) -> Linear:
    """The function to use as `F.linear` with weights like this one, on its device and dtype.

    `cached` says whether the model's weights fit a cache; `weight` may come from `pack`.
    """
    if weight.is_mkldnn:
        return _onednn
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    if not on_cpu or not torch.backends.mkldnn.is_available():
        return F.linear
    return _by_size if cached else _onednn


def pack(weight: Tensor) -> Tensor:
    """Half-precision CPU weights [N, K] in oneDNN's own layout, for `serving_linear` only.

    One row times packed weights streams them at 28 GB/s instead of 16; anything else stays as it
    is. Neither layout is kept beside the other.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return weight
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return packed


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return product


def _by_size(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.numel() * len(weight) < ONEDNN_MIN_MACS:
        return F.linear(x, weight, bias)
    return _onednn(x, weight, bias)
