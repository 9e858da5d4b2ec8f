"""The names of adapters in OpenAI's API, for models that have adapters of one name."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from ladderstitch.api.openai.models import find_model, named_models
from ladderstitch.errors import ModelNotFound
from ladderstitch.hosting.registry import ModelRegistry, TextModel
from ladderstitch.telemetry.text_metrics import TextMetrics
from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextManifest, TextVariant
from ladderstitch.text.model.residual import ResidualScheme
from ladderstitch.text.scheduler.scheduler import TextScheduler
from tests.support.language_models import TINY

STANDARD = ResidualScheme()


def add(registry: ModelRegistry, name: str, *adapters: str) -> None:
    paths = [TextVariant(name="standard", residual=STANDARD)]
    paths += [TextVariant(name=a, residual=STANDARD, by_name=True) for a in adapters]
    manifest = TextManifest(name=name, config=TINY, paths=tuple(paths), origin="", licence="none")
    bundle = TextBundle(Path(name), manifest)
    model = TextModel(bundle, cast("TextScheduler", None), cast("TextMetrics", None), 1)
    registry.add(model)


def test_adapters_of_one_name_are_listed_with_their_model() -> None:
    registry = ModelRegistry("r", ready=True)
    add(registry, "first", "law", "poems")
    add(registry, "second", "law", "first")
    assert [(named.id, named.variant) for named in named_models(registry)] == [
        ("first", None),
        ("first:law", 1),
        ("poems", 2),
        ("second", None),
        ("second:law", 1),
        ("second:first", 2),
    ]
    for name, model, variant in [
        ("first", "first", None),
        ("poems", "first", 2),
        ("first:poems", "first", 2),
        ("second:law", "second", 1),
        ("second:first", "second", 2),
    ]:
        found = find_model(registry, name)
        assert (found.id, found.model.name, found.variant) == (name, model, variant)
    for name in ("law", "second:poems", "first:standard", "standard", ""):
        with pytest.raises(ModelNotFound, match=r"'second' .*'first:law', adapter 'poems'"):
            find_model(registry, name)


def test_model_without_a_path_for_all_requests_is_refused() -> None:
    only = (TextVariant(name="law", residual=STANDARD, by_name=True),)
    with pytest.raises(ValueError, match="paths: expected one without by_name"):
        TextManifest(name="m", config=TINY, paths=only, origin="", licence="none")
