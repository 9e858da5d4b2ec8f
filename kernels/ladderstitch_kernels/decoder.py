"""A small decoder made of these kernels, on which the overlap is verified and timed.

Its layers are those of Llama: grouped-query attention, SwiGLU, RMSNorm. It has neither embedding
nor output head; a step maps vectors to vectors. Sub-block k adds h_k to the stream x:

    standard   x_k = x_{k-1} + h_k(norm_k(x_{k-1}))
    ladder     x_k = x_{k-1} + h_k(norm_k(x_{k-2}))     Ladder Residual, arXiv 2501.06589

Decoders of different widths make one with stitching layers in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ladderstitch_kernels.comm.split_phase import Exchange
from ladderstitch_kernels.ops.decode_attention import paged_decode_attention
from ladderstitch_kernels.ops.rope_append import rope_append
from ladderstitch_kernels.ops.swiglu import swiglu
from ladderstitch_kernels.reference import CompleteStream
from ladderstitch_kernels.stream import Stitch, Stream

PAGE_TOKENS = 16
Scheme = Literal["standard", "ladder"]


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of a model over all ranks, or of one rank's shard."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    def shard(self, ranks: int) -> DecoderShape:
        """Return the sizes of one rank's shard.

        Raises `ValueError` unless heads, KV heads and feed-forward width are multiples of `ranks`.
        """
        for name in ("heads", "kv_heads", "ffn"):
            if getattr(self, name) % ranks:
                raise ValueError(
                    f"{name}: expected a multiple of {ranks} ranks, got {getattr(self, name)}"
                )
        return DecoderShape(
            self.layers,
            self.width,
            self.heads // ranks,
            self.kv_heads // ranks,
            self.head_dim,
            self.ffn // ranks,
        )


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The weights of one layer of one rank."""

    attention_norm: Tensor
    qkv: Tensor  # [(H_r + 2 K_r) d, D]
    output: Tensor  # [D, H_r d]
    ffn_norm: Tensor
    gate_up: Tensor  # [2 F_r, D]
    down: Tensor  # [D, F_r]


def random_layers(
    shape: DecoderShape, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Iterator[LayerWeights]:
    """Yield random layers, scaled so that the stream keeps its magnitude."""
    generator = torch.Generator(device).manual_seed(seed)

    def weight(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device)
        return (values * columns**-0.5).to(dtype)

    for _ in range(shape.layers):
        yield LayerWeights(
            1 + weight(1, shape.width)[0],
            weight((shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.width),
            weight(shape.width, shape.heads * shape.head_dim),
            1 + weight(1, shape.width)[0],
            weight(2 * shape.ffn, shape.width),
            weight(shape.width, shape.ffn),
        )


def shard_layer(layer: LayerWeights, shape: DecoderShape, rank: int, ranks: int) -> LayerWeights:
    """Return one rank's heads and feed-forward columns of a whole layer."""
    d = shape.head_dim
    q, k, v = layer.qkv.split((shape.heads * d, shape.kv_heads * d, shape.kv_heads * d))
    gate, up = layer.gate_up.chunk(2)
    return LayerWeights(
        layer.attention_norm,
        torch.cat([part.chunk(ranks)[rank] for part in (q, k, v)]),
        layer.output.chunk(ranks, dim=1)[rank].contiguous(),
        layer.ffn_norm,
        torch.cat([part.chunk(ranks)[rank] for part in (gate, up)]),
        layer.down.chunk(ranks, dim=1)[rank].contiguous(),
    )


def rotation_tables(
    positions: int, head_dim: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of rotary embedding, each [P, d/2] float32."""
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequencies)
    return angles.cos().float().to(device), angles.sin().float().to(device)


class Decoder:
    """One rank of the decoder; `shape` and `layers` are its shard.

    The cache holds `tokens` tokens of each of `rows` sequences. Position and cache are on the
    device, so that a step can be captured in a CUDA graph.
    """

    def __init__(
        self, shape: DecoderShape, layers: list[LayerWeights], rows: int, tokens: int
    ) -> None:
        self.shape, self.layers = shape, layers
        weight = layers[0].qkv
        device = weight.device
        pages = -(-tokens // PAGE_TOKENS)
        cache = (shape.layers, rows * pages, PAGE_TOKENS, shape.kv_heads, shape.head_dim)
        self.keys = torch.zeros(cache, dtype=weight.dtype, device=device)
        self.values = torch.zeros(cache, dtype=weight.dtype, device=device)
        self.pages = torch.arange(rows * pages, dtype=torch.int32, device=device).view(rows, pages)
        self.tables = rotation_tables(pages * PAGE_TOKENS, shape.head_dim, device)
        self.position = torch.zeros(rows, dtype=torch.int32, device=device)
        self._first_slot = self.pages[:, 0] * PAGE_TOKENS

    def step(self, x: Tensor, exchange: Exchange, scheme: Scheme) -> Tensor:
        """Decode one token of each sequence: map `x` [M, D] to the final stream [M, D].

        The caches grow by one token. The only difference of the ladder is that it collects each
        reduction one sub-block later than the standard residual.
        """
        return stitched_step([self], [], x, exchange, scheme)

    def run(self, stream: Stream | CompleteStream, outgoing: Stitch | None = None) -> None:
        """Run all layers for one token of each sequence, then cross the `outgoing` stitch, if any.

        The caches grow by one token.
        """
        for layer, weights in enumerate(self.layers):
            mixed = self._attend(layer, stream.read_normed(weights.attention_norm))
            stream.add_product(mixed, weights.output)
            mixed = self._gate(layer, stream.read_normed(weights.ffn_norm))
            if outgoing is None or layer + 1 < len(self.layers):
                stream.add_product(mixed, weights.down)
            else:
                stream.add_and_cross(mixed, weights.down, outgoing)
        self.position += 1

    def _attend(self, layer: int, x: Tensor) -> Tensor:
        shape = self.shape
        qkv = F.linear(x, self.layers[layer].qkv)
        keys, values = self.keys[layer], self.values[layer]
        q = rope_append(
            qkv.view(x.shape[0], shape.heads + 2 * shape.kv_heads, shape.head_dim),
            *self.tables,
            self.position,
            self._first_slot + self.position,
            keys,
            values,
        )
        mixed = paged_decode_attention(q, keys, values, self.pages, self.position + 1)
        return mixed.view(x.shape[0], -1)

    def _gate(self, layer: int, x: Tensor) -> Tensor:
        return swiglu(F.linear(x, self.layers[layer].gate_up))


def stitched_step(
    parts: Sequence[Decoder],
    stitches: Sequence[Stitch],
    x: Tensor,
    exchange: Exchange,
    scheme: Scheme,
) -> Tensor:
    """Decode one token through decoders of different widths, with a stitch between each two.

    Map `x` [M, D] of the first width to the final stream of the last one. The exchange is of the
    largest width. Raises `ValueError` unless there is one stitch fewer than decoders.
    """
    stream = Stream(x, exchange, 1 if scheme == "ladder" else 0)
    run_parts(parts, stitches, stream)
    return stream.drain()


def run_parts(
    parts: Sequence[Decoder], stitches: Sequence[Stitch], stream: Stream | CompleteStream
) -> None:
    """Run decoders of different widths on a stream, which crosses a stitch between each two.

    Raises `ValueError` unless there is one stitch fewer than decoders.
    """
    if len(stitches) != len(parts) - 1:
        raise ValueError(
            f"stitches: expected one fewer than {len(parts)} decoders, got {len(stitches)}"
        )
    for part, outgoing in zip(parts, (*stitches, None), strict=True):
        part.run(stream, outgoing)
