"""Products of a layer with its matrices, with their biases."""

from __future__ import annotations

from torch import Tensor

from ladderstitch.runtime.linear import Matrix, Product, open_product


def matrix_for_kernels(matrix: Matrix, bias: Tensor | None) -> Tensor | None:
    """Return a matrix with which a kernel can multiply and send at once; None: it cannot.

    Low-bit matrices belong to their sessions alone, and the kernels add no bias.
    """
    return matrix if isinstance(matrix, Tensor) and bias is None else None


def open_biased(matrix: Matrix, bias: Tensor | None, threads: int) -> Product:
    """Return the product with a matrix, plus the bias if there is one."""
    product = open_product(matrix, threads)
    return product if bias is None else lambda x: product(x) + bias
