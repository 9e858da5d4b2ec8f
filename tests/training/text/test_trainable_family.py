"""Tests of the trainable family: mixed paths against a loop over tokens in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.text.bundle import TextBundle, TextManifest, TextVariant, write_manifest
from ladderstitch.text.model.config import DecoderConfig
from ladderstitch.text.model.family import DecoderFamily
from ladderstitch.text.model.family_weights import anchor_prefix, map_shapes
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.text.calibrate import open_runner
from ladderstitch.training.text.elastic_recipe import SwitchMeasure
from ladderstitch.training.text.family_routes import Route, Span, all_routes
from ladderstitch.training.text.measure_family import switch_divergence
from ladderstitch.training.text.stitching_maps import fit_maps
from ladderstitch.training.text.switches import measure_switches
from ladderstitch.training.text.trainable_family import TrainableFamily
from ladderstitch.training.text.trainable_llama import TrainableLlama

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
TOKENS = torch.arange(40).view(2, 20) * 7 % 50
Tensors = Mapping[str, Tensor]


def random_family(scheme: str, anchors: int = 3) -> TrainableFamily:
    """Return a family of the first configurations, with random weights of visible effect."""
    configs = CONFIGS[:anchors]
    shapes = map_shapes(DecoderFamily(tuple(configs)))
    for number, config in enumerate(configs):
        prefix = anchor_prefix(number, anchors)
        shapes |= {prefix + name: shape for name, shape in expected_shapes(config).items()}
    random = torch.Generator().manual_seed(0)
    tensors = {n: 0.3 * torch.randn(s, generator=random) for n, s in shapes.items()}
    return TrainableFamily(configs, tensors, plan_layers(ResidualScheme(scheme=scheme), 3, 1))  # type: ignore[arg-type] # a name of a scheme


class TokenLoop:
    """A family in float64 that runs one token of one text after the other, layer by layer."""

    def __init__(self, tensors: Tensors, ladder: bool) -> None:
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

    def write_keys(
        self, owner: int, layer: int, token: int, position: int, read: np.ndarray
    ) -> None:
        """Add the token's keys and values of the layer in every anchor."""
        for anchor in range(3):
            own = read
            if anchor != owner and layer == 0:
                own = self.weight(anchor, "model.embed_tokens.weight")[token]
            elif anchor != owner:
                name = f"stitches.{owner}.{anchor}.{layer}"
                own = self.tensors[f"{name}.weight"] @ read + self.tensors[f"{name}.bias"]
            pair = tuple(self.heads(anchor, layer, name, own, position) for name in "kv")
            self.cache.setdefault((anchor, layer), []).append(pair)  # type: ignore[arg-type] # two entries

    def step(self, token: int, position: int, route: Route) -> np.ndarray:
        """Return the logits [V] after a token on its path."""
        owner = route.front if route.layer else route.end
        lagged = self.weight(owner, "model.embed_tokens.weight")[token]
        last = np.zeros_like(lagged)
        for layer in range(3):
            if route.layer == layer and layer:
                name = f"stitches.{route.front}.{route.end}.{layer}"
                matrix = self.tensors[f"{name}.weight"]
                lagged, last = matrix @ lagged + self.tensors[f"{name}.bias"], matrix @ last
                owner = route.end
            read = lagged if self.ladder else lagged + last
            self.write_keys(owner, layer, token, position, read)
            lagged, last = lagged + last, self.attention(owner, layer, read, position)
            read = lagged if self.ladder else lagged + last
            lagged, last = lagged + last, self.mlp(owner, layer, read)
        final = self.norm(owner, "model.norm.weight", lagged + last)
        return self.weight(owner, "model.embed_tokens.weight") @ final


@pytest.mark.parametrize("scheme", ["ladder", "standard"])
@pytest.mark.parametrize("anchor", [0, 2])
def test_path_of_one_anchor_equals_that_model(scheme: str, anchor: int) -> None:
    family = random_family(scheme)
    prefix = anchor_prefix(anchor, 3)
    alone = TrainableLlama(
        CONFIGS[anchor],
        {name: family.tensors[prefix + name] for name in expected_shapes(CONFIGS[anchor])},
    )
    expected = alone.logits(TOKENS, family.plans)
    assert torch.equal(family.path_logits(TOKENS, Route.of_anchor(anchor)), expected)


@pytest.mark.parametrize("scheme", ["ladder", "standard"])
def test_mixed_paths_equal_loop_over_tokens(scheme: str) -> None:
    """The spans have every kind of path: anchors, maps up and down, at each layer."""
    family = random_family(scheme)
    routes = (
        Route(0, 0),
        Route(0, 2, 1),
        Route(2, 0, 2),
        Route(2, 2),
        Route(1, 0, 1),
        Route(1, 2, 2),
        Route(1, 1),
    )
    spans = [Span(route, 3) for route in routes[:6]] + [Span(routes[6], 2)]
    got = family.logits(TOKENS, spans).numpy()
    path = [span.route for span in spans for _ in range(span.tokens)]
    for row, text in enumerate(TOKENS.tolist()):
        loop = TokenLoop(family.tensors, ladder=scheme == "ladder")
        expected = np.stack([loop.step(t, n, path[n]) for n, t in enumerate(text)])
        np.testing.assert_allclose(got[row], expected, rtol=1e-3, atol=1e-4)


