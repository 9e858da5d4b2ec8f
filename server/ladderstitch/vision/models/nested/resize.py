"""Images at the resolution of a path, where the paths of one family differ in it.

Requests are prepared at the family's size, whatever path answers; the path resizes them, as
AttentiveNAS does, by bicubic interpolation of the prepared tensor without smoothing.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ladderstitch.vision.models.nested.slices import Plan

SHARPNESS = np.float32(-0.75)
"""The parameter of the cubic kernel that torch, ONNX and OpenCV share."""


def resize_images(plan: Plan, source: int, target: int) -> Plan:
    """Return a plan for images [B, C, source, source] of one for [B, C, target, target].

    The interpolation equals `torch.nn.functional.interpolate` (bicubic, `align_corners` unset) up
    to rounding, but multiplies by one matrix along each axis: ONNX Runtime takes 1.1 ms for these
    products and 72 ms for its own cubic `Resize` (224 to 192 pixels, one image, one thread).
    """

    def embed(images: Tensor) -> Tensor:
        matrix = _matrix(source, target, images.dtype, images.device)
        return plan.embed(matrix @ images @ matrix.T)

    return replace(plan, embed=embed)


@functools.cache
def _matrix(source: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the matrix [target, source] on a device.

    It comes from NumPy and not from torch, whose operations would become nodes of a graph while a
    path is exported.
    """
    with torch.inference_mode(mode=False):  # training may use it, too
        return torch.from_numpy(cubic_matrix(source, target)).to(device, dtype)


def cubic_matrix(source: int, target: int) -> NDArray[np.float32]:
    """Return the weights [target, source] of `source` values in `target` interpolated ones.

    Positions are rounded as torch rounds them; values beyond the edge equal the one at the edge.
    """
    ratio = np.float32(source / target)
    positions = ratio * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    below = np.floor(positions)
    matrix = np.zeros((target, source), np.float32)
    for neighbour in (-1, 0, 1, 2):
        columns = np.clip(below + neighbour, 0, source - 1).astype(np.int64)
        weights = _cubic(np.abs(positions - below - neighbour))
        np.add.at(matrix, (np.arange(target), columns), weights)
    return matrix


def _cubic(distance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cubic kernel at distances from 0 to 2."""
    d, a = distance, SHARPNESS
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, far)
