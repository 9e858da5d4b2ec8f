"""ViT-ResNAS written down independently: the full network with what a path lacks set to zero.

This is how upstream trains its supernet; the server slices weights instead. Networks are upstream's
`network_def` tuples. Plain torch; nothing of the package is used.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
Network = tuple[Any, ...]
STEM = 24


def small_network(first: Sequence[int] = (5, 16, 6), classes: int = 5) -> Network:
    """Return a supernet of three stages; `first` is its first entry, with 16 channels."""
    return (
        tuple(first),
        (1, (16, 3, 4), (16, 24), 1),
        (1, (16, 3, 4), (16, 24), 1),
        (3, 16, 24),
        (1, (24, 2, 8), (24, 36), 1),
        (1, (24, 2, 8), (24, 36), 1),
        (3, 24, 40),
        (1, (40, 4, 8), (40, 60), 1),
        (2, 40, classes),
    )


def random_network(net: Network, rng: random.Random) -> Network:
    """Return a random network of a supernet: any widths that do not fall, heads, hidden, blocks."""
    width = rng.randint(1, net[0][1])
    path: list[Any] = [(net[0][0], width, *net[0][2:])]
    for entry in net[1:]:
        if entry[0] == 3:
            before, width = width, rng.randint(width, entry[2])
            path.append((3, before, width))
        elif entry[0] == 1:
            (_, heads, size), (_, hidden) = entry[1:3]
            attention = (width, rng.randint(1, heads), size)
            path.append((1, attention, (width, rng.randint(1, hidden)), rng.randint(0, 1)))
        else:
            path.append((2, width, entry[2]))
    return tuple(path)


def random_weights(net: Network, image_size: int, patch_size: int, channels: int = 1) -> Weights:
    """Return a state dict with upstream's names, and the head that only training uses."""
    torch.manual_seed(11)
    side, width = image_size // patch_size, net[0][1]
    weights: Weights = {}

    def layer(name: str, *size: int, bias: bool = True) -> None:
        weights[f"{name}.weight"] = torch.randn(size) / math.sqrt(math.prod(size[1:]))
        if bias:
            weights[f"{name}.bias"] = 0.3 * torch.randn(size[0])

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = 0.5 + torch.rand(width)
        weights[f"{name}.bias"] = 0.3 * torch.randn(width)

    if net[0][0] == 0:
        layer("patch_embed.proj", width, channels, patch_size, patch_size)
    else:
        stem = net[0][2] if net[0][0] == 5 else STEM
        for number, ins in enumerate((channels, stem, stem), 1):
            name = f"patch_embed.conv{number}"
            layer(f"{name}.conv", stem, ins, 3, 3, bias=False)
            norm(f"{name}.bn", stem)
            weights[f"{name}.bn.running_mean"] = 0.3 * torch.randn(stem)
            weights[f"{name}.bn.running_var"] = 0.5 + torch.rand(stem)
            weights[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
        layer("patch_embed.conv_proj", width, stem, patch_size // 2, patch_size // 2)
    weights["tokens"] = torch.randn(1, 1, width)
    weights["pos_embed"] = torch.randn(1, side * side + 1, width)
    for number, entry in enumerate(net[1:-1]):
        name = f"blocks.{number}"
        if entry[0] == 3:
            side //= 2
            norm(f"{name}.norm", entry[1])
            layer(f"{name}.patch_reduce", entry[2], entry[1], 3, 3)
            layer(f"{name}.token_transform", entry[2], entry[1])
            weights[f"{name}.pos_embed"] = torch.randn(1, side * side, entry[2])
            continue
        (width, heads, size), (_, hidden) = entry[1:3]
        norm(f"{name}.norm1", width)
        layer(f"{name}.attn.qkv", 3 * heads * size, width)
        layer(f"{name}.attn.proj", width, heads * size)
        norm(f"{name}.norm2", width)
        layer(f"{name}.mlp.fc1", hidden, width)
        layer(f"{name}.mlp.fc2", width, hidden)
    norm("norm", net[-1][1])
    layer("cls_head", net[-1][2], net[-1][1])
    layer("patch_head", net[-1][2], net[-1][1])
    return weights


def masked_logits(weights: Weights, path: Network, images: Tensor) -> Tensor:
    """Return the logits of a path on images [B, C, H, W]."""
    maps = _patches(weights, images)
    side = maps.shape[-1]
    x = maps.reshape(*maps.shape[:2], side * side).transpose(1, 2)
    x = torch.cat((weights["tokens"].repeat(len(images), 1, 1), x), 1) + weights["pos_embed"]
    width = path[0][1]
    x = _mask(x, width)
    for number, entry in enumerate(path[1:-1]):
        name = f"blocks.{number}"
        if entry[0] == 3:
            x = _mask(_reduce(weights, name, x, entry[1], side), entry[2])
            side, width = side // 2, entry[2]
        elif entry[3]:
            x = x + _mask(_attend(weights, name, x, entry[1]), width)
            y = F.gelu(
                _linear(weights, f"{name}.mlp.fc1", _norm(weights, f"{name}.norm2", x, width))
            )
            x = x + _mask(_linear(weights, f"{name}.mlp.fc2", _mask(y, entry[2][1])), width)
    return _linear(weights, "cls_head", _norm(weights, "norm", x, width)[:, 0])


def _patches(weights: Weights, x: Tensor) -> Tensor:
    """Return the embedded patches as maps [B, width, side, side]."""
    if "patch_embed.proj.weight" in weights:
        kernel = weights["patch_embed.proj.weight"]
        return F.conv2d(x, kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[-1])
    outputs = []
    for number, stride in ((1, 2), (2, 1), (3, 1)):
        name = f"patch_embed.conv{number}"
        x = F.conv2d(x, weights[f"{name}.conv.weight"], stride=stride, padding=1)
        scale, shift, mean, variance = (
            weights[f"{name}.bn.{part}"].reshape(-1, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp_min(0)
        outputs.append(x)
    kernel = weights["patch_embed.conv_proj.weight"]
    bias = weights["patch_embed.conv_proj.bias"]
    return F.conv2d(outputs[0] + outputs[2], kernel, bias, stride=kernel.shape[-1])


def _reduce(weights: Weights, name: str, x: Tensor, kept: int, side: int) -> Tensor:
    """Return tokens on a grid of half the side."""
    batch, _, width = x.shape
    y = _norm(weights, f"{name}.norm", x, kept)
    kernel, bias = weights[f"{name}.patch_reduce.weight"], weights[f"{name}.patch_reduce.bias"]
    grid = y[:, 1:].transpose(1, 2).reshape(batch, width, side, side)
    convolved = F.conv2d(grid, kernel, bias, stride=2, padding=1)
    patches = convolved.reshape(batch, len(bias), -1).transpose(1, 2) + weights[f"{name}.pos_embed"]
    token = _linear(weights, f"{name}.token_transform", y[:, :1])
    half = side // 2
    pooled = x[:, 1:].reshape(batch, half, 2, half, 2, width).mean((2, 4)).flatten(1, 2)
    residual = torch.cat((x[:, :1], pooled), 1)
    zeros = residual.new_zeros(batch, 1 + half * half, len(bias) - width)
    return torch.cat((token, patches), 1) + torch.cat((residual, zeros), 2)


def _attend(weights: Weights, name: str, x: Tensor, kept: tuple[int, int, int]) -> Tensor:
    """Return the attention of all heads, of which only the kept ones are not zero."""
    width, heads, size = kept
    y = _linear(weights, f"{name}.attn.qkv", _norm(weights, f"{name}.norm1", x, width))
    q, k, v = y.chunk(3, 2)
    mixed = torch.zeros_like(q)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
        mixed[..., part] = scores.softmax(2) @ v[..., part]
    return _linear(weights, f"{name}.attn.proj", mixed)


def _norm(weights: Weights, name: str, x: Tensor, kept: int) -> Tensor:
    """Return layer normalisation over the first channels; the others are zero."""
    mean = x.sum(-1, keepdim=True) / kept  # what is not kept is zero
    variance = (x * x).sum(-1, keepdim=True) / kept - mean * mean
    y = (x - mean) / (variance + 1e-6).sqrt()
    return _mask(weights[f"{name}.weight"] * y + weights[f"{name}.bias"], kept)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _mask(x: Tensor, kept: int) -> Tensor:
    """Return tokens whose channels from `kept` on are zero."""
    return x * (torch.arange(x.shape[-1]) < kept)