def test_maps_get_gradients_of_keys_that_other_tokens_see() -> None:
    """Tokens of the small anchor end there: only their translated keys reach the large one."""
    family = random_family("ladder")
    for tensor in family.tensors.values():
        tensor.requires_grad_()
    spans = [Span(Route.of_anchor(0), 10), Span(Route.of_anchor(2), 10)]
    torch.autograd.backward(family.logits(TOKENS, spans)[:, 10:].square().mean())
    for layer in (1, 2):
        gradient = family.tensors[f"stitches.0.2.{layer}.weight"].grad
        assert gradient is not None
        assert gradient.abs().max() > 0
        assert family.tensors[f"stitches.2.0.{layer}.weight"].grad is None


def test_switch_divergence_equals_loop_over_tokens() -> None:
    family = random_family("ladder")
    before, after = Route.of_anchor(0), Route.of_anchor(2)
    measure = SwitchMeasure(context=12, tokens=8, windows=2)
    got = switch_divergence(family, before, after, TOKENS, measure)
    expected = np.zeros(8)
    for text in TOKENS.tolist():
        switched, never = (TokenLoop(family.tensors, ladder=True) for _ in range(2))
        for position, token in enumerate(text):
            logits = switched.step(token, position, before if position < 12 else after)
            reference = never.step(token, position, after)
            if position >= 12:
                p, q = (
                    np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (reference, logits)
                )
                expected[position - 12] += np.sum(p * np.log(p / q)) / 2
    assert expected.min() > 0.001
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scheme", ["ladder", "standard"])
def test_engine_changes_paths_as_trained(tmp_path: Path, scheme: str) -> None:
    """Changes between all paths, with the engine's own cache and translation."""
    family, routes = random_family(scheme, anchors=2), all_routes(2, 3)
    residual = ResidualScheme(scheme=scheme)  # type: ignore[arg-type] # a name of a scheme
    paths = [
        TextVariant(name=route.name("ab"), residual=residual, route=route.segments(3))
        for route in routes
    ]
    manifest = TextManifest(
        name="random",
        config=CONFIGS[1],
        anchors=CONFIGS[:1],
        paths=tuple(paths),
        origin="random",
        licence="none",
    )
    write_manifest(tmp_path, manifest)
    save_file(dict(family.tensors), tmp_path / "model.safetensors")
    runner = open_runner(TextBundle.load(tmp_path, calibrated=False), threads=1)
    kinds = {path: path for path in range(len(routes))}
    served = measure_switches(runner, kinds, TOKENS, 12, "text")
    assert len(served.penalties) == 30
    measure = SwitchMeasure(context=12, tokens=8, windows=2)
    large = 0
    for penalty in served.penalties:
        change = routes[penalty.source], routes[penalty.target]
        expected = fmean(switch_divergence(family, *change, TOKENS, measure))
        large += expected > 1e-2
        assert penalty.nats == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert large >= 20  # the others change at the last layer, where the stitch is the translation


def test_wrong_number_of_tokens_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"spans: expected 20 tokens, got 12"):
        random_family("ladder").logits(TOKENS, [Span(Route.of_anchor(0), 12)])


def test_least_squares_recovers_planted_map() -> None:
    """The large anchor's embedding is an affine map of the small one's, and its blocks add none.

    Before every layer, the streams are then the embeddings themselves.
    """
    family = random_family("ladder", anchors=2)
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 16, generator=random)
    bias = torch.randn(24, generator=random)
    small = family.tensors["anchors.0.model.embed_tokens.weight"]
    family.tensors["model.embed_tokens.weight"].copy_(small @ weight.T + bias)
    for name, tensor in family.tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    explained = fit_maps(family, torch.arange(50).view(2, 25))
    for layer in (1, 2):
        found = family.tensors[f"stitches.0.1.{layer}.weight"]
        offset = family.tensors[f"stitches.0.1.{layer}.bias"]
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(offset, bias, rtol=1e-3, atol=1e-3)
        assert explained[f"stitches.0.1.{layer}"] > 0.9999


def test_routes_have_names_and_segments() -> None:
    routes = all_routes(2, 3)
    names = [route.name(("small", "large")) for route in routes]
    assert names == [
        "small",
        "large",
        "small-1+large",
        "small-2+large",
        "large-1+small",
        "large-2+small",
    ]
    assert [part.model_dump() for part in routes[0].segments(3)] == [
        {"anchor": 0, "first": 0, "last": 2}
    ]
    assert [part.model_dump() for part in routes[3].segments(3)] == [
        {"anchor": 0, "first": 0, "last": 1},
        {"anchor": 1, "first": 2, "last": 2},
    ]
