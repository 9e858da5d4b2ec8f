"""The MLPs of a layer on one rank: with all columns, or with the first ones only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.products import matrix_for_kernels, open_biased
from ladderstitch.text.model.weights import LayerWeights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class Mlp:
    """The MLP over one rank's columns, SwiGLU or another: [T, D] -> [T, F_r].

    The product with `output` [D, F_r] is this rank's partial [T, D].
    """

    def __init__(
        self, weights: LayerWeights, threads: int, activation: str = "silu", *, gated: bool = True
    ) -> None:
        self.output_matrix = matrix_for_kernels(weights.down, weights.down_bias)
        self.gate_up = open_biased(weights.gate_up, weights.gate_up_bias, threads)
        self.output = open_biased(weights.down, weights.down_bias, threads)
        self._activate, self._gated = ACTIVATIONS[activation], gated
        on_gpu = isinstance(weights.down, Tensor) and weights.down.is_cuda
        self.uses_kernels = on_gpu and gated and activation == "silu"

    def __call__(self, x: Tensor) -> Tensor:
        """Return act(x @ gate.T) * (x @ up.T), or act(x @ up.T) without a gate, of x [T, D]."""
        gate_up = self.gate_up(x)
        if self.uses_kernels:
            from ladderstitch_kernels.ops.swiglu import swiglu

            return swiglu(gate_up)
        if not self._gated:
            return self._activate(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self._activate(gate) * up


class NarrowMlp:
    """The first columns of an MLP on one rank, as views of its matrices: [T, D] -> [T, columns]."""

    output_matrix = None

    def __init__(self, weights: LayerWeights, columns: int, config: DecoderConfig) -> None:
        assert isinstance(weights.gate_up, Tensor), "low-bit matrices have no slices"
        assert isinstance(weights.down, Tensor), "low-bit matrices have no slices"
        height, bias = weights.down.shape[1], weights.gate_up_bias
        self.parts = []
        for first in (0, height) if config.gated else (0,):
            rows = slice(first, first + columns)
            self.parts.append((weights.gate_up[rows], None if bias is None else bias[rows]))
        self.down, self._down_bias = weights.down[:, :columns], weights.down_bias
        self._activate = ACTIVATIONS[config.activation]

    def __call__(self, x: Tensor) -> Tensor:
        """Return the activations [T, columns] of x [T, D], as `Mlp` does."""
        products = [F.linear(x, matrix, bias) for matrix, bias in self.parts]
        activated = self._activate(products[0])
        return activated * products[1] if len(products) > 1 else activated

    def output(self, x: Tensor) -> Tensor:
        """Return this rank's partial [T, D] of activations [T, columns]."""
        return F.linear(x, self.down, self._down_bias)
