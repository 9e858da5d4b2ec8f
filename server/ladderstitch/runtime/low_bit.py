"""Matrices with 4 or 8 bits per weight.

A row is cut into blocks of 32 weights. A block has a scale s and an integer zero point z, and a
weight is w = s (c - z) with a code c of 4 or 8 bits. ONNX Runtime's `MatMulNBits` multiplies with
such matrices as they are stored. It rounds activations to 8 bits, in blocks of 32, too.

Weights that had 4 bits before (GGUF's Q4_1 and Q4_K) lie on grids that do not contain 0, so that
blocks have an offset o in addition: w = s (c - z) + o. As an offset multiplies the sum of a block's
activations, the offsets are further columns of the matrix, and the sums further activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LowBitPrecision: TypeAlias = Literal["int8", "int4"]
"""Name of the number format of a path's matrices."""
BITS: Mapping[LowBitPrecision, int] = {"int8": 8, "int4": 4}
"""Bits of a weight in each precision."""
BLOCK = 32
"""Weights of a row that share a scale and a zero point."""
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a block's range that `quantise` tries with 4 bits; less than 1 clips a few weights."""
SAMPLE_ROWS = 8
"""Rows that decide whether the others may lie on grids, too."""
GRID_TOLERANCE = 1e-2
"""Largest distance of a weight from its grid, in steps."""


@dataclass(frozen=True, slots=True, eq=False)
class LowBitMatrix:
    """A matrix [N, K] with `bits` bits per weight.

    A row has B = ceil(K / 32) blocks of weights and, if `has_offsets`, ceil(B / 32) more blocks
    with the offsets of those; P blocks in all.
    """

    bits: int
    columns: int
    codes: NDArray[np.uint8]  # [N, P, 4 bits]: two codes a byte if they have 4 bits, low one first
    scales: NDArray[np.float32]  # [N, P]
    zeros: NDArray[np.uint8]  # [N, ceil(P bits / 8)], packed like codes
    has_offsets: bool = False
    is_fine: bool = False
    """Whether products round activations to 16 bits instead of 8."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows N and columns K."""
        return len(self.codes), self.columns

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    @property
    def num_sums(self) -> int:
        """The number of blocks of activations whose sums are further activations; 0 for none."""
        return -(-self.columns // BLOCK) if self.has_offsets else 0

    def dequantise(self) -> Tensor:
        """Return the weights [N, K] in float32."""
        rows, blocks = self.scales.shape
        codes = _unpack(self.codes.reshape(rows, -1), self.bits).reshape(rows, blocks, BLOCK)
        zeros = _unpack(self.zeros, self.bits)[:, :blocks, None]
        values = (codes.astype(np.float32) - zeros) * self.scales[..., None]
        flat = values.reshape(rows, -1)
        weights = flat[:, : self.columns].copy()
        if self.has_offsets:
            offsets = flat[:, self.columns : self.columns + self.num_sums]
            weights += np.repeat(offsets, BLOCK, axis=1)
        return torch.from_numpy(weights)

    def rows(self, indices: Tensor) -> Tensor:
        """Return the rows with these indices [T], in float32 [T, K]."""
        at = indices.numpy()
        codes, scales, zeros = self.codes[at], self.scales[at], self.zeros[at]
        return replace(self, codes=codes, scales=scales, zeros=zeros).dequantise()


def quantise(weight: Tensor, bits: int, *, is_fine: bool = False) -> LowBitMatrix:
    """Return a matrix [N, K] with `bits` bits per weight, 4 or 8.

    `is_fine` says whether products round activations to 16 bits instead of 8.

    Blocks of 32 weights that have at most 16 equidistant values keep their distances with 4 bits;
    offsets are kept to 1/30 of the range of 32 of them. For other weights, the range of each
    block is the one of `SHRINKS` with the smallest squared error.
    """
    rows, columns = weight.shape
    blocks = _blocks(weight.float())
    grid = _find_grid(blocks) if bits == 4 and columns % BLOCK == 0 else None
    if grid is None:
        shrinks = SHRINKS if bits == 4 else SHRINKS[:1]
        parts = [(blocks, *_choose_ranges(blocks, bits, shrinks))]
    else:
        scale, zero, offset = grid
        parts = [(blocks - offset[..., None], scale, zero)]
        if (offset.abs() > GRID_TOLERANCE * scale).any():
            offsets = _blocks(offset)
            parts.append((offsets, *_choose_ranges(offsets, bits, SHRINKS[:1])))
    scale, zero = (torch.cat([part[n] for part in parts], 1) for n in (1, 2))
    codes = torch.cat([_codes(*part, 2**bits - 1) for part in parts], 1).to(torch.uint8)
    return LowBitMatrix(
        bits,
        columns,
        _pack(codes.reshape(rows, -1).numpy(), bits).reshape(rows, -1, BLOCK * bits // 8),
        scale.numpy(),
        _pack(zero.to(torch.uint8).numpy(), bits),
        has_offsets=len(parts) > 1,
        is_fine=is_fine,
    )


def _blocks(rows: Tensor) -> Tensor:
    """Return rows [N, K] as blocks [N, ceil(K / 32), 32], padded with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK))
    return padded.reshape(len(rows), -1, BLOCK)


def _choose_ranges(blocks: Tensor, bits: int, shrinks: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of blocks [N, B, 32] with the smallest squared error."""
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    top = 2**bits - 1
    error, scale, zero = torch.full_like(low, torch.inf), low, low
    for shrink in shrinks:
        tried = _nonzero((high - low) * (shrink / top))
        point = (-low * shrink / tried).round().clamp(0, top)
        rounded = (_codes(blocks, tried, point, top) - point[..., None]) * tried[..., None]
        squared = (rounded - blocks).square().sum(-1)
        better = squared < error
        error = torch.where(better, squared, error)
        scale, zero = torch.where(better, tried, scale), torch.where(better, point, zero)
    return scale, zero


def _find_grid(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return scale, zero point and offset that keep all weights [N, B, 32]; None if there are none.

    The smallest and the largest weight of a block are some number of steps apart, 15 for Q4_1.
    """
    if len(blocks) > SAMPLE_ROWS and _find_grid(blocks[:SAMPLE_ROWS]) is None:
        return None
    low = blocks.amin(-1)
    reach = blocks.amax(-1) - low
    scale = _nonzero(low.abs())  # for blocks of equal weights
    missing = reach > 0
    for steps in range(15, 0, -1):
        step = _nonzero(reach / steps)
        codes = (blocks - low[..., None]) / step[..., None]
        fits = (codes - codes.round()).abs().amax(-1) < GRID_TOLERANCE
        scale = torch.where(missing & fits, step, scale)
        missing &= ~fits
        if not missing.any():
            break
    else:
        return None
    zero = (-low / scale).round().clamp(0, 15)
    offset = low + scale * zero
    # weights that are all positive: whole steps are part of the codes if these have room
    room = 15 - (reach / scale).round() - zero
    whole_steps = torch.minimum((offset / scale).round().clamp(min=0), room.clamp(min=0))
    return scale, zero, offset - scale * whole_steps


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _codes(blocks: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Return the codes [N, B, 32] of weights, as floating-point numbers."""
    return (blocks / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, top)


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return codes [N, K] as bytes, two in each if they have 4 bits."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    packed: NDArray[np.uint8] = even[:, ::2] | even[:, 1::2] << np.uint8(4)
    return packed


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return the codes in bytes, one in each; the inverse of `_pack` up to its padding."""
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
