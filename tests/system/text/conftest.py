"""Fixtures: tiny language models, one with a single variant and one with two."""

from __future__ import annotations

from pathlib import Path

import pytest

from ladderstitch.text.bundle import TextBundle
from ladderstitch.text.manifest import TextVariant
from ladderstitch.text.model.residual import ResidualScheme
from tests.support.language_models import write_tiny

PATHS = (
    TextVariant(name="standard", residual=ResidualScheme()),
    TextVariant(name="ladder-2", residual=ResidualScheme(scheme="ladder", ladder_layers=2)),
)


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """Return a bundle with one variant."""
    return TextBundle.load(write_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def two_paths(tmp_path_factory: pytest.TempPathFactory) -> TextBundle:
    """Return a bundle with a standard variant (quality 0.6) and a ladder variant (0.5).

    The ladder is in the last two layers.
    """
    path: Path = tmp_path_factory.mktemp("models") / "two"
    return TextBundle.load(write_tiny(path, paths=PATHS))
