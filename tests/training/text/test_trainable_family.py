"""Tests of the trainable family: mixed paths against a loop over tokens in float64."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ladderstitch.errors import ConfigError
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextManifest, TextVariant, write_manifest
from ladderstitch.text.model.family import DecoderFamily
from ladderstitch.text.model.family_weights import anchor_prefix
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.text.calibrate import open_runner
from ladderstitch.training.text.elastic_recipe import SwitchMeasure
from ladderstitch.training.text.family_routes import Route, Span, all_routes
from ladderstitch.training.text.measure_family import switch_divergence
from ladderstitch.training.text.stitching_maps import fit_maps
from ladderstitch.training.text.switches import measure_switches
from ladderstitch.training.text.trainable_llama import TrainableLlama
from tests.support.family_token_loop import CONFIGS, TokenLoop, random_family

TOKENS = torch.arange(40).view(2, 20) * 7 % 50


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


MIXED = {
    (3, 3, 3): (
        Route(0, 0),
        Route(0, 2, 1),
        Route(2, 0, 2),
        Route(2, 2),
        Route(1, 0, 1),
        Route(1, 2, 2),
        Route(1, 1),
    ),
    (2, 3, 5): (
        Route(0, 0),
        Route(0, 2, 1, 1),
        Route(2, 0, 1, 3),
        Route(2, 2),
        Route(2, 1, 2, 4),
        Route(1, 2, 2, 2),
        Route(1, 1),
    ),
    (5, 2, 3): (
        Route(0, 2, 2, 4),
        Route(0, 1, 1, 3),
        Route(2, 0, 1, 1),
        Route(1, 1),
        Route(1, 0, 1, 1),
        Route(0, 0),
        Route(2, 2),
    ),
}
"""By the depths of the anchors: every kind of path, with maps up and down."""


@pytest.mark.parametrize("scheme", ["ladder", "standard"])
@pytest.mark.parametrize("depths", MIXED)
def test_mixed_paths_equal_loop_over_tokens(depths: tuple[int, ...], scheme: str) -> None:
    family, routes = random_family(scheme, depths), MIXED[depths]
    spans = [Span(route, 3) for route in routes[:6]] + [Span(routes[6], 2)]
    got = family.logits(TOKENS, spans).numpy()
    path = [span.route for span in spans for _ in range(span.tokens)]
    for row, text in enumerate(TOKENS.tolist()):
        loop = TokenLoop(family.tensors, scheme == "ladder", depths)
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
@pytest.mark.parametrize("depths", [(3, 3), (2, 4), (5, 3)])
def test_engine_changes_paths_as_trained(
    tmp_path: Path, depths: tuple[int, ...], scheme: str
) -> None:
    """Changes between all paths, with the engine's own cache and translation."""
    family = random_family(scheme, depths)
    routes = all_routes(family.decoders)
    residual = ResidualScheme(scheme=scheme)  # type: ignore[arg-type] # a name of a scheme
    paths = [
        TextVariant(name=route.name("ab"), residual=residual, route=route.segments(family.decoders))
        for route in routes
    ]
    manifest = TextManifest(
        name="random",
        config=family.decoders.largest,
        anchors=family.decoders.anchors[:-1],
        paths=tuple(paths),
        origin="random",
        licence="none",
    )
    write_manifest(tmp_path, manifest)
    save_file(dict(family.tensors), tmp_path / "model.safetensors")
    runner = open_runner(TextBundle.load(tmp_path, calibrated=False), threads=1)
    kinds = {path: path for path in range(len(routes))}
    served = measure_switches(runner, kinds, TOKENS, 12, "text")
    assert len(served.penalties) == len(routes) * (len(routes) - 1)
    assert len(routes) == {(3, 3): 6, (2, 4): 4, (5, 3): 6}[depths]
    measure = SwitchMeasure(context=12, tokens=8, windows=2)
    large = 0
    for penalty in served.penalties:
        change = routes[penalty.source], routes[penalty.target]
        expected = fmean(switch_divergence(family, *change, TOKENS, measure))
        large += expected > 1e-2
        assert penalty.nats == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert (
        large >= len(served.penalties) // 2
    )  # the others change at the last layer, where the stitch is the translation


def test_wrong_number_of_tokens_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"spans: expected 20 tokens, got 12"):
        random_family("ladder").logits(TOKENS, [Span(Route.of_anchor(0), 12)])


@pytest.mark.parametrize("depths", [(3, 3), (2, 4)])
def test_least_squares_recovers_planted_map(depths: tuple[int, ...]) -> None:
    """The large anchor's embedding is an affine map of the small one's, and its blocks add none.

    Before every layer, the streams are then the embeddings themselves.
    """
    family = random_family("ladder", depths)
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 16, generator=random)
    bias = torch.randn(24, generator=random)
    small = family.tensors["anchors.0.model.embed_tokens.weight"]
    family.tensors["model.embed_tokens.weight"].copy_(small @ weight.T + bias)
    for name, tensor in family.tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    explained = fit_maps(family, torch.arange(50).view(2, 25))
    names = {(3, 3): ["0.1.1", "0.1.2"], (2, 4): ["0.1.1", "0.1.1-2", "0.1.1-3"]}[depths]
    for name in names:
        found = family.tensors[f"stitches.{name}.weight"]
        offset = family.tensors[f"stitches.{name}.bias"]
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(offset, bias, rtol=1e-3, atol=1e-3)
        assert explained[f"stitches.{name}"] > 0.9999


def test_routes_have_names_and_segments() -> None:
    family = DecoderFamily(CONFIGS[:2])
    routes = all_routes(family)
    names = [route.name(("small", "large")) for route in routes]
    assert names == [
        "small",
        "large",
        "small-1+large",
        "small-2+large",
        "large-1+small",
        "large-2+small",
    ]
    assert [part.model_dump() for part in routes[0].segments(family)] == [
        {"anchor": 0, "first": 0, "last": 2}
    ]
    assert [part.model_dump() for part in routes[3].segments(family)] == [
        {"anchor": 0, "first": 0, "last": 1},
        {"anchor": 1, "first": 2, "last": 2},
    ]


def test_routes_of_unequal_anchors_have_both_layers() -> None:
    small, large = (
        config.model_copy(update={"layers": layers})
        for config, layers in zip(CONFIGS, (4, 6), strict=False)
    )
    family = DecoderFamily((small, large))
    routes = all_routes(family)
    assert [route.name(("small", "large")) for route in routes] == [
        "small",
        "large",
        "small-1+large",
        "small-2+large",
        "small-3+large",
        "large-2+small",
        "large-3+small",
        "large-5+small",
    ]
    assert [(r.run, r.layer) for r in routes[2:]] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (2, 1),
        (3, 2),
        (5, 3),
    ]
