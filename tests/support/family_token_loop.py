"""A small trainable family with random weights, and a loop over tokens that defines its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import DecoderFamily
from ladderstitch.text.model.family_weights import anchor_prefix, map_shapes
from ladderstitch.text.model.residual import LayerPlan, ResidualScheme, plan_layers
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.text.family_routes import Route
from ladderstitch.training.text.trainable_family import TrainableFamily

SHARED = {
    "vocab_size": 50,
    "layers": 3,
    "kv_heads": 2,
    "head_dim": 8,
    "max_positions": 32,
    "tied_head": True,
}
CONFIGS = tuple(
    DecoderConfig(hidden_size=width, intermediate_size=2 * width, heads=heads, **SHARED)
    for width, heads in ((16, 2), (24, 4), (32, 4))
)
Tensors = Mapping[str, Tensor]


def random_family(scheme: str, depths: Sequence[int] = (3, 3, 3)) -> TrainableFamily:
    """Return a family of the first configurations, with random weights of visible effect."""
    anchors = len(depths)
    configs = tuple(
        config.model_copy(update={"layers": layers})
        for config, layers in zip(CONFIGS, depths, strict=False)
    )
    shapes = map_shapes(DecoderFamily(tuple(configs)))
    for number, config in enumerate(configs):
        prefix = anchor_prefix(number, anchors)
        shapes |= {prefix + name: shape for name, shape in expected_shapes(config).items()}
    random = torch.Generator().manual_seed(0)
    tensors = {n: 0.3 * torch.randn(s, generator=random) for n, s in shapes.items()}
    return TrainableFamily(configs, tensors, family_plans(scheme, max(depths)))


def family_plans(scheme: str, layers: int) -> tuple[LayerPlan, ...]:
    return plan_layers(ResidualScheme.model_validate({"scheme": scheme}), layers, 1)


class TokenLoop:
    """A family in float64 that runs one token of one text after the other, layer by layer."""

    def __init__(self, tensors: Tensors, ladder: bool, depths: Sequence[int] = (3, 3, 3)) -> None:
        self.depths = depths
        self.tensors = {name: tensor.double().numpy() for name, tensor in tensors.items()}
        self.ladder = ladder
        self.cache: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}

    def weight(self, anchor: int, name: str) -> np.ndarray:
        """Return the tensor of an anchor; the third has no prefix."""
        return self.tensors[name if anchor == 2 else f"anchors.{anchor}.{name}"]

    def norm(self, anchor: int, name: str, x: np.ndarray) -> np.ndarray:
        return self.weight(anchor, name) * x / np.sqrt(np.mean(x * x) + 1e-5)

    def heads(self, anchor: int, layer: int, name: str, x: np.ndarray, position: int) -> np.ndarray:
        """Return the heads [H, 8] of the stream that attention reads; q and k are rotated."""
        normed = self.norm(anchor, f"model.layers.{layer}.input_layernorm.weight", x)
        product = self.weight(anchor, f"model.layers.{layer}.self_attn.{name}_proj.weight")
        heads = (product @ normed).reshape(-1, 8)
        if name == "v":
            return heads
        angles = position * 10_000.0 ** (-np.arange(4) / 4)
        first, second = heads[:, :4], heads[:, 4:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=1)

    def attention(self, anchor: int, layer: int, read: np.ndarray, position: int) -> np.ndarray:
        queries = self.heads(anchor, layer, "q", read, position)
        seen = self.cache[anchor, layer]
        group = len(queries) // 2
        mixed = []
        for number, query in enumerate(queries):
            keys = np.stack([key[number // group] for key, _ in seen])
            values = np.stack([value[number // group] for _, value in seen])
            scores = np.exp(keys @ query / np.sqrt(8))
            mixed.append(scores @ values / scores.sum())
        output = self.weight(anchor, f"model.layers.{layer}.self_attn.o_proj.weight")
        return output @ np.concatenate(mixed)

    def mlp(self, anchor: int, layer: int, read: np.ndarray) -> np.ndarray:
        prefix = f"model.layers.{layer}."
        normed = self.norm(anchor, f"{prefix}post_attention_layernorm.weight", read)
        gate = self.weight(anchor, f"{prefix}mlp.gate_proj.weight") @ normed
        up = self.weight(anchor, f"{prefix}mlp.up_proj.weight") @ normed
        return self.weight(anchor, f"{prefix}mlp.down_proj.weight") @ (
            gate / (1 + np.exp(-gate)) * up
        )

    def paired(self, front: int, end: int, layer: int) -> int:
        """Return the first layer of `front` that is not before a layer of `end`, else the last."""
        own, other = self.depths[front], self.depths[end]
        return next((n for n in range(own) if n / own >= layer / other), own - 1)

    def map_name(self, front: int, end: int, layer: int) -> str:
        paired = self.paired(front, end, layer)
        return f"stitches.{front}.{end}.{layer if paired == layer else f'{paired}-{layer}'}"

    def write_keys(self, anchor: int, layer: int, position: int, own: np.ndarray) -> None:
        """Add the token's keys and values of a layer, from the stream that its attention reads."""
        pair = tuple(self.heads(anchor, layer, name, own, position) for name in "kv")
        self.cache.setdefault((anchor, layer), []).append(pair)  # type: ignore[arg-type] # two entries

    def translate(
        self, token: int, position: int, reads: Mapping[tuple[int, int], np.ndarray]
    ) -> None:
        """Add keys and values of all layers that the token did not run."""
        fronts = list(dict.fromkeys(anchor for anchor, _ in reads))
        for anchor, depth in enumerate(self.depths):
            for layer in range(depth):
                if (anchor, layer) in reads:
                    continue
                own = self.weight(anchor, "model.embed_tokens.weight")[token]
                if layer:
                    front = next(
                        f
                        for f in fronts
                        if f != anchor and (f, self.paired(f, anchor, layer)) in reads
                    )
                    name = self.map_name(front, anchor, layer)
                    read = reads[front, self.paired(front, anchor, layer)]
                    own = self.tensors[f"{name}.weight"] @ read + self.tensors[f"{name}.bias"]
                self.write_keys(anchor, layer, position, own)

    def step(self, token: int, position: int, route: Route) -> np.ndarray:
        """Return the logits [V] after a token on its path."""
        planes = [(route.front, n) for n in range(route.run)]
        planes += [(route.end, n) for n in range(route.layer, self.depths[route.end])]
        owner = planes[0][0]
        lagged = self.weight(owner, "model.embed_tokens.weight")[token]
        last, reads = np.zeros_like(lagged), {}
        for anchor, layer in planes:
            if anchor != owner:
                name = self.map_name(owner, anchor, layer)
                matrix = self.tensors[f"{name}.weight"]
                lagged, last = matrix @ lagged + self.tensors[f"{name}.bias"], matrix @ last
                owner = anchor
            reads[anchor, layer] = read = lagged if self.ladder else lagged + last
            self.write_keys(anchor, layer, position, read)
            lagged, last = lagged + last, self.attention(owner, layer, read, position)
            read = lagged if self.ladder else lagged + last
            lagged, last = lagged + last, self.mlp(owner, layer, read)
        self.translate(token, position, reads)
        final = self.norm(owner, "model.norm.weight", lagged + last)
        return self.weight(owner, "model.embed_tokens.weight") @ final
