"""Tests of the closed-form start of groups: what it sets, and how near to the standard model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

from ladderstitch.errors import ConfigError
from ladderstitch.text.model.residual import ResidualScheme, plan_layers
from ladderstitch.text.model.weights import expected_shapes
from ladderstitch.training.text.distil import ConversionRecipe, create_adapters
from ladderstitch.training.text.group_fit import fit_groups
from ladderstitch.training.text.trainable_llama import LowRank, TrainableLlama
from tests.support.language_models import TINY, random_tensors

PAIR = ResidualScheme(scheme="groups", groups=((1, 2),))
RECIPE = {"name": "pair", "groups": [[0, 2]], "tokens": 64}


def draw_text(windows: int, seed: int) -> Tensor:
    """Return windows [W, 33] of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TINY.vocab_size, (windows, 33), generator=generator)


@torch.inference_mode()
def distance(model: TrainableLlama, text: Tensor, adapters: dict[str, LowRank]) -> float:
    """Return the mean squared difference of the pair's final states from the standard ones."""
    standard, pair = (
        model.final_hidden(
            model.run(
                model.embed(text[:, :-1]), range(3), plan_layers(scheme, 3, 1), adapters or None
            )
        )
        for scheme, adapters in ((ResidualScheme(), {}), (PAIR, adapters))
    )
    return float((standard - pair).square().mean())


def test_fit_groups_approaches_standard_on_other_text() -> None:
    """The fitted adapters lower the distance on tokens that they were not fitted to."""
    model = TrainableLlama(TINY, random_tensors(TINY))
    adapters = create_adapters(expected_shapes(TINY), range(1, 3), rank=48, seed=0)
    fit_groups(model, plan_layers(PAIR, 3, 1), adapters, draw_text(64, seed=1), Progress())
    other = draw_text(8, seed=2)
    assert distance(model, other, adapters) < 0.9 * distance(model, other, {})


def test_fit_groups_sets_matrices_that_read_the_stream() -> None:
    """The first layer's attention reads what it did; outputs and norms stay as they are."""
    adapters = create_adapters(expected_shapes(TINY), range(1, 3), rank=4, seed=0)
    model = TrainableLlama(TINY, random_tensors(TINY))
    fit_groups(model, plan_layers(PAIR, 3, 1), adapters, draw_text(8, seed=1), Progress())
    changed = {name for name, adapter in adapters.items() if adapter.up.any()}
    mlps = [f"model.layers.{n}.mlp.{m}_proj.weight" for n in (1, 2) for m in ("gate", "up")]
    assert changed == {f"model.layers.2.self_attn.{m}_proj.weight" for m in "qkv"} | set(mlps)


@pytest.mark.parametrize("rank", [3, 8, 20])
def test_set_product_is_best_of_its_rank(rank: int) -> None:
    """No better factors: the error is that of the singular values left out; 20 is above full."""
    generator = torch.Generator().manual_seed(0)
    addition = torch.randn(12, 8, generator=generator)
    inputs = torch.randn(100, 8, generator=generator) * torch.arange(1, 9)
    adapter = LowRank((12, 8), rank, generator)
    adapter.set_product(addition, torch.linalg.cholesky(inputs.T @ inputs))
    products = inputs @ addition.T
    error = (adapter(inputs) - products).detach().norm()
    left_out = torch.linalg.svdvals(products)[rank:].norm()
    torch.testing.assert_close(error, left_out, rtol=1e-3, atol=1e-3)


def test_retrained_following_reaches_last_layer() -> None:
    recipe = ConversionRecipe.model_validate(RECIPE | {"groups": [[1, 2], [4, 2]]})
    assert recipe.retrained_layers(8) == [1, 2, 4, 5]
    following = recipe.model_copy(update={"retrained": "following"})
    assert following.retrained_layers(8) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": None, "ladder_layers": 2, "fitted_tokens": 64}, "fitted_tokens: expected 0"),
        ({"epochs": 0}, "epochs: expected at least 1 without fitted_tokens"),
    ],
)
def test_recipe_wrong_fit_raises(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE | fields))
    with pytest.raises(ConfigError, match=message):
        ConversionRecipe.load(tmp_path / "recipe.yaml")
